"""The hyperparameters of a param group: their allowed values, and the factors of a sweep."""

import math
from typing import Any

from ds_fp8.config.refusals import show
from ds_fp8.ops.adam import AdamScalars, next_clamp

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode")
LEAST_LR = -1e-12  # a scheduler's last learning rate may lie a little below 0, as torch's may
ZERO_IN_FP32 = 2.0**-150  # the largest number that FP32 rounds to 0
UNSUPPORTED_FLAGS = ("amsgrad", "maximize", "differentiable")


def betas_of(group: dict[str, Any]) -> tuple[float, float]:
    return float(group["betas"][0]), float(group["betas"][1])


def scalars_of(
    group: dict[str, Any], step: int, clamp_square: float | None, *, clamp: bool
) -> tuple[AdamScalars, float]:
    """The factors of a step, and the square of its clamp. clamp_square: of the last step."""
    beta1, beta2 = betas_of(group)
    square = next_clamp(clamp_square, (beta1, beta2))
    scalars = AdamScalars(
        step=step,
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=group["adam_w_mode"],
        bias_correction=group["bias_correction"],
        clamp=math.sqrt(square) if clamp and math.isfinite(square) else None,
    )
    return scalars, square


def check_group(group: dict[str, Any]) -> None:
    """Refuse hyperparameters that the sweep cannot compute with, by name."""
    for flag in UNSUPPORTED_FLAGS:
        if group.get(flag):
            raise ValueError(f"optimizer.params.{flag}: received True, allowed: false")
    for name, least in (("lr", LEAST_LR), ("weight_decay", 0.0)):
        value = float(group[name])
        if not value >= least:
            raise ValueError(f"optimizer.params.{name}: received {value}, allowed: 0 or more")
    if not float(group["eps"]) > ZERO_IN_FP32:
        raise ValueError(f"optimizer.params.eps: received {group['eps']}, allowed: more than 0 in FP32")
    check_betas(group)


def check_betas(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.params.betas: received {show(betas)}, allowed: two numbers in [0, 1)")
