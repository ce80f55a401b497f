"""The interface of checkpoints of every kind: states in FP32, progress, and checks of both.

A reader is a `Source` if it gives states by parameter in FP32 (`Values`), and `Restorable` if it brings them
into shards: a checkpoint of ours byte for byte, any source through `convert.Converted`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_fp8.ops.moments import square_root
from ds_fp8.zero_fp8.checkpoint.files import Entry
from ds_fp8.zero_fp8.checkpoint.manifest import Parameter
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.optimizer.hyperparameters import UNSUPPORTED_FLAGS, check_group
from ds_fp8.zero_fp8.states.shard import Shard

STATES = ("master", "exp_avg", "exp_avg_sq")
WEIGHT = "weight"  # beside the states of a split master: its upper half
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
Names = Mapping[int, str]  # global parameter index -> name in the module


@dataclass(frozen=True)
class Progress:
    """The counters and hyperparameters from which a run continues, besides the states."""

    steps: int
    clamp_squares: list[float | None] | None  # one per param group; None: the states are not ours
    loss_scaler: dict[str, int | float]
    param_groups: list[dict[str, Any]]  # hyperparameters
    autoscale: Mapping[str, float] = field(default_factory=dict)  # mu by parameter name

    def give_to(self, optimizer: FP8AdamW, loss_scaler: Any) -> None:
        """Let an optimizer go on from these counters and hyperparameters."""
        optimizer.steps = self.steps
        if self.clamp_squares is None:
            optimizer.drop_clamp("the optimizer states are not from ds_fp8")
        else:
            optimizer.clamp_squares = list(self.clamp_squares)
        vars(loss_scaler).update(self.loss_scaler)
        for group, values in zip(optimizer.param_groups, self.param_groups, strict=True):
            group.update(values)


class Restorable(Protocol):
    """A checkpoint: what it brings to shards, and what a run goes on from."""

    @property
    def progress(self) -> Progress: ...

    def restore(self, shards: Sequence[Shard], weights: Sequence[Tensor], names: Names) -> None: ...


@dataclass(frozen=True)
class Values:
    """States of consecutive elements of a parameter, [n] float32 each."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    root: Tensor  # of exp_avg_sq; its square may be below what FP32 holds

    @staticmethod
    def of(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> "Values":
        wide = exp_avg_sq.to(torch.float32)
        return Values(master.to(torch.float32), exp_avg.to(torch.float32), wide, square_root(wide))


class Source(Protocol):
    """A checkpoint by parameter, in FP32."""

    @property
    def progress(self) -> Progress: ...

    def values(self, name: str, elements: slice) -> Values: ...


class WeightSource(Protocol):
    """A checkpoint's weights by parameter, trained or frozen."""

    def __contains__(self, name: str) -> bool: ...

    def check_weights(self, name: str, elements: slice) -> None:
        """Refuse, by a ValueError, files that do not hold some elements."""

    def weights(self, name: str, elements: slice) -> Tensor:
        """Weights of some elements of a parameter, [n] in the dtype in which they were saved."""


def check_hyperparameters(group: Entry) -> None:
    """Refuse, by a ValueError, a saved param group that a run cannot go on from."""
    for key in ("lr", "eps", "weight_decay", *(["initial_lr"] if "initial_lr" in group else [])):
        group.at(key).number()
    for beta in group.at("betas").each(2):
        beta.number()
    if "bias_correction" in group:
        group.at("bias_correction").of(bool)
    try:
        check_group(group.value | dict.fromkeys(UNSUPPORTED_FLAGS))
    except ValueError as error:
        raise ValueError(f"{group.path}: {group.where}: {error}") from None


def check_names(path: Path, received: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse, by a ValueError, states of other parameters than those of the run."""
    missing, extra = sorted(expected.keys() - received.keys()), sorted(received.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path}: other parameters were trained: without {missing[:3]}, with {extra[:3]} (of "
            f"{len(missing)} and {len(extra)})"
        )


def check_groups(path: Path, received: Sequence[Any], parameters: Mapping[str, Parameter]) -> None:
    """Refuse, by a ValueError, another number of param groups than that of the run."""
    expected = 1 + max(parameter.group for parameter in parameters.values())
    if len(received) != expected:
        raise ValueError(f"{path}: received {len(received)} param groups, expected {expected}")
