"""Shard: the Adam states of the blocks that one rank owns of a bucket, and their sweep.

`wiring` makes them; after that only a shard knows where they live, and all others reach them through `lend`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.ops.rounding import Rounding
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.partition import Piece

ALL = slice(None)  # rows


class Room(Protocol):
    """Weights that a sweep can write."""

    @property
    def room(self) -> Tensor:
        """Where this rank writes its rows, [blocks, block size] of the model's dtype."""


class Shard:
    """One rank's Adam states of one bucket."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        state: AdamState,
        rounding: Rounding,
        backend: Backend,
        counts: Counts,
    ) -> None:
        """pieces: what the rows of the state hold; counts: of the bucket's param group."""
        self.pieces = tuple(pieces)
        self._state = state
        self._rounding = rounding
        self._backend = backend
        self._counts = counts
        master = state.master
        segments = [Segment(each.rows, each.slot.parameter, each.first_element) for each in self.pieces]
        self._plan = backend.plan(segments, len(master), master.block_size, master.codes.device)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self._state.master, self._state.exp_avg, self._state.exp_avg_sq))

    @property
    def master_format(self) -> Format:
        return self._state.master.format

    @property
    def block_size(self) -> int:
        return self._state.master.block_size

    @contextmanager
    def lend(self, rows: slice = ALL) -> Iterator[AdamState]:
        """The states of some rows, to read and write until the `with` ends.

        Those that are resident, as all are today, may be read after it, too: saving copies nothing.
        """
        yield self._state if rows is ALL else self._state[rows]

    def take_masters(self, weights: Tensor, pieces: Iterable[Piece]) -> None:
        """Round weights, [blocks, block size] of the model's dtype, into the masters of some pieces."""
        for piece in pieces:
            with self.lend(piece.rows) as state:
                if state.master.format.split:
                    state.master.zero_()  # a BF16 weight is its master, with nothing below
                else:
                    self._backend.quantize(weights[piece.rows].view(-1), state.master)

    def sweep(self, gradient: Blocks, weights: Room, scalars: AdamScalars, control: Tensor) -> None:
        """One Adam step, or none if `control` says so; writes the owned rows of the weights."""
        counts = self._counts.of_state(sum(piece.numel for piece in self.pieces))
        with self.lend() as state:
            self._backend.adam_step(
                Sweep(state, gradient, weights.room, self._plan, scalars, control, self._rounding, counts)
            )
