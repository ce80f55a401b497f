"""The optimizer that a client gave, and the one that runs in its place: hyperparameters go one way.

Both hold the same dicts of param groups at first, so that a scheduler of the client's keeps working. A
`load_state_dict` gives the client's optimizer new dicts; then their values are taken over before each step.
What an optimizer of the client's cannot do any more is refused by name instead of doing nothing.
"""

from collections.abc import Callable
from typing import Any

from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.optimizer.hyperparameters import check_group

METHODS = ("step", "zero_grad", "add_param_group")


class Client:
    """given: the client's optimizer, which may be `ours`; ours: the one whose groups a step reads."""

    def __init__(self, given: Any, ours: FP8AdamW, zero_grad: Callable[..., None]) -> None:
        self._given, self._ours = given, ours
        self._groups = len(ours.param_groups)
        self._before = {id(each): (each, dict(vars(each))) for each in (given, ours)}
        for optimizer, _ in self._before.values():
            for name, method in zip(METHODS, (_refuse_step, zero_grad, _refuse_group), strict=True):
                setattr(optimizer, name, method)

    def follow(self) -> None:
        """Before a step: take over the client's hyperparameters. Raises ValueError for added groups."""
        theirs = self._given.param_groups
        if len(theirs) != self._groups:
            raise ValueError(
                f"optimizer.param_groups: received {len(theirs)} groups, allowed: the {self._groups} of "
                "deepspeed.initialize"
            )
        for group, values in zip(self._ours.param_groups, theirs, strict=True):
            if values is not group:
                group.update({key: value for key, value in values.items() if key != "params"})
            check_group(group)

    def let_go(self) -> None:
        """Give the optimizers their own methods back."""
        for optimizer, before in self._before.values():
            for name in METHODS:
                if name in before:
                    setattr(optimizer, name, before[name])
                else:
                    vars(optimizer).pop(name, None)
        self._before.clear()


def _refuse_step(*_: Any, **__: Any) -> None:
    raise RuntimeError("optimizer.step(): not with DeepSpeed, allowed: engine.step()")


_refuse_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or torch's schedulers wrap it


def _refuse_group(*_: Any, **__: Any) -> None:
    raise ValueError(
        "optimizer.add_param_group(): received a param group after deepspeed.initialize, allowed: before it"
    )
