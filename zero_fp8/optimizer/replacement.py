"""FP8AdamW in place of the Adam that a client gave to `deepspeed.initialize`."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from ds_fp8.config.refusals import show
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW

logger = logging.getLogger("ds_fp8")


def replace_optimizer(optimizer: Any) -> FP8AdamW:
    """FP8AdamW with the very param_groups of a client's Adam, so that its schedulers keep working.

    Raises ValueError for an optimizer of another type and for one that has stepped already.
    """
    if type(optimizer) is FP8AdamW:
        _refuse_used_alone(optimizer)
        return optimizer
    decoupled: dict[type, Callable[[dict[str, Any]], bool]] = {
        torch.optim.AdamW: lambda _: True,
        torch.optim.Adam: lambda group: bool(group.get("decoupled_weight_decay")),
        FusedAdam: lambda _: bool(optimizer.adam_w_mode),
        DeepSpeedCPUAdam: lambda _: bool(optimizer.adam_w_mode),
    }
    if type(optimizer) not in decoupled:
        known = "torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam, ds_fp8.FP8AdamW"
        received = (
            "none" if not isinstance(optimizer, torch.optim.Optimizer) else type(optimizer).__qualname__
        )
        raise ValueError(f"optimizer: received {received}, allowed with fp8: {known}")
    _refuse_stepped(optimizer)
    for group in optimizer.param_groups:
        group["adam_w_mode"] = decoupled[type(optimizer)](group)
    replaced = FP8AdamW(optimizer.param_groups)
    if type(optimizer) is DeepSpeedCPUAdam:
        logger.info(
            "FP8AdamW replaces DeepSpeedCPUAdam, for which cpu_adam was compiled needlessly; "
            'if accelerate made it, "zero_force_ds_cpu_optimizer": false saves that'
        )
    optimizer._opt_called = True  # or a scheduler made with it warns that it was never stepped
    return replaced


def _refuse_used_alone(optimizer: FP8AdamW) -> None:
    _refuse_stepped(optimizer)
    if optimizer.fp8 is not None:
        raise ValueError(
            f"FP8AdamW(fp8=...): received {show(optimizer.fp8)}, allowed with DeepSpeed: none; the formats "
            'are those of the "fp8" section of its config'
        )


def _refuse_stepped(optimizer: Any) -> None:
    if optimizer.state:
        raise ValueError("optimizer: received one that has stepped already, allowed: one without state")
