"""What becomes of the rest of a ds_config when FP8 is on.

Every top-level key and every field of "zero_optimization" is honoured, is without effect here (and
then said so), or is refused by name. A key that the tables lack is refused too: better an error
than a setting that silently does something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_fp8.config import refusal, show


@dataclass(frozen=True)
class Honoured:
    """Does what DeepSpeed's documentation says."""


@dataclass(frozen=True)
class NoEffect:
    """Accepted; asks for something that FP8 has no use for."""

    why: str


@dataclass(frozen=True)
class Refused:
    """Accepted only with a value that asks for nothing."""

    why: str
    harmless: tuple[Any, ...] = ()  # besides a section that says "enabled": false

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, Mapping):
            return any(value == each for each in self.harmless)
        switched_off = value.get("enabled", value != {}) is False
        return switched_off or any(_contains(value, each) for each in self.harmless if each)

    def allowed(self, value: Any) -> str:
        off = ['{"enabled": false}'] if isinstance(value, Mapping) and "enabled" in value else []
        return ", ".join(["the key left out", *off, *map(show, self.harmless)])


def _contains(section: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    return all(section.get(key) == value for key, value in part.items())


Rule = Honoured | NoEffect | Refused

HONOURED = Honoured()
OWN_DTYPES = NoEffect("dtypes of states and gradients are those of the fp8 section")
OTHER_OPTIMIZER = NoEffect("FP8AdamW replaces the optimizer")
ONLY_ZERO3 = NoEffect("a key of ZeRO 3")
NOT_WITH_FP8 = "does not work with fp8 enabled"
NOT_YET = "is not built yet with fp8 enabled"

TOP_LEVEL: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "optimizer",
            "scheduler",
            "bf16",
            "bfloat16",
            "fp8",
            "zero_optimization",
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "dataloader_drop_last",
            "disable_python_gc",
            "activation_checkpointing",
            "flops_profiler",
            "comms_logger",
            "tensorboard",
            "csv_monitor",
            "wandb",
            "comet",
            "log_level",
            "timers",
            "autotuning",
            "vocabulary_size",
            "data_efficiency",
        ),
        HONOURED,
    ),
    "msamp": NoEffect("MS-AMP's section, switched off"),
    "zero_allow_untested_optimizer": OTHER_OPTIMIZER,
    "zero_force_ds_cpu_optimizer": OTHER_OPTIMIZER,
    "aio": NoEffect("nothing is offloaded"),
    "seq_parallel_communication_data_type": NoEffect("there is no sequence parallelism"),
    "use_data_before_expert_parallelism": NoEffect("there are no experts"),
    "fp16": Refused(NOT_YET),
    "torch_autocast": Refused(NOT_WITH_FP8),
    "communication_data_type": Refused("is fp8.gradients.dtype with fp8 enabled", (None,)),
    "prescale_gradients": Refused(NOT_YET, (False,)),
    "gradient_predivide_factor": Refused(NOT_YET, (1, 1.0)),
    "gradient_allreduce_op": Refused(NOT_YET, ("mean",)),
    "managed_gradient_accumulation": Refused(NOT_YET, (True,)),
    "disable_allgather": Refused(NOT_WITH_FP8, (False,)),
    "data_types": Refused(NOT_YET, ({},)),
    "compile": Refused(NOT_YET, ({}, {"deepcompile": False})),
    "checkpoint": Refused(NOT_YET, ({}, {"load_universal": False})),
    "datastates_ckpt": Refused(NOT_YET),
    "hybrid_engine": Refused(NOT_WITH_FP8),
    "pipeline": Refused(NOT_WITH_FP8, ({},)),
    "tensor_parallel": Refused(NOT_WITH_FP8, ({}, {"autotp_size": 0})),
    "expert_parallel": Refused(NOT_WITH_FP8),
    "sequence_parallel_size": Refused(NOT_WITH_FP8, (1,)),
    "data_parallel_size": Refused(NOT_WITH_FP8),
    "weight_quantization": Refused(NOT_WITH_FP8),
}

ZERO: dict[str, Rule] = {
    "stage": HONOURED,
    "reduce_bucket_size": HONOURED,
    "contiguous_gradients": NoEffect("gradients are packed into the message that travels"),
    "reduce_scatter": NoEffect("gradients go to their owners by all-to-all"),
    "use_multi_rank_bucket_allreduce": NoEffect("gradients go to their owners by all-to-all"),
    "allgather_partitions": NoEffect("weights are gathered a bucket at a time"),
    "allgather_bucket_size": NoEffect("weights are gathered a bucket at a time"),
    "overlap_comm": NoEffect("exchange and backward do not overlap yet"),
    "compute_grad_norm": NoEffect("the norm decides whether a step is skipped and is always computed"),
    "load_from_fp32_weights": NoEffect("masters are restored as they were saved"),
    "ignore_unused_parameters": NoEffect("unused parameters count as zero gradients"),
    "legacy_stage1": Refused(NOT_WITH_FP8, (False,)),
    "round_robin_gradients": Refused(NOT_WITH_FP8, (False,)),
    "parameter_alignment": Refused(NOT_WITH_FP8, (False,)),
    "elastic_checkpoint": Refused(NOT_WITH_FP8, (False,)),
    "offload_param": Refused(NOT_YET, (None, {"device": "none"})),
    "offload_optimizer": Refused(NOT_YET, (None, {"device": "none"})),
    "cpu_offload": Refused(NOT_YET, (None, False)),
    "cpu_offload_param": Refused(NOT_YET, (None, False)),
    "cpu_offload_use_pin_memory": Refused(NOT_YET, (None, False)),
    "zenflow": Refused(NOT_WITH_FP8, (None,)),
    "zero_hpz_partition_size": Refused(NOT_WITH_FP8, (1,)),
    "zero_quantized_weights": Refused(NOT_WITH_FP8, (False,)),
    "zero_quantized_nontrainable_weights": Refused(NOT_WITH_FP8, (False,)),
    "zero_quantized_gradients": Refused(NOT_WITH_FP8, (False,)),
    "enable_sanity_checks": NoEffect("the handler has checks of its own"),
    "save_muon_momentum_buffer_in_memory": OTHER_OPTIMIZER,
    **dict.fromkeys(
        (
            "sub_group_size",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "stage3_gather_fp16_weights_on_model_save",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "leaf_module",
        ),
        ONLY_ZERO3,
    ),
}

BF16: dict[str, Rule] = {
    "enabled": HONOURED,
    "immediate_grad_update": NoEffect("a key of DeepSpeed's BF16 optimizer"),
    "check_grad_overflow": NoEffect("non-finite gradients are always looked for"),
    "bf16_master_weights_and_grads": Refused("is fp8.optimizer.master_dtype with fp8 enabled", (False,)),
    "bf16_optimizer_states": Refused("is fp8.optimizer.exp_avg_dtype with fp8 enabled", (False,)),
}

OPTIMIZER_TYPES = ("Adam", "AdamW", "FP8AdamW")
STAGES = (1, 2)


def check(ds_config: Mapping[str, Any]) -> list[str]:
    """Refuse, by a ValueError, what does not go with FP8; the keys that have no effect are returned."""
    idle = _apply(TOP_LEVEL, ds_config, prefix="")
    zero = _section(ds_config, "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        raise refusal("zero_optimization.stage", stage, "1, 2 with fp8 enabled")
    idle += _apply(ZERO, zero, prefix="zero_optimization.")
    for section in ("bf16", "bfloat16"):
        idle += _apply(BF16, _section(ds_config, section), prefix=f"{section}.")
    _check_optimizer(_section(ds_config, "optimizer"))
    return idle


def _section(ds_config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = ds_config.get(name, {})
    if not isinstance(section, Mapping):
        raise refusal(name, section, "an object")
    return section


def _apply(rules: Mapping[str, Rule], section: Mapping[str, Any], prefix: str) -> list[str]:
    idle = []
    for key, value in section.items():
        path, rule = prefix + key, rules.get(key)
        if rule is None:
            raise refusal(path, value, "the key left out (ds_fp8 does not know it)")
        if isinstance(rule, Refused) and not rule.accepts(value):
            raise refusal(path, value, f"{rule.allowed(value)} ({key} {rule.why})")
        if isinstance(rule, NoEffect):
            idle.append(f"{path} ({rule.why})")
    return idle


def _check_optimizer(section: Mapping[str, Any]) -> None:
    allowed = [each.lower() for each in OPTIMIZER_TYPES]
    kind = section.get("type")
    if kind is not None and str(kind).lower() not in allowed:
        raise refusal("optimizer.type", kind, f"{', '.join(OPTIMIZER_TYPES)} with fp8 enabled")
