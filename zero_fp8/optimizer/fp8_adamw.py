"""FP8AdamW: the hyperparameters of a run in DeepSpeed, and an optimizer of its own without it.

It is a real `torch.optim.Optimizer`, so that learning-rate schedulers accept it. Under ZeRO it holds no
state: the states live in shards, whose blocks follow the partition and not the parameters, and it
shares the `param_groups` dicts of the optimizer that it replaces; with copies a scheduler would go on
writing to dicts that nobody reads. Alone, `step` sweeps each parameter with the same kernels
(`standalone.py`).
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_fp8.config.refusals import refusal, show
from ds_fp8.config.section import SECTION, FP8Config, parse
from ds_fp8.ops.adam import AdamScalars, next_clamp
from ds_fp8.zero_fp8.guards import ALLOWED, kind_of
from ds_fp8.zero_fp8.optimizer.standalone import Member, States, check_apart, members_of
from ds_fp8.zero_fp8.recipe import recipe_of

logger = logging.getLogger("ds_fp8")

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode")
LEAST_LR = -1e-12  # a scheduler's last learning rate may lie a little below 0, as torch's may
ZERO_IN_FP32 = 2.0**-150  # the largest number that FP32 rounds to 0
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
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
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
        self._alone = _states(fp8)
        self.fp8 = None if fp8 is None else copy.deepcopy(dict(fp8))
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_new_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise
        self.clamp_squares.append(None)

    def _check_new_group(self, group: dict[str, Any]) -> None:
        check_group(group)
        if group.get(SECTION, self._alone.identity) != self._alone.identity:
            raise refusal(
                f"optimizer.params.{SECTION}", group[SECTION], "none; formats are of all param groups"
            )
        for member in members_of(self.param_groups):
            kind = kind_of(member.parameter) if member.group is group else None
            if kind is not None:
                raise ValueError(f"FP8AdamW, {member.name}: received {kind}, {ALLOWED}")

    # Without DeepSpeed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient, without DeepSpeed.

        The states of a parameter are made at its first step, its master from its weight. Masters follow
        weights that were edited since (`edits.py`). A gradient that is not finite spoils the states, as in
        torch: clip and check before.
        Raises ValueError, which names what is at fault, before anything is changed: for a parameter or
        gradient that the kernels cannot take, for a parameter that its state was not made for, for two that
        share memory, and for hyperparameters that the constructor would refuse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_group(group)
        members = [each for each in members_of(self.param_groups) if each.parameter.grad is not None]
        for each in members:
            self._alone.check(f"FP8AdamW, {each.name}", self.state.get(each.parameter, {}), each.parameter)
        check_apart(
            each
            for each in members_of(self.param_groups)
            if each.parameter.grad is not None or self.state.get(each.parameter)
        )
        only_states = self._asks_for_states(members)
        self._sign_groups()
        for each in members:
            if not self.state[each.parameter]:
                self.state[each.parameter] = self._alone.make(each.parameter)
        if not only_states:
            self._step_all(members)
        return loss

    def _step_all(self, members: list[Member]) -> None:
        for each in members:
            self._alone.follow(self.state[each.parameter], each.parameter)
        for each in members:
            self._step_one(each)
        for each in members:
            self._alone.remember(self.state[each.parameter], each.parameter)

    def _step_one(self, member: Member) -> None:
        state = self.state[member.parameter]
        scalars, square = _scalars(
            member.group, state["step"] + 1, state["clamp_square"] or None, clamp=self._alone.recipe.clamped
        )
        self._alone.sweep(state, member.parameter, member.number, scalars)
        state.update(step=scalars.step, clamp_square=square)

    def _asks_for_states(self, members: list[Member]) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint has an optimizer make its states.

        It comes first, at a learning rate of 0, with zeros as gradients. Such a step is not counted, so
        that a run is the same with a checkpoint before its first step and without.
        """
        return (
            not any(self.state.values())
            and all(float(each.group["lr"]) == 0 for each in members)
            and not any(each.parameter.grad.any() for each in members if each.parameter.grad is not None)
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, the states as bytes; "fp8" of each param group says what they are."""
        self._sign_groups()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, byte for byte.

        Raises ValueError, before anything is changed, if formats, shapes or hyperparameters do not fit.
        """
        # torch casts states to the dtype of their parameter: not ours. So torch sees none of them; a
        # user's own hooks, which come before the last one and after the first, see them all.
        taken: dict[Tensor, dict[str, Any]] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            taken.update(self._taken_over(given))
            return {**given, "state": {}}

        def put(_: torch.optim.Optimizer) -> None:
            self.state.update(taken)

        with (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _taken_over(self, given: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Copies of the states of a state_dict that fits, by parameter."""
        groups = given.get("param_groups", [])
        received = [len(group.get("params", ())) for group in groups]
        expected = [len(group["params"]) for group in self.param_groups]
        if received != expected:
            raise ValueError(
                f"state_dict: received param groups of {received} parameters, expected {expected}"
            )
        for group in groups:
            self._alone.check_identity(group.get(SECTION))
            missing = sorted(set(HYPERPARAMETERS) - group.keys())
            if missing:
                raise ValueError(f"state_dict: received a param group without {', '.join(missing)}")
            _check_betas(group)  # the rest may be set again before the next step, which checks it
        saved_ids = [each for group in groups for each in group["params"]]
        members = dict(zip(saved_ids, members_of(self.param_groups), strict=True))
        taken = {}
        for key, saved in given.get("state", {}).items():
            if key not in members:
                raise ValueError(
                    f"state_dict: received parameter {key}, allowed: {saved_ids[0]} to {saved_ids[-1]}"
                )
            parameter = members[key].parameter
            taken[parameter] = self._alone.taken_over(f"state_dict of {members[key].name}", saved, parameter)
        return taken

    def _sign_groups(self) -> None:
        """Say in each group what the states are: torch.distributed.checkpoint keeps nothing beside groups."""
        for group in self.param_groups:
            group[SECTION] = self._alone.identity

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle take: torch's, and ours less kernels and their plans, which are made again."""
        own = {"steps": self.steps, "clamp_squares": self.clamp_squares, "fp8": self.fp8}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_alone" not in self.__dict__:
            self._alone = _states(self.fp8)

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


def _states(fp8: Mapping[str, Any] | None) -> States:
    """For the formats that the argument `fp8` names. Raises ValueError."""
    config = parse({SECTION: {**(fp8 or {}), "enabled": True}})
    assert isinstance(config, FP8Config)
    if config.scaling != "block":
        raise refusal(f"{SECTION}.scaling", config.scaling, '"block" for an FP8AdamW without DeepSpeed')
    return States(recipe_of(config))


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
    for name, least in (("lr", LEAST_LR), ("weight_decay", 0.0)):
        value = float(group[name])
        if not value >= least:
            raise ValueError(f"optimizer.params.{name}: received {value}, allowed: 0 or more")
    if not float(group["eps"]) > ZERO_IN_FP32:
        raise ValueError(f"optimizer.params.eps: received {group['eps']}, allowed: more than 0 in FP32")
    _check_betas(group)


def _check_betas(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.params.betas: received {show(betas)}, allowed: two numbers in [0, 1)")
