"""FP8AdamW: the hyperparameters of a run in DeepSpeed, and an optimizer of its own without it.

It is a real `torch.optim.Optimizer`, so that learning-rate schedulers accept it. Under ZeRO it holds no
state: the states live in shards, whose blocks follow the partition and not the parameters. It shares the
`param_groups` dicts of the optimizer that it replaces; a scheduler would go on writing to the old dicts if
these were copies. Without DeepSpeed, `step` sweeps each parameter with the same kernels (`standalone.py`).
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_fp8.config.offload import check_offload
from ds_fp8.config.parsing import parse
from ds_fp8.config.refusals import refusal
from ds_fp8.config.section import SECTION, FP8Config
from ds_fp8.ops.adam import AdamScalars, next_clamp
from ds_fp8.zero_fp8.optimizer.hyperparameters import (
    HYPERPARAMETERS,
    betas_of,
    check_betas,
    check_group,
    scalars_of,
)
from ds_fp8.zero_fp8.optimizer.members import Member, check_apart, members_of
from ds_fp8.zero_fp8.optimizer.standalone import States
from ds_fp8.zero_fp8.plain_tensors import ALLOWED, kind_of
from ds_fp8.zero_fp8.recipe import recipe_of

logger = logging.getLogger("ds_fp8")


class FP8AdamW(torch.optim.Optimizer):
    """Adam or AdamW over FP8 states, in one of two roles.

    With DeepSpeed (`deepspeed.initialize(optimizer=...)`, or made from the "optimizer" section) it only holds
    the hyperparameters: the states live in the shards of ZeRO and `engine.step()` steps them. Without
    DeepSpeed it is an optimizer like torch's AdamW, with its states in 8 and 16 bits.

    Args:
        params: parameters, param groups or named parameters, as for any torch optimizer.
        lr: learning rate, default 1e-3.
        betas: decay rates of exp_avg and exp_avg_sq, default (0.9, 0.999).
        eps: added to sqrt(exp_avg_sq), default 1e-8; more than 0 in FP32.
        weight_decay: default 0.01.
        bias_correction: correct exp_avg and exp_avg_sq for their start at 0, default True.
        adam_w_mode: decoupled weight decay (AdamW), default True; False: L2 (Adam).
        fp8: without DeepSpeed only: formats of the states as in the "fp8" section of a ds_config
            (`opt_level`, `block_size`, `optimizer`), default O2.

    Raises:
        ValueError: a value is out of range, or amsgrad, maximize or differentiable is set.
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
        self._standalone = _states(fp8)
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
        if group.get(SECTION, self._standalone.entries.identity) != self._standalone.entries.identity:
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

        Args:
            closure: computes the loss again, as for any torch optimizer.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError: before anything is changed, with the name of what is at fault: a parameter or gradient
                that the kernels cannot take, a parameter that its state was not made for, two that share
                memory, or hyperparameters that the constructor would refuse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [each for each in members_of(self.param_groups) if each.parameter.grad is not None]
        self._check_step(members)
        only_states = self._asks_for_states(members)
        self._sign_groups()
        for each in members:
            if not self.state[each.parameter]:
                self.state[each.parameter] = self._standalone.entries.make(each.parameter)
        if not only_states:
            self._step_all(members)
        return loss

    def _check_step(self, members: list[Member]) -> None:
        """members: those with a gradient."""
        for group in self.param_groups:
            check_group(group)
        for each in members:
            entry = self.state.get(each.parameter, {})
            self._standalone.check(f"FP8AdamW, {each.name}", entry, each.parameter)
        check_apart(
            each
            for each in members_of(self.param_groups)
            if each.parameter.grad is not None or self.state.get(each.parameter)
        )

    def _step_all(self, members: list[Member]) -> None:
        for each in members:
            self._standalone.follow(self.state[each.parameter], each.parameter)
        for each in members:
            self._step_one(each)
        for each in members:
            self._standalone.remember(self.state[each.parameter], each.parameter)

    def _step_one(self, member: Member) -> None:
        state = self.state[member.parameter]
        scalars, square = scalars_of(
            member.group,
            state["step"] + 1,
            state["clamp_square"] or None,
            clamp=self._standalone.recipe.clamped,
        )
        self._standalone.sweep(state, member.parameter, member.number, scalars)
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
        """As torch's, with the states as bytes; "fp8" of each param group gives their formats."""
        self._sign_groups()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, byte for byte.

        Args:
            state_dict: of an FP8AdamW with the same param groups, formats and seed.

        Raises:
            ValueError: before anything is changed, if formats, shapes or hyperparameters do not fit.
        """
        # torch casts states to the dtype of their parameter: not ours. So torch sees none of them; a
        # user's own hooks, which come before the last one and after the first, see them all.
        copies: dict[Tensor, dict[str, Any]] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            copies.update(self._copies_of(given))
            return {**given, "state": {}}

        def put(_: torch.optim.Optimizer) -> None:
            self.state.update(copies)

        with (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _copies_of(self, given: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Copies of the states of a state_dict that fits, by parameter."""
        groups = given.get("param_groups", [])
        received = [len(group.get("params", ())) for group in groups]
        expected = [len(group["params"]) for group in self.param_groups]
        if received != expected:
            raise ValueError(
                f"state_dict: received param groups of {received} parameters, expected {expected}"
            )
        for group in groups:
            self._standalone.entries.check_identity(group.get(SECTION))
            missing = sorted(set(HYPERPARAMETERS) - group.keys())
            if missing:
                raise ValueError(f"state_dict: received a param group without {', '.join(missing)}")
            check_betas(group)  # the rest may be set again before the next step, which checks it
        saved_ids = [number for group in groups for number in group["params"]]
        members = dict(zip(saved_ids, members_of(self.param_groups), strict=True))
        copies = {}
        for key, saved in given.get("state", {}).items():
            if key not in members:
                raise ValueError(
                    f"state_dict: received parameter {key}, allowed: {saved_ids[0]} to {saved_ids[-1]}"
                )
            parameter = members[key].parameter
            copies[parameter] = self._standalone.entries.copy_of(
                f"state_dict of {members[key].name}", saved, parameter
            )
        return copies

    def _sign_groups(self) -> None:
        """Say in each group what the states are: torch.distributed.checkpoint keeps nothing beside groups."""
        for group in self.param_groups:
            group[SECTION] = self._standalone.entries.identity

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """The state for copy and pickle, without kernels and their plans, which are made again."""
        own = {"steps": self.steps, "clamp_squares": self.clamp_squares, "fp8": self.fp8}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_standalone" not in self.__dict__:
            self._standalone = _states(self.fp8)

    # Under ZeRO

    def scalars(self, *, clamp: bool) -> list[AdamScalars]:
        """The factors of the next step, one set per param group; `advance` counts the step."""
        pairs = zip(self.param_groups, self.clamp_squares, strict=True)
        return [scalars_of(group, self.steps + 1, square, clamp=clamp)[0] for group, square in pairs]

    def advance(self, *, clamp: bool) -> None:
        """Count a step."""
        self.steps += 1
        self._opt_called = True  # what a scheduler asks before it steps
        squares = [
            next_clamp(square, betas_of(group))
            for square, group in zip(self.clamp_squares, self.param_groups, strict=True)
        ]
        for index, (before, after) in enumerate(zip(self.clamp_squares, squares, strict=True)):
            if clamp and after == math.inf != before:
                betas = betas_of(self.param_groups[index])
                logger.info("clamp off for param group %d: beta1^2 >= beta2 at betas %s", index, betas)
        self.clamp_squares = list(squares)

    def drop_clamp(self, why: str) -> None:
        """Turn the clamp of m off: the states were not made with these betas alone."""
        if any(square != math.inf for square in self.clamp_squares):
            logger.info("clamp off: %s", why)
        self.clamp_squares = [math.inf] * len(self.param_groups)


def _states(fp8: Mapping[str, Any] | None) -> States:
    """The recipe of the argument `fp8`. Raises ValueError."""
    config = parse({SECTION: {**(fp8 or {}), "enabled": True}})
    assert isinstance(config, FP8Config)
    check_offload(config, offloaded=False)
    if config.scaling != "block":
        raise refusal(f"{SECTION}.scaling", config.scaling, '"block" for an FP8AdamW without DeepSpeed')
    if config.has_codes:
        raise config.refusal_of_weights("for an FP8AdamW without DeepSpeed")
    return States(recipe_of(config))
