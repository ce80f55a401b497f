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

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, adam_step, next_clamp
from ds_fp8.ops.blocks import Blocks, chunks, decode, encode
from ds_fp8.ops.formats import FP32, Format
from ds_fp8.ops.reduction import accumulate
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

    def advance(self, gradient: float, *, clamp: bool) -> list[AdamScalars]:
        """Count a step and return its scalars, one set a param group."""
        self.steps += 1
        self._opt_called = True  # what a scheduler asks before it steps
        return [self._scalars(index, gradient, clamp) for index in range(len(self.param_groups))]

    def drop_clamp(self, why: str) -> None:
        """Bound m no longer: the states did not come from these betas alone."""
        if any(square != math.inf for square in self.clamp_squares):
            logger.info("clamp off: %s", why)
        self.clamp_squares = [math.inf] * len(self.param_groups)

    def _scalars(self, index: int, gradient: float, clamp: bool) -> AdamScalars:
        group = self.param_groups[index]
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        square = next_clamp(self.clamp_squares[index], betas)
        if clamp and math.isinf(square) and self.clamp_squares[index] != math.inf:
            logger.info("clamp off for param group %d: beta1^2 >= beta2 at betas %s", index, betas)
        self.clamp_squares[index] = square
        return AdamScalars(
            step=self.steps,
            gradient=gradient,
            lr=float(group["lr"]),
            beta1=betas[0],
            beta2=betas[1],
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=group["adam_w_mode"],
            bias_correction=group["bias_correction"],
            clamp=math.sqrt(square) if clamp and math.isfinite(square) else None,
        )


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

    def __init__(self, bucket: Bucket, rank: int, recipe: Recipe, device: torch.device) -> None:
        def zeros(fmt: Format) -> Blocks:
            return Blocks.zeros(bucket.blocks_per_rank, bucket.block_size, fmt, device)

        self.recipe = recipe
        self.pieces = tuple(bucket.pieces(rank))
        self.segments = tuple(
            Segment(piece.rows, piece.slot.parameter, piece.first_element) for piece in self.pieces
        )
        self.state = AdamState(zeros(recipe.master), zeros(recipe.exp_avg), zeros(recipe.exp_avg_sq))
        self.gradient = zeros(recipe.shard)
        self.arrivals = 0  # exchanges since the last step

    @property
    def nbytes(self) -> int:
        state = self.state
        return sum(each.nbytes for each in (state.master, state.exp_avg, state.exp_avg_sq, self.gradient))

    def take_masters(self, weights: Tensor) -> None:
        """Round weights, [blocks, block size] of the model's dtype, into the masters."""
        master = self.state.master
        for part in chunks(len(master), master.block_size):
            encode(weights[part].to(torch.float32), master[part])

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
        accumulate(pieces, self.gradient, fresh=self.arrivals == 0)
        self.arrivals += 1

    def sweep(self, weights: Tensor, scalars: AdamScalars) -> None:
        """One Adam step; writes the owned rows of the weights."""
        adam_step(self.state, self.gradient, weights, self.segments, scalars, seed=self.recipe.seed)
