"""The seam into DeepSpeed: what its engine does differently when the config enables FP8.

Each replacement calls the original whenever FP8 is off. `registration` puts them in place.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import comm as dist

import ds_fp8
from ds_fp8.compat import ZERO_OPTIMIZATION, loss_scaler_of, timers_of
from ds_fp8.config import ds_config
from ds_fp8.config.refusals import as_json, refusal
from ds_fp8.config.section import FP8Config
from ds_fp8.seam.backward import divisor
from ds_fp8.seam.status import accumulating, banner, idle, is_active, write_events
from ds_fp8.zero_fp8.comm.agreement import agreed, check_agreement
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer
from ds_fp8.zero_fp8.handlers.fetching import Offload
from ds_fp8.zero_fp8.handlers.stage3 import Stage3Optimizer
from ds_fp8.zero_fp8.handlers.stage12 import Stage12Optimizer
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.optimizer.replacement import replace_optimizer
from ds_fp8.zero_fp8.placement.parameters import shape_of
from ds_fp8.zero_fp8.placement.ranks import NODE_SIZE, SEQUENCE_SIZE, check_divides
from ds_fp8.zero_fp8.products.chosen import choose
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings, offload_from, recipe_of, weight_dtypes

logger = logging.getLogger("ds_fp8")

Method = Callable[..., Any]
AGREED_KEYS = (
    "fp8",
    "bf16",
    "fp16",
    "zero_optimization",
    "data_types",
    "torch_autocast",
    "sequence_parallel_size",
    "optimizer",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
)


def _fp8(engine: Any) -> FP8Config | None:
    """The engine's section, if it is enabled."""
    config: FP8Config | None = getattr(engine._config, "ds_fp8", None)
    return config if config is not None and config.enabled else None


def configure_distributed_model(original: Method) -> Method:
    """DeepSpeedEngine._configure_distributed_model: first see that the ranks agree about it."""

    @functools.wraps(original)
    def method(self: Any, model: Any) -> None:
        if _fp8(self) is not None and ds_config.never_trains(self._config._param_dict):
            logger.info("%s", idle(self))
        lines = _config_and_model(self, model) if _fp8(self) is not None else ["fp8 off"]
        check_agreement("config or model", lines, torch.device(self.device), dist.get_world_group())
        original(self, model)

    return method


def _config_and_model(engine: Any, model: torch.nn.Module) -> list[str]:
    """What must be the same on all ranks, one line per key and parameter."""
    section = engine._config._param_dict
    config = [f'ds_config "{key}": {as_json(section[key])}' for key in AGREED_KEYS if key in section]
    trained = [
        f"{name}: {list(shape_of(each))}, {each.dtype}, {'trained' if each.requires_grad else 'frozen'}"
        for name, each in model.named_parameters()
    ]
    return [*config, *trained]


def scheduler_from_config(original: Method) -> Method:
    """DeepSpeedEngine._scheduler_from_config: torch's schedulers want a torch optimizer."""

    @functools.wraps(original)
    def method(self: Any, optimizer: Any) -> Any:
        return original(self, optimizer.optimizer if is_active(self) else optimizer)

    return method


def configure_basic_optimizer(original: Method) -> Method:
    """DeepSpeedEngine._configure_basic_optimizer: FP8AdamW from the "optimizer" section."""

    @functools.wraps(original)
    def method(self: Any, model_parameters: Any) -> Any:
        if _fp8(self) is None:
            return original(self, model_parameters)
        params = ds_config.optimizer_params(self.optimizer_params() or {})
        decoupled = self.optimizer_name() == "adamw" or params.adam_w_mode
        # The default of DeepSpeed's fused Adam is no decay; that of torch's AdamW is .01.
        default_decay = 0.01 if params.torch_adam and decoupled else 0.0
        return FP8AdamW(
            model_parameters,
            lr=params.lr,
            betas=(params.betas[0], params.betas[1]),
            eps=params.eps,
            weight_decay=default_decay if params.weight_decay is None else params.weight_decay,
            bias_correction=params.bias_correction,
            adam_w_mode=decoupled,
        )

    return method


def do_optimizer_sanity_check(original: Method) -> Method:
    """DeepSpeedEngine._do_optimizer_sanity_check: stage 1 and 2 alike go to the ZeRO handler."""

    @functools.wraps(original)
    def method(self: Any, basic_optimizer: Any) -> Any:
        if _fp8(self) is not None:
            ds_config.check_trained(self._config._param_dict)
            return ZERO_OPTIMIZATION
        logger.info('ds_fp8 %s: OFF, this engine\'s config has no enabled "fp8" section', ds_fp8.__version__)
        return original(self, basic_optimizer)

    return method


def zero_force_ds_cpu_optimizer(original: Method) -> Method:
    """DeepSpeedEngine.zero_force_ds_cpu_optimizer: with offload, too, any Adam of a client will do."""

    @functools.wraps(original)
    def method(self: Any) -> Any:
        return False if _fp8(self) is not None else original(self)

    return method


def configure_zero_optimizer(original: Method) -> Method:
    """DeepSpeedEngine._configure_zero_optimizer: our handler instead of DeepSpeed's."""

    @functools.wraps(original)
    def method(self: Any, optimizer: Any) -> Any:
        config = _fp8(self)
        if config is None:
            return original(self, optimizer)
        if optimizer is None and ds_config.may_be_frozen(self._config._param_dict):
            logger.info("%s", idle(self))
            return original(self, optimizer)
        ranks = dist.get_world_size(self.seq_data_parallel_group)
        recipe = recipe_of(config, accumulating=accumulating(self), ranks=ranks)
        check_engine(self, recipe)
        self.basic_optimizer = replace_optimizer(optimizer)
        self.optimizer = handler_of(self, recipe, settings_of(config, self))
        self.optimizer.join(functools.partial(members, self), functools.partial(divisor, self), optimizer)
        self.optimizer.parts.health.listeners.append(functools.partial(write_events, self))
        logger.info("%s", banner(self))
        if self._config.ds_fp8_idle_keys:
            logger.info("without effect with fp8: %s", "; ".join(self._config.ds_fp8_idle_keys))
        return self.optimizer

    return method


def handler_of(engine: Any, recipe: Recipe, settings: ZeroSettings) -> FP8ZeROOptimizer:
    """The handler of the engine's ZeRO stage."""
    timers = timers_of(engine)
    what = (engine.basic_optimizer, engine.param_names, recipe, settings, engine.seq_data_parallel_group)
    section, device = engine._config.ds_fp8, torch.device(engine.device)
    choice = None
    if section.has_codes:
        choice = agreed(lambda: choose(engine.module, section, device), engine.seq_data_parallel_group)
    if settings.stage == 3:
        offload = functools.partial(offload_of, engine, timers)
        return Stage3Optimizer(*what, timers, loss_scaler_of(engine), offload)
    return Stage12Optimizer(*what, timers, loss_scaler_of(engine), choice=choice)


def offload_of(engine: Any, timers: Any) -> Offload:
    """DeepSpeed's fetching, as the engine's config has it; the model's parameters are converted."""
    return Offload(
        module=engine.module,
        timers=timers,
        ds_config=engine.config,
        overlap_comm=engine.zero_overlap_comm(),
        prefetch_bucket_size=engine.zero_prefetch_bucket_size(),
        max_reuse_distance=engine.zero_max_reuse_distance(),
        max_live_parameters=engine.zero_max_live_parameters(),
        param_persistence_threshold=engine.zero_param_persistence_threshold(),
        model_persistence_threshold=engine.zero_model_persistence_threshold(),
        dp_process_group=engine.seq_data_parallel_group,
        mpu=engine.mpu,
        zero_module_granularity_threshold=engine.zero_module_granularity_threshold(),
        log_trace_cache_warnings=engine.zero_log_trace_cache_warnings(),
    )


def members(engine: Any) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of the engine's module as it is now."""
    named: Iterable[tuple[str, torch.nn.Parameter]] = engine.module.named_parameters()
    return named


def settings_of(config: FP8Config, engine: Any) -> ZeroSettings:
    """The part of the engine's config that the handler obeys."""
    return ZeroSettings(
        stage=int(engine.zero_optimization_stage()),
        bucket_elements=int(engine.zero_reduce_bucket_size()),
        overlap=bool(engine.zero_overlap_comm()),
        gradient_clipping=float(engine.gradient_clipping()),
        average=bool(engine.gradient_average),
        sequence_parallel_size=int(engine.sequence_parallel_size),
        micro_steps=int(engine.gradient_accumulation_steps()),
        accumulate_in_fp32=accumulates_in_fp32(engine),
        max_consecutive_skips=config.max_consecutive_skips,
        save_fp32_master=config.checkpoint.fp32_master,
        masters_in_model_files=config.checkpoint.weights == "masters",
        stats_interval=config.stats.interval,
        offload=offload_from(config, engine._config.zero_config),
    )


def check_engine(engine: Any, recipe: Recipe) -> None:
    """Refuse, before anything is allocated, what only the model shows. Raises ValueError."""
    refused = {
        "a PipelineModule": engine.pipeline_parallelism,
        "a model with MoE layers": engine.has_moe_layers,
        "an mpu (model parallelism)": engine.mpu is not None and not _is_sequence_parallel(engine.mpu),
    }
    for what, present in refused.items():
        if present:
            allowed = "data parallelism, and the mpu of UlyssesSPAttentionHF (sequence parallelism)"
            raise ValueError(f"deepspeed.initialize: received {what}, allowed with fp8: {allowed}")
    _refuse_sequence_parallel_size(engine)
    ranks = dist.get_world_size(engine.seq_data_parallel_group)
    check_divides(NODE_SIZE, recipe.intra_node_size, ranks)
    _refuse_accumulation_dtype(engine, recipe)
    for module_name, module in engine.module.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            raise refusal(f"{module_name}.sparse", True, "false with fp8 enabled")
    _refuse_weight_dtypes(engine.module, recipe)
    _refuse_slices(engine)


def _is_sequence_parallel(mpu: Any) -> bool:
    """Whether an mpu splits sequences only, as DeepSpeed tells: every rank holds all parameters."""
    return hasattr(mpu, "initialize_sequence_parallel")


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
