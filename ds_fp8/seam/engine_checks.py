"""What the engine and its model say before anything is allocated: checks, and the settings of a run."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist

from ds_fp8.compat import DeepSpeedConfig
from ds_fp8.config import ds_config
from ds_fp8.config.refusals import naming, refusal
from ds_fp8.config.section import FP8Config
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.placement.ranks import AUTOTP_SIZE, NODE_SIZE, SEQUENCE_SIZE, check_divides
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings, offload_from, weight_dtypes


def initialize_params(original: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeedConfig._initialize_params: also refuse what the number of ranks shows."""

    @functools.wraps(original)
    def checked(self: Any, param_dict: dict[str, Any]) -> None:
        original(self, param_dict)
        enabled = self.ds_fp8 is not None and self.ds_fp8.enabled
        if enabled and type(self) is DeepSpeedConfig and dist.is_initialized():  # not in a dry run
            check_divides(AUTOTP_SIZE, max(1, ds_config.autotp_size(param_dict)), dist.get_world_size())

    return ds_config.initialize_params(checked)


def check_engine(engine: Any, recipe: Recipe) -> None:
    """Raise ValueError, before anything is allocated, for what does not work with this model."""
    refused = {
        "a PipelineModule": engine.pipeline_parallelism,
        "a model with MoE layers": engine.has_moe_layers,
        "an mpu with pipeline stages": _pipeline_stages(engine.mpu) > 1,
    }
    for what, present in refused.items():
        if present:
            allowed = "data parallelism, and tensor or sequence parallelism (AutoTP, an mpu)"
            raise ValueError(f"deepspeed.initialize: received {what}, allowed with fp8: {allowed}")
    _refuse_sequence_parallel_size(engine)
    if peers_of(engine) is not None:
        _refuse_beside_peers(engine)
    ranks = dist.get_world_size(engine.seq_data_parallel_group)
    check_divides(NODE_SIZE, recipe.intra_node_size, ranks)
    _refuse_accumulation_dtype(engine, recipe)
    for module_name, module in engine.module.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            raise refusal(f"{module_name}.sparse", True, "false with fp8 enabled")
    _refuse_weight_dtypes(engine.module, recipe)
    _refuse_slices(engine)


def is_sequence_parallel(mpu: Any) -> bool:
    """Whether an mpu splits sequences only, by DeepSpeed's own test: every rank holds all parameters."""
    return hasattr(mpu, "initialize_sequence_parallel")


def peers_of(engine: Any) -> Any:
    """The group of the ranks that hold parts of one replica of the model; None if each holds all of it."""
    mpu = engine.mpu
    if mpu is None or is_sequence_parallel(mpu) or mpu.get_model_parallel_world_size() == 1:
        return None
    return mpu.get_model_parallel_group()


def ranks_of(engine: Any) -> Ranks:
    """All ranks of the engine's run. Collective. Raises ValueError if an mpu's groups are no grid."""
    ranks = Ranks(engine.seq_data_parallel_group, peers_of(engine))
    expected = 1 if ranks.peers is None else engine.mpu.get_model_parallel_world_size()
    if ranks.parts != expected or len({*ranks.numbers}) != ranks.size:
        raise ValueError(
            f"deepspeed.initialize: received an mpu whose groups hold the ranks {ranks.numbers} for a model "
            f"parallel size of {expected}, allowed: every rank once, in as many parts as the size says"
        )
    return ranks


def _pipeline_stages(mpu: Any) -> int:
    for name in ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1


def _refuse_beside_peers(engine: Any) -> None:
    """Refuse what does not work if the model is split over ranks."""
    by_autotp = engine.autotp_size() > 1
    size = engine.mpu.get_model_parallel_world_size()
    where = (
        f"with tensor_parallel.autotp_size {size}"
        if by_autotp
        else f"with an mpu of model parallel size {size}"
    )
    ds_config.refuse_beside_peers(engine._config.ds_fp8, engine._config._param_dict, where)
    if engine.zero_optimization_partition_weights():
        raise refusal("zero_optimization.stage", 3, f"1, 2 {where}")
    if engine.sequence_parallel_size > 1:
        raise refusal(SEQUENCE_SIZE, engine.sequence_parallel_size, f"1 {where}")
    adapted = [name for name, each in engine.module.named_modules() if _is_adapter(each)]
    if by_autotp and adapted:
        raise ValueError(
            f"{naming(adapted)}: received adapters of PEFT, allowed {where}: none (AutoTP splits the layers "
            "that they wrap, and not them)"
        )


def _is_adapter(module: torch.nn.Module) -> bool:
    return any(each.__module__.startswith("peft.tuners.") for each in type(module).__mro__)


def _refuse_sequence_parallel_size(engine: Any) -> None:
    """The size must be the mpu's; gradients must be added over all ranks."""
    size = engine.sequence_parallel_size
    if engine.mesh_device is not None and size > 1:
        raise refusal("mesh_device", f"a mesh with sequence_parallel {size}", ds_config.MESH_INSTEAD)
    wanted = engine._config._param_dict.get(SEQUENCE_SIZE, size)
    if wanted != size:
        instead = "the mpu of UlyssesSPAttentionHF.register_with_transformers, given to deepspeed.initialize"
        raise refusal(SEQUENCE_SIZE, wanted, f"{size}, the size of {instead}; 1 without one")


def _refuse_slices(engine: Any) -> None:
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id") and not engine.zero_optimization_partition_weights():
            received = "slices, from deepspeed.zero.Init or an engine of ZeRO 3"
            raise refusal(name, received, "whole parameters under ZeRO 1 and 2, of a new model")


def accumulates_in_fp32(engine: Any) -> bool:
    """Whether the micro-steps of ZeRO 1 add up in FP32, whatever the model's dtype."""
    asked = engine._config.grad_accum_dtype is not None and engine.zero_optimization_stage() == 1
    return asked and engine.get_data_types()[1] is torch.float32


def _refuse_accumulation_dtype(engine: Any, recipe: Recipe) -> None:
    model_dtype, wanted = engine.get_data_types()
    if engine.zero_optimization_stage() == 1:
        allowed = {model_dtype, torch.float32}
    else:
        # A second micro-step turns the reduced gradient FP32 unless the section says otherwise.
        allowed = {torch.float32 if recipe.promote else recipe.reduced.dtype}
    if engine._config.grad_accum_dtype is not None and wanted not in allowed:
        where = ".grad under ZeRO 1, the reduced gradient, fp8.gradients.accum_dtype, under ZeRO 2 and 3"
        named = ", ".join(sorted(map(str, allowed)))
        raise refusal("data_types.grad_accum_dtype", str(wanted), f"{named} (of {where})")


def _refuse_weight_dtypes(module: torch.nn.Module, recipe: Recipe) -> None:
    dtypes = weight_dtypes(recipe.master)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype not in dtypes:
            beside = f" beside a master {recipe.master.name}" if recipe.master.split else ""
            allowed = ", ".join(map(str, dtypes)) + beside
            raise refusal(f"dtype of {name}", str(parameter.dtype), allowed)


def settings_of(config: FP8Config, engine: Any) -> ZeroSettings:
    """The settings of the engine's config that the handler uses."""
    return ZeroSettings(
        stage=int(engine.zero_optimization_stage()),
        bucket_elements=int(engine.zero_reduce_bucket_size()),
        overlap=bool(engine.zero_overlap_comm()),
        gradient_clipping=float(engine.gradient_clipping()),
        average=bool(engine.gradient_average),
        sequence_parallel_size=int(engine.sequence_parallel_size),
        micro_steps=int(engine.gradient_accumulation_steps()),
        accumulate_in_fp32=accumulates_in_fp32(engine),
        counts_replicated=peers_of(engine) is None or engine.mpu.get_model_parallel_rank() == 0,
        max_consecutive_skips=config.max_consecutive_skips,
        # DeepSpeed's zero_to_fp32.py reads no model that is split over ranks.
        save_fp32_master=config.checkpoint.fp32_master and peers_of(engine) is None,
        masters_in_model_files=config.checkpoint.weights == "masters",
        stats_interval=config.stats.interval,
        offload=offload_from(config, engine._config.zero_config),
    )
