"""The only door to DeepSpeed's private names.

Whatever ds_fp8 takes from inside DeepSpeed is imported here, after the version has been checked, and
the signatures that the seam relies on are compared with what they are expected to be.
"""

import functools
import inspect
import logging
import os
from importlib.metadata import version
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.19.5,<0.20")
TESTED_TORCH = Version("2.15")  # the newest whose patches the suite has passed on
OVERRIDE = "DS_FP8_ALLOW_UNTESTED_DEEPSPEED"

logger = logging.getLogger("ds_fp8")


def check_version(installed: str) -> None:
    """Refuse a DeepSpeed that the tests have not seen, or warn if the user insists."""
    if Version(installed).base_version in SUPPORTED:
        return
    sentence = f"ds_fp8 is tested with deepspeed{SUPPORTED}, installed is {installed}"
    if os.environ.get(OVERRIDE) != "1":
        raise RuntimeError(f"{sentence}; set {OVERRIDE}=1 to try it anyway")
    logger.warning("%s; continuing because %s=1", sentence, OVERRIDE)


@functools.cache
def warn_of_newer_torch(installed: str) -> None:
    """Say once that the tests have not seen this torch; it is used all the same."""
    if Version(installed).release[:2] > TESTED_TORCH.release:
        logger.warning(
            "ds_fp8 is tested with torch up to %s, installed is %s; if something fails, try torch<%s",
            TESTED_TORCH,
            installed,
            f"{TESTED_TORCH.major}.{TESTED_TORCH.minor + 1}",
        )


check_version(version("deepspeed"))

# After the check: another version may lack these names.
from deepspeed.ops.op_builder.all_ops import ALL_OPS  # noqa: E402
from deepspeed.ops.op_builder.builder import OpBuilder  # noqa: E402
from deepspeed.runtime.base_optimizer import ZeROOptimizer  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import (  # noqa: E402
    CreateLossScaler,
    DynamicLossScaler,
    LossScaler,
)
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config  # noqa: E402
from deepspeed.runtime.zero import partition_parameters  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402
from deepspeed.utils.tensor_fragment import fragment_address  # noqa: E402
from deepspeed.utils.timer import NoopTimer  # noqa: E402
from deepspeed.utils.torch import is_functorch_transforming  # noqa: E402

__all__ = [
    "ALL_OPS",
    "STATE_CLASSES",
    "ZERO_OPTIMIZATION",
    "CreateLossScaler",
    "DeepSpeedConfig",
    "DeepSpeedEngine",
    "DeepSpeedZeRoOffload",
    "DynamicLossScaler",
    "Init",
    "LossScaler",
    "NoopTimer",
    "OpBuilder",
    "ZeROOptimizer",
    "ZeroParamStatus",
    "check_autograd",
    "check_signatures",
    "check_version",
    "deepspeed_logger",
    "fragment_address",
    "is_functorch_transforming",
    "load_ds_config",
    "loss_scaler_of",
    "partition_parameters",
    "timers_of",
    "warn_of_newer_torch",
]

# What the optimizer files of DeepSpeed hold besides tensors and plain values.
STATE_CLASSES = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
LOAD_OPTIONS = (
    "load_module_strict",
    "load_optimizer_states",
    "load_lr_scheduler_states",
    "load_module_only",
    "custom_load_fn",
)
SIGNATURES: dict[tuple[Any, str], tuple[str, ...]] = {
    (DeepSpeedConfig, "_initialize_params"): ("self", "param_dict"),
    (OpBuilder, "jit_load"): ("self", "verbose"),
    (DeepSpeedEngine, "_configure_distributed_model"): ("self", "model"),
    (DeepSpeedEngine, "_scheduler_from_config"): ("self", "optimizer"),
    (DeepSpeedEngine, "_configure_basic_optimizer"): ("self", "model_parameters"),
    (DeepSpeedEngine, "_do_optimizer_sanity_check"): ("self", "basic_optimizer"),
    (DeepSpeedEngine, "_configure_zero_optimizer"): ("self", "optimizer"),
    (DeepSpeedEngine, "zero_force_ds_cpu_optimizer"): ("self",),
    (DeepSpeedEngine, "backward"): ("args", "kwargs"),  # DeepSpeed's profiling decorator hides the others
    (DeepSpeedEngine, "_backward_prologue"): ("self",),
    (DeepSpeedEngine, "_backward_prologue_per_tensor"): ("self", "grad"),
    (DeepSpeedEngine, "_backward_epilogue"): ("self",),
    (DeepSpeedEngine, "zero_grad"): ("self",),
    (DeepSpeedEngine, "save_checkpoint"): (
        "self",
        "save_dir",
        "tag",
        "client_state",
        "save_latest",
        "exclude_frozen_parameters",
    ),
    (DeepSpeedEngine, "_get_shared_params"): ("self",),
    (DeepSpeedEngine, "_get_ckpt_name"): (
        "self",
        "checkpoints_path",
        "tag",
        "mp_placeholder",
        "pp_placeholder",
    ),
    (DeepSpeedEngine, "_get_all_ckpt_names"): ("self", "checkpoints_path", "tag"),
    (DeepSpeedEngine, "_get_zero_ckpt_name"): ("self", "checkpoints_path", "tag"),
    (DeepSpeedZeRoOffload, "__init__"): (
        "self",
        "module",
        "timers",
        "ds_config",
        "zenflow",
        "overlap_comm",
        "prefetch_bucket_size",
        "max_reuse_distance",
        "max_live_parameters",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "dp_process_group",
        "offload_param_config",
        "mpu",
        "zero_param_parallel_group",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_module_granularity_threshold",
        "log_trace_cache_warnings",
    ),
    (DeepSpeedZeRoOffload, "post_sub_module_backward_function"): ("self", "sub_module"),
    (DeepSpeedZeRoOffload, "partition_all_parameters"): ("args", "kwargs"),
    (DeepSpeedZeRoOffload, "release_backward_leftovers"): ("self",),
    (DeepSpeedZeRoOffload, "empty_partition_cache"): ("self",),
    (DeepSpeedZeRoOffload, "destroy"): ("self",),
    (Init, "__init__"): (
        "self",
        "module",
        "data_parallel_group",
        "mem_efficient_linear",
        "remote_device",
        "pin_memory",
        "config_dict_or_path",
        "config",
        "enabled",
        "dtype",
        "mpu",
        "zero_param_parallel_group",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "sequence_data_parallel_group",
        "param_swapper",
        "tensor_overrides",
    ),
    (Init, "_padding_size"): ("self", "param"),
    (partition_parameters, "zero3_linear_wrap"): ("input", "weight", "bias"),
    (partition_parameters, "free_param"): ("args", "kwargs"),
    (DeepSpeedEngine, "module_state_dict"): (
        "self",
        "destination",
        "prefix",
        "keep_vars",
        "exclude_frozen_parameters",
    ),
    (DeepSpeedEngine, "_consolidated_16bit_state_dict"): ("self", "exclude_frozen_parameters"),
    (DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict"): ("self", "exclude_frozen_parameters"),
    (DeepSpeedEngine, "save_16bit_model"): (
        "self",
        "save_dir",
        "save_filename",
        "exclude_frozen_parameters",
    ),
    (DeepSpeedEngine, "load_checkpoint"): ("self", "load_dir", "tag", *LOAD_OPTIONS),
    (DeepSpeedEngine, "_load_checkpoint"): ("self", "load_dir", "tag", *LOAD_OPTIONS),
}


# What `gradients.backwards` asks autograd: private names that torch's own checkpointing and hooks use.
AUTOGRAD: tuple[tuple[Any, str], ...] = (
    (torch._C, "_current_graph_task_id"),
    (torch._C, "_current_autograd_node"),
    (torch._C, "_will_engine_execute_node"),
    (torch.autograd.Variable._execution_engine, "is_checkpoint_valid"),
)


def check_autograd(names: tuple[tuple[Any, str], ...] = AUTOGRAD) -> None:
    """Raise RuntimeError, naming it, if torch lacks what `gradients.backwards` calls."""
    for owner, name in names:
        if not callable(getattr(owner, name, None)):
            raise RuntimeError(
                f"torch {torch.__version__}: ds_fp8 needs autograd's {name}, which is not there"
            )


def check_signatures(signatures: dict[tuple[Any, str], tuple[str, ...]] = SIGNATURES) -> None:
    """Raise RuntimeError, naming the method, if DeepSpeed's differ from what the seam expects."""
    for (owner, name), expected in signatures.items():
        method: Any = getattr(owner, name, None)
        names = tuple(inspect.signature(method).parameters) if method else None
        if names != expected:
            received = f"({', '.join(names)})" if names else "no such method"
            raise RuntimeError(
                f"deepspeed {version('deepspeed')}: {owner.__name__}.{name}: expected "
                f"({', '.join(expected)}), found {received}"
            )


def timers_of(engine: Any) -> Any:
    """DeepSpeed's timers, if they are on."""
    return engine.timers if engine.wall_clock_breakdown() else NoopTimer()


def loss_scaler_of(engine: Any) -> Any:
    """DeepSpeed's loss scaler for the engine's config."""
    return CreateLossScaler(
        torch.float16 if engine.fp16_enabled() else torch.float32,
        static_loss_scale=engine.loss_scale(),
        dynamic_scaling=engine.dynamic_loss_scale(),
        dynamic_loss_args=engine.dynamic_loss_scale_args(),
    )
