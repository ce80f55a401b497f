"""Where the states of a rank's shards live: on the device, in host memory, or some rows here and some there.

A shard's states are one or two parts, each of consecutive rows. Those of a part that is resident are swept
where they are; those of one in host memory visit the device through a ring that all shards share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.states.arena import Arena, room_of
from ds_fp8.zero_fp8.states.ring import STATES, Event, Ring, chunk_rows, copy


def offloaded_rows(rows: int, ratio: float) -> int:
    """How many of a shard's rows, its last ones, live in host memory."""
    return min(rows, math.ceil(rows * ratio))


@dataclass
class Part:
    """Consecutive rows of a shard."""

    rows: slice
    state: AdamState  # of these rows
    ring: Ring | None = None  # through which they visit the device; None: they are there
    _written: Event = None  # when the last visit is over

    @property
    def device(self) -> torch.device:
        """Where they are swept."""
        return self.ring.device if self.ring else self.state.master.codes.device

    def visits(self) -> Iterator[tuple[slice, AdamState]]:
        """Rows of the shard and their states on the device, to be swept before the next are asked for."""
        if self.ring is None:
            yield self.rows, self.state
            return
        for rows, state in self.ring.visits(self.state, self._written):
            yield slice(self.rows.start + rows.start, self.rows.start + rows.stop), state
        self._written = self.ring.mark()

    @property
    def cuts(self) -> Iterator[slice]:
        """Rows of the shard as they are visited."""
        if self.ring is None:
            yield self.rows
            return
        for first in range(self.rows.start, self.rows.stop, self.ring.rows):
            yield slice(first, min(first + self.ring.rows, self.rows.stop))

    def among(self, rows: slice) -> slice:
        """Which rows of this part are among some of the shard; an empty slice if none is."""
        start = max(self.rows.start, rows.start)
        stop = max(start, min(self.rows.stop, rows.stop))
        return slice(start - self.rows.start, stop - self.rows.start)

    def settle(self) -> None:
        """Wait until the states are what the last sweep made of them."""
        if self.ring is not None:
            self.ring.settle()


class Residence:
    """Where the states of a rank's shards live, and room for them.

    formats: of master, exp_avg and exp_avg_sq. arena: room in host memory, for `ratio` of every shard's
    rows, which visit the device through `ring`; None: all are resident.
    """

    def __init__(
        self,
        block_size: int,
        formats: Sequence[Format],
        device: torch.device,
        *,
        stores_sqrt: bool = True,
        arena: Arena | None = None,
        ring: Ring | None = None,
        ratio: float = 1.0,
    ) -> None:
        self._block_size, self._formats, self.device = block_size, formats, device
        self._stores_sqrt = stores_sqrt
        self.arena, self.ring, self.ratio = arena, ring, ratio

    def parts(self, rows: int) -> tuple[Part, ...]:
        """Room for a shard of so many rows: zeros."""
        away = offloaded_rows(rows, self.ratio) if self.arena else 0
        here = slice(0, rows - away)
        parts = [Part(here, self._states(partial(_zeros, self.device), here.stop))]
        if self.arena is not None and away:
            parts.append(Part(slice(here.stop, rows), self._states(self.arena.blocks, away), self.ring))
        return tuple(each for each in parts if each.rows.stop > each.rows.start or not rows)

    def _states(self, make: Callable[[int, int, Format], Blocks], rows: int) -> AdamState:
        master, exp_avg, exp_avg_sq = (make(rows, self._block_size, fmt) for fmt in self._formats)
        return AdamState(master, exp_avg, exp_avg_sq, stores_sqrt=self._stores_sqrt)

    def close(self) -> None:
        """Give the memory back, when no copy is under way."""
        if self.ring is not None:
            self.ring.settle()
        if self.arena is not None:
            self.arena.close()
        self.arena = self.ring = None


def _zeros(device: torch.device, rows: int, block_size: int, fmt: Format) -> Blocks:
    return Blocks.zeros(rows, block_size, fmt, device)


def in_host_memory(
    rows: Sequence[int],
    block_size: int,
    formats: Sequence[Format],
    device: torch.device,
    *,
    pinned: bool = True,
    ratio: float = 1.0,
) -> Residence:
    """A residence for shards of so many rows each. Raises RuntimeError if there is not that much memory."""
    nbytes = arena_bytes(rows, block_size, formats, ratio)
    arena = Arena(nbytes, device if pinned else None)
    longest = max((offloaded_rows(each, ratio) for each in rows), default=0)
    ring = Ring(chunk_rows(block_size, longest), block_size, formats, device)
    return Residence(block_size, formats, device, arena=arena, ring=ring, ratio=ratio)


def arena_bytes(rows: Sequence[int], block_size: int, formats: Sequence[Format], ratio: float) -> int:
    """Host memory for shards of so many rows each."""
    away = [offloaded_rows(each, ratio) for each in rows]
    return sum(room_of(each, block_size, fmt) for each in away for fmt in formats)


def move(old: Sequence[Part], new: Sequence[Part]) -> None:
    """Copy the states of a shard to where it will live."""
    for source in old:
        source.settle()
        for target in new:
            here, there = source.among(target.rows), target.among(source.rows)
            copy(source.state[here], target.state[there])


def nbytes_of(state: AdamState) -> int:
    """Bytes of codes and scales."""
    blocks: list[Blocks] = [getattr(state, name) for name in STATES]
    return sum(each.nbytes for each in blocks)
