"""FP8AdamW, the hyperparameters of a run, and Shard, one rank's states of one bucket.

FP8AdamW is a real `torch.optim.Optimizer`, so that learning-rate schedulers accept it, but it
holds no state of its own: the states live in shards, whose blocks follow the partition and not
the parameters. It shares the `param_groups` dicts of the optimizer it replaces; with copies a
scheduler would go on writing to dicts that nobody reads.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, next_clamp
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks, chunks, decode, encode
from ds_fp8.ops.formats import FP32, Format
from ds_fp8.ops.reduction import figures
from ds_fp8.zero_fp8.partition import Bucket

logger = logging.getLogger("ds_fp8")

UNSUPPORTED_FLAGS = ("amsgrad", "maximize", "differentiable")


@dataclass(frozen=True)
class Recipe:
    """The formats and rules of a run, as plain values."""

    block_size: int
    wire: Format  # gradients between ranks
    shard: Format  # the reduced gradient
    promote: bool  # a second micro-step turns the reduced gradient FP32
    master: Format
    exp_avg: Format
    exp_avg_sq: Format
    clamp: bool
    seed: int

    @property
    def clamped(self) -> bool:
        """Whether m is clamped: only a state below FP32 can need it."""
        return self.clamp and (self.exp_avg is not FP32 or self.exp_avg_sq is not FP32)


class FP8AdamW(torch.optim.Optimizer):
    """Adam or AdamW over FP8 states.

    lr, betas, eps, weight_decay, bias_correction: as in DeepSpeed's FusedAdam. adam_w_mode: decoupled
    weight decay (AdamW) where true, L2 (Adam) where false. Raises ValueError for a value out of range
    and for amsgrad, maximize and differentiable.
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
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_group(group)
        self.steps = 0
        self.clamp_squares: list[float | None] = [None] * len(self.param_groups)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refused: the states live in the ZeRO handler."""
        raise RuntimeError(
            'FP8AdamW.step() runs inside DeepSpeed ZeRO 1 or 2 with "fp8": {"enabled": true}; '
            "it does not step on its own in this version"
        )

    def scalars(self, *, clamp: bool) -> list[AdamScalars]:
        """What the next step multiplies with, one set a param group; `advance` counts the step."""
        squares = self._next_clamp_squares()
        return [self._scalars(*each, clamp) for each in zip(self.param_groups, squares, strict=True)]

    def advance(self, *, clamp: bool) -> None:
        """Count a step."""
        self.steps += 1
        self._opt_called = True  # what a scheduler asks before it steps
        squares = self._next_clamp_squares()
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

    def _next_clamp_squares(self) -> list[float]:
        pairs = zip(self.clamp_squares, self.param_groups, strict=True)
        return [next_clamp(square, _betas(group)) for square, group in pairs]

    def _scalars(self, group: dict[str, Any], clamp_square: float, clamp: bool) -> AdamScalars:
        beta1, beta2 = _betas(group)
        return AdamScalars(
            step=self.steps + 1,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=group["adam_w_mode"],
            bias_correction=group["bias_correction"],
            clamp=math.sqrt(clamp_square) if clamp and math.isfinite(clamp_square) else None,
        )


def _betas(group: dict[str, Any]) -> tuple[float, float]:
    return float(group["betas"][0]), float(group["betas"][1])


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
        raise ValueError(f"optimizer.params.betas: received {betas}, allowed: two numbers in [0, 1)")


class Shard:
    """One rank's blocks of one bucket: reduced gradient and Adam states."""

    def __init__(
        self, bucket: Bucket, rank: int, recipe: Recipe, device: torch.device, backend: Backend
    ) -> None:
        def zeros(fmt: Format) -> Blocks:
            return Blocks.zeros(bucket.blocks_per_rank, bucket.block_size, fmt, device)

        self.recipe = recipe
        self._backend = backend
        self.pieces = tuple(bucket.pieces(rank))
        segments = [Segment(each.rows, each.slot.parameter, each.first_element) for each in self.pieces]
        self._plan = backend.plan(segments, bucket.blocks_per_rank, bucket.block_size, device)
        self.state = AdamState(zeros(recipe.master), zeros(recipe.exp_avg), zeros(recipe.exp_avg_sq))
        self.gradient = zeros(recipe.shard)
        self.forget()

    @property
    def nbytes(self) -> int:
        state = self.state
        return sum(each.nbytes for each in (state.master, state.exp_avg, state.exp_avg_sq, self.gradient))

    def forget(self) -> None:
        """Let the next arrival replace what has been reduced."""
        self.arrivals = 0  # exchanges since the last step
        self.figures: Tensor | None = None  # of the reduced gradient, as `ops.reduction.figures` gives them

    def take_masters(self, weights: Tensor) -> None:
        """Round weights, [blocks, block size] of the model's dtype, into the masters."""
        self._backend.quantize(weights.view(-1), self.state.master)

    def must_promote(self) -> bool:
        """Whether the next arrival would be lost in an 8-bit sum that nobody asked for."""
        return self.recipe.promote and self.arrivals > 0 and self.gradient.format is not FP32

    def promote(self) -> None:
        """Turn the reduced gradient FP32, keeping its values."""
        wide = Blocks.zeros(len(self.gradient), self.gradient.block_size, FP32, self.gradient.codes.device)
        for part in chunks(len(wide), wide.block_size):
            encode(decode(self.gradient[part]), wide[part])
        self.gradient = wide

    def receive(self, pieces: Sequence[Blocks]) -> None:
        """Add one exchange's pieces, in rank order, to the reduced gradient."""
        self.figures = self._backend.accumulate(pieces, self.gradient, fresh=self.arrivals == 0)
        self.arrivals += 1

    def set_gradient(self, values: Tensor, rows: slice) -> None:
        """Round a vector into rows of the reduced gradient."""
        self._backend.quantize(values, self.gradient[rows])
        self.figures = figures(self.gradient)

    def sweep(self, weights: Tensor, scalars: AdamScalars, control: Tensor) -> None:
        """One Adam step, or none where `control` says so; writes the owned rows of the weights."""
        seed = self.recipe.seed
        self._backend.adam_step(self.state, self.gradient, weights, self._plan, scalars, control, seed=seed)
