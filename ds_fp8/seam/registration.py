"""register() and unregister(): put the seam into DeepSpeed's classes, and take it out again.

The methods are replaced in place and not on subclasses: a subclass bound to `deepspeed.DeepSpeedEngine`
would make `isinstance` false for engines of the original class, on which accelerate relies.
"""

import atexit
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch.nn import functional

from ds_fp8 import builds
from ds_fp8.compat import (
    ALL_OPS,
    DeepSpeedConfig,
    DeepSpeedEngine,
    Init,
    OpBuilder,
    check_autograd,
    check_signatures,
    partition_parameters,
    warn_of_newer_torch,
)
from ds_fp8.config import auto
from ds_fp8.ops.op_builders import FP8CPUBuilder, FP8TritonBuilder
from ds_fp8.seam import backward, engine, engine_checks, loading, model_file, saving
from ds_fp8.zero_fp8.weights.sliced import codes, slices

logger = logging.getLogger("ds_fp8")

GLOO_SECONDS = 0.2


@dataclass(frozen=True)
class Patch:
    """One attribute of a foreign class or module, replaced, and the original to put back."""

    owner: Any
    name: str
    original: Any

    @staticmethod
    def apply(owner: Any, name: str, make: Callable[[Any], Any]) -> "Patch":
        original = vars(owner)[name]
        setattr(owner, name, make(original))
        return Patch(owner, name, original)

    def undo(self) -> None:
        setattr(self.owner, self.name, self.original)


SEAM = (
    (DeepSpeedConfig, "_initialize_params", engine_checks.initialize_params),
    (Init, "__init__", auto.zero_init),
    (DeepSpeedEngine, "_configure_distributed_model", engine.configure_distributed_model),
    (DeepSpeedEngine, "_configure_basic_optimizer", engine.configure_basic_optimizer),
    (DeepSpeedEngine, "_do_optimizer_sanity_check", engine.do_optimizer_sanity_check),
    (DeepSpeedEngine, "_configure_zero_optimizer", engine.configure_zero_optimizer),
    (DeepSpeedEngine, "zero_force_ds_cpu_optimizer", engine.zero_force_ds_cpu_optimizer),
    (DeepSpeedEngine, "_scheduler_from_config", engine.scheduler_from_config),
    (DeepSpeedEngine, "backward", backward.backward),
    (DeepSpeedEngine, "_backward_prologue", backward.backward_prologue),
    (DeepSpeedEngine, "_backward_prologue_per_tensor", backward.backward_prologue_per_tensor),
    (DeepSpeedEngine, "_backward_epilogue", backward.backward_epilogue),
    (DeepSpeedEngine, "zero_grad", backward.zero_grad),
    (DeepSpeedEngine, "save_checkpoint", saving.save_checkpoint),
    (DeepSpeedEngine, "load_checkpoint", loading.load_checkpoint),
    (DeepSpeedEngine, "module_state_dict", model_file.module_state_dict),
    (DeepSpeedEngine, "_consolidated_16bit_state_dict", engine.consolidated_16bit_state_dict),
    (DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict", engine.zero3_consolidated),
    (DeepSpeedEngine, "save_16bit_model", engine.save_16bit_model),
    (OpBuilder, "jit_load", builds.jit_load),
)

# What outlives unregister(): it concerns only parameters that an engine of ours has cut, which would be cut
# and multiplied wrongly without it.
LASTING = (
    (Init, "_padding_size", slices.aligned),
    (partition_parameters, "zero3_linear_wrap", codes.beside_codes),
)

BUILDERS = {each.__name__: each for each in (FP8CPUBuilder, FP8TritonBuilder)}

_patches: list[Patch] = []
_lasting: list[Patch] = []


def register() -> None:
    """Make DeepSpeed read the "fp8" section of its config.

    Call it before `deepspeed.initialize`; an engine that exists already ignores its section, and a warning
    says so. Calling it again changes nothing.

    Raises:
        RuntimeError: the installed DeepSpeed is not one that ds_fp8 is tested with, or its methods or torch's
            autograd differ from what ds_fp8 relies on.
    """
    if _patches:
        return
    check_signatures()
    check_autograd()
    _set_up_log()
    if _rank() == 0:
        warn_of_newer_torch(version("torch"))
    if any(issubclass(type(each), DeepSpeedEngine) for each in gc.get_objects()):
        logger.warning(
            "register() came after a DeepSpeed engine was built; that engine ignores its fp8 section. "
            "Call register() before deepspeed.initialize()"
        )
    _patches.extend(Patch.apply(*place) for place in SEAM)
    if not _lasting:
        _lasting.extend(Patch.apply(*place) for place in LASTING)
        if functional.linear is _lasting[-1].original:  # zero.Init was here before
            functional.linear = partition_parameters.zero3_linear_wrap
    _show_builders()
    _quiet_gathers()
    atexit.register(_let_gloo_finish)


def unregister() -> None:
    """Restore DeepSpeed's own methods. Raises nothing.

    Engines that exist continue as they are, and so does the way in which a ZeRO 3 engine cuts its parameters.
    """
    while _patches:
        _patches.pop().undo()
    for builder in BUILDERS.values():
        ALL_OPS.pop(builder.NAME, None)
    atexit.unregister(_let_gloo_finish)


def _quiet_gathers() -> None:
    """Torch 2.13 and 2.14 warn of the call by which DeepSpeed gathers tensors, ours among them."""
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.all_gather_into_tensor` is deprecated",
        FutureWarning,
        r"(torch|deepspeed)\.",
    )


def _let_gloo_finish() -> None:
    """Wait at exit: gloo's threads drop the tensors of the last collective after it has returned.

    One that comes to it when the interpreter is ending aborts the process (torch 2.13, Python before 3.14),
    and DeepSpeed keeps groups, and so their threads, alive beyond `destroy_process_group`.
    """
    if get_accelerator().communication_backend_name() == "gloo":
        time.sleep(GLOO_SECONDS)


def _show_builders() -> None:
    """To the accelerator's lookup by class name, and to the op report."""

    def with_ours(find: Callable[[Any, str], Any], ours: Callable[[str], Any]) -> Callable[[Any, str], Any]:
        return lambda self, name: ours(name) if name in BUILDERS else find(self, name)

    accelerator = type(get_accelerator())
    _patches.append(
        Patch.apply(accelerator, "get_op_builder", lambda find: with_ours(find, BUILDERS.__getitem__))
    )
    _patches.append(
        Patch.apply(
            accelerator, "create_op_builder", lambda find: with_ours(find, lambda name: BUILDERS[name]())
        )
    )
    ALL_OPS.update({builder.NAME: builder() for builder in BUILDERS.values()})


def _set_up_log() -> None:
    """Our own handler: Hugging Face mutes DeepSpeed's logger, and the banner must be seen."""
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or _rank() == 0)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
