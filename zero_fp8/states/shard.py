"""Shard: one rank's blocks of one bucket, reduced gradient and Adam states."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks, chunks, decode, encode
from ds_fp8.ops.formats import FP32, Format
from ds_fp8.ops.fp8_sum import ring_sum
from ds_fp8.ops.per_tensor import store_rows
from ds_fp8.ops.reduction import NORM_PARTS, norm_parts
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.partition import Bucket
from ds_fp8.zero_fp8.recipe import Recipe


class Shard:
    """One rank's blocks of one bucket: reduced gradient and Adam states."""

    def __init__(
        self,
        bucket: Bucket,
        rank: int,
        recipe: Recipe,
        device: torch.device,
        backend: Backend,
        counts: Counts | None = None,
    ) -> None:
        """counts: of the bucket's param group."""

        def zeros(fmt: Format) -> Blocks:
            return Blocks.zeros(bucket.blocks_of(rank), bucket.block_size, fmt, device)

        self.recipe = recipe
        self.counts = counts or Counts()
        self._backend = backend
        self.pieces = tuple(bucket.pieces(rank))
        segments = [Segment(each.rows, each.slot.parameter, each.first_element) for each in self.pieces]
        self._plan = backend.plan(segments, bucket.blocks_of(rank), bucket.block_size, device)
        states = (zeros(recipe.master), zeros(recipe.exp_avg), zeros(recipe.exp_avg_sq))
        self.state = AdamState(*states, stores_sqrt=not recipe.by_tensor)
        self.gradient = zeros(recipe.shard)
        self.forget()

    @property
    def nbytes(self) -> int:
        state = self.state
        return sum(each.nbytes for each in (state.master, state.exp_avg, state.exp_avg_sq, self.gradient))

    def forget(self) -> None:
        """Let the next arrival replace what has been reduced."""
        self.arrivals = 0  # exchanges since the last step
        self.counts.forget()
        self.figures: Tensor | None = None  # `ops.reduction.norm_parts` of the reduced gradient

    def take_masters(self, weights: Tensor) -> None:
        """Round weights, [blocks, block size] of the model's dtype, into the masters."""
        if self.state.master.format.split:
            self.state.master.zero_()  # a BF16 weight is its master, with nothing below
            return
        for each in self.pieces:
            self._backend.quantize(weights[each.rows].view(-1), self.state.master[each.rows])

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
        self.figures = self._backend.accumulate(pieces, self.gradient, overwrite=self.arrivals == 0)
        self.arrivals += 1

    def set_gradient(self, values: Tensor, rows: slice) -> None:
        """Round a vector into rows of the reduced gradient."""
        self._backend.quantize(values, self.gradient[rows])
        self.figures = norm_parts(self.gradient)

    def sweep(self, weights: Tensor, scalars: AdamScalars, control: Tensor) -> None:
        """One Adam step, or none where `control` says so; writes the owned rows of the weights."""
        sweep = Sweep(
            self.state,
            self.gradient,
            weights,
            self._plan,
            scalars,
            control,
            rounding=self.recipe.rounding,
            counts=self.counts.of_state(sum(each.numel for each in self.pieces)),
        )
        self._backend.adam_step(sweep)


class TensorShard(Shard):
    """Whole tensors, each with a scale of its own: sums are of one at a time."""

    def receive(self, pieces: Sequence[Blocks]) -> None:
        figures = torch.zeros(NORM_PARTS, dtype=torch.int64, device=self.gradient.codes.device)
        for each in self.pieces:
            arrived = [piece[each.rows] for piece in pieces]
            rows = self.gradient[each.rows]
            figures += self._backend.accumulate(arrived, rows, overwrite=self.arrivals == 0)
        self.figures = figures
        self.arrivals += 1


class RingShard(TensorShard):
    """Tensors whose gradients are added in FP8; a reduced gradient has an FP32 scale."""

    def __init__(
        self,
        bucket: Bucket,
        rank: int,
        recipe: Recipe,
        device: torch.device,
        backend: Backend,
        counts: Counts | None = None,
    ) -> None:
        super().__init__(bucket, rank, recipe, device, backend, counts)
        if self.gradient.scales is not None:
            self.gradient = replace(self.gradient, scales=self.gradient.scales.to(torch.float32))

    def forget(self) -> None:
        super().forget()
        self._saturated = torch.zeros(
            len(self.pieces), dtype=torch.float64, device=self.gradient.codes.device
        )

    @property
    def saturated(self) -> Iterator[tuple[int, Tensor]]:
        """How many values of each parameter's sum were at the largest code, in the mean of the exchanges."""
        for each, count in zip(self.pieces, self._saturated, strict=True):
            yield each.slot.parameter, count / max(self.arrivals, 1)

    def receive(self, pieces: Sequence[Blocks]) -> None:
        for number, each in enumerate(self.pieces):
            arrived = [piece[each.rows] for piece in pieces]
            total = replace(arrived[0], codes=torch.empty_like(arrived[0].codes))
            self._saturated[number] += ring_sum(arrived, total)
            self._add(total, self.gradient[each.rows])
        self.figures = norm_parts(self.gradient)
        self.arrivals += 1

    def _add(self, total: Blocks, gradient: Blocks) -> None:
        """The sum as it is, where nothing was there before and the formats are the same."""
        if self.arrivals:
            store_rows(decode(gradient) + decode(total), gradient)
        elif gradient.format is total.format:
            gradient.copy_(total)
        else:
            store_rows(decode(total), gradient)
