"""Shard: the Adam states of the blocks that one rank owns of a bucket, and their sweep.

`wiring` decides where they live (`residence`); after that only the shard knows, and all other code reaches
them through `lend` and `where_they_are`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.ops.rounding import Rounding
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.partition import Piece
from ds_fp8.zero_fp8.states.residence import Part, Residence, move, nbytes_of
from ds_fp8.zero_fp8.states.visits import Target, copy, room_like

ALL = slice(None)  # rows


class Room(Protocol):
    """Weights that a sweep can write."""

    @property
    def room(self) -> Tensor:
        """The rows that this rank writes, [blocks, block size] of the model's dtype."""


class Shard:
    """One rank's Adam states of one bucket."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        parts: Sequence[Part],
        rounding: Rounding,
        backend: Backend,
        counts: Counts,
    ) -> None:
        """pieces: the contents of the rows; parts: their states; counts: of the bucket's param group."""
        self.pieces = tuple(pieces)
        self._rounding = rounding
        self._backend = backend
        self._counts = counts
        self._live_in(parts)

    def _live_in(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._plans = [self._plan(part, rows) for part in parts for rows in part.cuts]

    def _plan(self, part: Part, rows: slice) -> Any:
        """Return the backend's tables for rows that are swept together."""
        cut = ((piece, _overlap(piece.rows, rows)) for piece in self.pieces)
        segments = [
            Segment(
                slice(each.start - rows.start, each.stop - rows.start),
                piece.slot.parameter,
                piece.first_element + (each.start - piece.rows.start) * self.block_size,
            )
            for piece, each in cut
            if each.start < each.stop
        ]
        backend, memory = self._backend, part.state.master.codes.device
        if part.executor is not None:
            backend, memory = part.executor.backend, part.executor.memory
        return backend.plan(segments, rows.stop - rows.start, self.block_size, memory)

    @property
    def rows(self) -> int:
        stop: int = self._parts[-1].rows.stop
        return stop

    @property
    def nbytes(self) -> int:
        return sum(nbytes_of(each.state) for each in self._parts)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the states in host memory."""
        return sum(nbytes_of(each.state) for each in self._parts if each.executor is not None)

    @property
    def master_format(self) -> Format:
        return self._parts[0].state.master.format

    @property
    def block_size(self) -> int:
        return self._parts[0].state.master.block_size

    def cut(self, rows: slice = ALL) -> Iterator[slice]:
        """Yield rows in chunks that fit on the device, to be lent one after the other."""
        start, stop, _ = rows.indices(self.rows)
        for part in self._parts:
            for each in part.cuts:
                lot = _overlap(each, slice(start, stop))
                if lot.start < lot.stop:
                    yield lot

    @contextmanager
    def lend(self, rows: slice = ALL) -> Iterator[AdamState]:
        """Lend the states of some rows on the weights' device, for reads and writes until the `with` ends.

        States that live elsewhere are lent as copies and written back: `cut` keeps them small.
        """
        wanted = slice(*rows.indices(self.rows)[:2])
        inside = [(part, part.among(wanted)) for part in self._parts]
        inside = [(part, each) for part, each in inside if each.start < each.stop] or inside[:1]
        first, its_rows = inside[0]
        if len(inside) == 1 and first.executor is None:
            yield first.state[its_rows]
            return
        device = next(part.executor.device for part, _ in inside if part.executor is not None)
        lent = room_like(first.state, wanted.stop - wanted.start, device)
        lots = []
        for part, each in inside:
            part.settle()
            start = part.rows.start + each.start - wanted.start
            lots.append((part.state[each], lent[start : start + each.stop - each.start]))
        for home, copied in lots:
            copy(home, copied)
        yield lent
        for home, copied in lots:
            copy(copied, home)

    def where_they_are(self, rows: slice = ALL) -> Iterator[tuple[slice, AdamState]]:
        """Yield states of some rows where they live, for copies: one or two runs, counted from the first row.

        They may be read until the next step; writes to them last.
        """
        wanted = slice(*rows.indices(self.rows)[:2])
        for part in self._parts:
            inside = part.among(wanted)
            if inside.start < inside.stop:
                part.settle()
                start = part.rows.start + inside.start - wanted.start
                yield slice(start, start + inside.stop - inside.start), part.state[inside]

    def move(self, residence: Residence) -> None:
        """Move the states to another residence."""
        parts = residence.parts(self.rows)
        move(self._parts, parts)
        self._live_in(parts)

    def take_masters(self, weights: Tensor, pieces: Iterable[Piece]) -> None:
        """Round weights, [blocks, block size] of the model's dtype, into the masters of some pieces."""
        for rows in (each for piece in pieces for each in self.cut(piece.rows)):
            with self.lend(rows) as state:
                if state.master.format.split:
                    state.master.zero_()  # a BF16 weight is its master, with zero lower bits
                else:
                    self._backend.quantize(weights[rows].view(-1), state.master)

    def sweep(self, gradient: Blocks, weights: Room, scalars: AdamScalars, control: Tensor) -> None:
        """Take one Adam step, or none if `control` says so; write the owned rows of the weights.

        gradient: on the device where the states are swept.
        """
        counts = self._counts.of_state(sum(piece.numel for piece in self.pieces))
        target, plans = Target(weights.room, control, counts), iter(self._plans)
        for part in self._parts:
            backend = self._backend if part.executor is None else part.executor.backend
            for visit in part.visits(target):
                swept = (visit.state, gradient[visit.rows], visit.target.weights, next(plans), scalars)
                backend.adam_step(Sweep(*swept, visit.target.control, self._rounding, visit.target.counts))


def _overlap(first: slice, second: slice) -> slice:
    return slice(max(first.start, second.start), min(first.stop, second.stop))
