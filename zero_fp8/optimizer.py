"""FP8AdamW: the hyperparameters of a run in DeepSpeed, and an optimizer of its own without it.

It is a real `torch.optim.Optimizer`, so that learning-rate schedulers accept it. Under ZeRO it holds no
state: the states live in shards, whose blocks follow the partition and not the parameters, and it
shares the `param_groups` dicts of the optimizer that it replaces; with copies a scheduler would go on
writing to dicts that nobody reads. Alone, `step` sweeps each parameter with the same kernels
(`alone.py`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_fp8.config import SECTION, FP8Config, parse
from ds_fp8.ops.adam import AdamScalars, next_clamp
from ds_fp8.refusals import refusal, show
from ds_fp8.zero_fp8.alone import States
from ds_fp8.zero_fp8.recipe import recipe_of

logger = logging.getLogger("ds_fp8")

UNSUPPORTED_FLAGS = ("amsgrad", "maximize", "differentiable")


class FP8AdamW(torch.optim.Optimizer):
    """Adam or AdamW over FP8 states.

    lr, betas, eps, weight_decay, bias_correction: as in DeepSpeed's FusedAdam. adam_w_mode: decoupled
    weight decay (AdamW) where true, L2 (Adam) where false. fp8: for use without DeepSpeed, formats of the
    states as in the "fp8" section of a ds_config (opt_level, block_size, optimizer); O2 where left out.
    Raises ValueError for a value out of range and for amsgrad, maximize and differentiable.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        fp8: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
        }
        self.steps = 0
        self.clamp_squares: list[float | None] = []
        self.fp8 = fp8
        config = parse({SECTION: {**(fp8 or {}), "enabled": True}})
        assert isinstance(config, FP8Config)
        if config.scaling != "block":
            raise refusal(f"{SECTION}.scaling", config.scaling, '"block" for an FP8AdamW without DeepSpeed')
        self._alone = States(recipe_of(config))
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        self.clamp_squares.append(None)

    # Without DeepSpeed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient, without DeepSpeed.

        The states of a parameter are made at its first step, its master from its weight. A gradient that
        is not finite spoils the states, as in torch: clip and check before.
        Raises ValueError for a parameter or gradient that the kernels cannot take.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    self._alone.prepare(state, parameter)
                    scalars, state["clamp_square"] = _scalars(
                        group, state["step"] + 1, state["clamp_square"], clamp=self._alone.recipe.clamped
                    )
                    state["step"] += 1
                    self._alone.sweep(state, parameter, index, scalars)
                index += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, the states as bytes; "fp8" says what they are."""
        return {**super().state_dict(), "fp8": self._alone.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, byte for byte.

        Raises ValueError, before anything is changed, where formats or shapes differ.
        """
        parameters = [each for group in self.param_groups for each in group["params"]]
        self._alone.check(state_dict, parameters)
        # torch casts states to the dtype of their parameter: not ours.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, saved in state_dict["state"].items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                key: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }

    # Under ZeRO

    def scalars(self, *, clamp: bool) -> list[AdamScalars]:
        """What the next step multiplies with, one set a param group; `advance` counts the step."""
        pairs = zip(self.param_groups, self.clamp_squares, strict=True)
        return [_scalars(group, self.steps + 1, square, clamp=clamp)[0] for group, square in pairs]

    def advance(self, *, clamp: bool) -> None:
        """Count a step."""
        self.steps += 1
        self._opt_called = True  # what a scheduler asks before it steps
        squares = [
            next_clamp(square, _betas(group))
            for square, group in zip(self.clamp_squares, self.param_groups, strict=True)
        ]
        for index, (before, after) in enumerate(zip(self.clamp_squares, squares, strict=True)):
            if clamp and after == math.inf != before:
                betas = _betas(self.param_groups[index])
                logger.info("clamp off for param group %d: beta1^2 >= beta2 at betas %s", index, betas)
        self.clamp_squares = list(squares)

    def drop_clamp(self, why: str) -> None:
        """Bound m no longer: the states did not come from these betas alone."""
        if any(square != math.inf for square in self.clamp_squares):
            logger.info("clamp off: %s", why)
        self.clamp_squares = [math.inf] * len(self.param_groups)


def _betas(group: dict[str, Any]) -> tuple[float, float]:
    return float(group["betas"][0]), float(group["betas"][1])


def _scalars(
    group: dict[str, Any], step: int, clamp_square: float | None, *, clamp: bool
) -> tuple[AdamScalars, float]:
    """What a step multiplies with, and the square of its clamp; clamp_square: the last step's."""
    beta1, beta2 = _betas(group)
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
    positive = {name: float(group[name]) for name in ("lr", "weight_decay")}
    for name, value in positive.items():
        if not value >= 0:
            raise ValueError(f"optimizer.params.{name}: received {value}, allowed: 0 or more")
    if not torch.tensor(float(group["eps"]), dtype=torch.float32) > 0:
        raise ValueError(f"optimizer.params.eps: received {group['eps']}, allowed: more than 0 in FP32")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.params.betas: received {show(betas)}, allowed: two numbers in [0, 1)")
