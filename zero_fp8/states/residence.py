"""Where the states of a rank's shards live: on the device, in host memory, or some rows in each.

A shard's states are one or two parts, each of consecutive rows. A resident part is swept in place; a part in
host memory by an executor that all shards share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.states.arena import Arena, aligned, room_of
from ds_fp8.zero_fp8.states.host_memory import refuse_too_much
from ds_fp8.zero_fp8.states.host_sweep import BUFFERS as STAGED
from ds_fp8.zero_fp8.states.host_sweep import HostSweep
from ds_fp8.zero_fp8.states.lanes import Event
from ds_fp8.zero_fp8.states.ring import Ring
from ds_fp8.zero_fp8.states.visits import STATES, Executor, Target, Visit, chunk_rows, chunks_of, copy

ROWS_AT_ONCE = 16


def offloaded_rows(rows: int, ratio: float) -> int:
    """Return the number of a shard's rows, its last ones, that live in host memory.

    They begin at a multiple of 16: kernels read the scales of 16 rows at a time.
    """
    resident = math.floor(rows * (1 - ratio))
    return rows - resident // ROWS_AT_ONCE * ROWS_AT_ONCE


@dataclass
class Part:
    """Consecutive rows of a shard."""

    rows: slice
    state: AdamState  # of these rows
    executor: Executor | None = None  # steps states in host memory; None: they are resident
    _written: Event = None  # when the last visits have ended

    def visits(self, target: Target) -> Iterator[Visit]:
        """Yield chunks to be swept, each before the next is requested. target: of the whole shard."""
        if self.executor is None:
            yield Visit(self.rows, self.state, replace(target, weights=target.weights[self.rows]))
            return
        yield from self.executor.visits(self.state, self.rows.start, target, self._written)
        self._written = self.executor.mark()

    @property
    def cuts(self) -> Iterator[slice]:
        """Yield the rows of the shard as they are visited."""
        if self.executor is None:
            yield self.rows
            return
        for rows in chunks_of(self.rows.stop - self.rows.start, self.executor.rows):
            yield slice(self.rows.start + rows.start, self.rows.start + rows.stop)

    def among(self, rows: slice) -> slice:
        """Return the rows of this part that are among the shard's `rows`; an empty slice if none is."""
        start = max(self.rows.start, rows.start)
        stop = max(start, min(self.rows.stop, rows.stop))
        return slice(start - self.rows.start, stop - self.rows.start)

    def settle(self) -> None:
        """Wait until the states hold the results of the last sweep."""
        if self.executor is not None:
            self.executor.settle()


class Residence:
    """Where the states of a rank's shards live, and their memory.

    formats: of master, exp_avg and exp_avg_sq. away: host memory for `ratio` of every shard's rows;
    None: all are resident.
    """

    def __init__(
        self,
        block_size: int,
        formats: Sequence[Format],
        device: torch.device,
        *,
        stores_sqrt: bool = True,
        away: "Away | None" = None,
        ratio: float = 1.0,
    ) -> None:
        self._block_size, self._formats, self.device = block_size, formats, device
        self._stores_sqrt = stores_sqrt
        self.away, self.ratio = away, ratio

    def parts(self, rows: int) -> tuple[Part, ...]:
        """Create the parts of a shard of `rows` rows, filled with zeros."""
        away = offloaded_rows(rows, self.ratio) if self.away else 0
        here = slice(0, rows - away)
        parts = [Part(here, self._states(partial(_zeros, self.device), here.stop))]
        if self.away is not None and away:
            states = self._states(self.away.arena.blocks, away)
            parts.append(Part(slice(here.stop, rows), states, self.away.executor))
        return tuple(each for each in parts if each.rows.stop > each.rows.start or not rows)

    def _states(self, make: Callable[[int, int, Format], Blocks], rows: int) -> AdamState:
        master, exp_avg, exp_avg_sq = (make(rows, self._block_size, fmt) for fmt in self._formats)
        return AdamState(master, exp_avg, exp_avg_sq, stores_sqrt=self._stores_sqrt)

    def close(self) -> None:
        """Free the memory once no copy is under way."""
        if self.away is not None:
            self.away.close()


@dataclass(frozen=True)
class Away:
    """Host memory for states, and the executor that steps them."""

    arena: Arena
    executor: Ring | HostSweep
    landing: Arena | None = None  # for other data that is copied, if states are not

    @property
    def host_bytes(self) -> int:
        return self.arena.nbytes

    @property
    def landing_bytes(self) -> int:
        return self.landing.nbytes if self.landing else 0

    @property
    def pinned_bytes(self) -> int:
        return sum(each.nbytes for each in (self.arena, self.landing) if each and each.pinned)

    def close(self) -> None:
        """Free the memory; no copy may be under way."""
        self.executor.close()
        self.arena.close()
        if self.landing:
            self.landing.close()


def _zeros(device: torch.device, rows: int, block_size: int, fmt: Format) -> Blocks:
    return Blocks.zeros(rows, block_size, fmt, device)


def streamed(
    rows: Sequence[int],
    block_size: int,
    formats: Sequence[Format],
    device: torch.device,
    backend: Backend,
    *,
    pinned: bool = True,
    ratio: float = 1.0,
) -> Residence:
    """Create the residence of shards whose states visit the device. rows: of each; backend: the device's.

    Raises ValueError if there is too little memory.
    """
    nbytes = arena_bytes(rows, block_size, formats, ratio)
    refuse_too_much(nbytes)
    arena = Arena(nbytes, device if pinned else None)
    longest = max((offloaded_rows(each, ratio) for each in rows), default=0)
    ring = Ring(chunk_rows(block_size, longest), block_size, formats, device, backend)
    return Residence(block_size, formats, device, away=Away(arena, ring), ratio=ratio)


def swept_on_host(
    rows: Sequence[int],
    block_size: int,
    formats: Sequence[Format],
    device: torch.device,
    backend: Backend,
    landing: Arena,
    row_bytes: int,
) -> Residence:
    """Create the residence of shards whose states the host sweeps. rows: of each shard; backend: the host's.

    landing: has room for `staging_bytes`; row_bytes: of a row of weights.
    """
    arena = Arena(arena_bytes(rows, block_size, formats, 1.0), None)
    host = HostSweep(chunk_rows(block_size, max(rows)), row_bytes, device, backend, landing)
    return Residence(block_size, formats, device, away=Away(arena, host, landing))


def staging_bytes(rows: Sequence[int], block_size: int, row_bytes: int) -> int:
    """Return the bytes of host memory for weights on their way up."""
    return STAGED * aligned(chunk_rows(block_size, max(rows)) * row_bytes)


def arena_bytes(rows: Sequence[int], block_size: int, formats: Sequence[Format], ratio: float) -> int:
    """Return the bytes of host memory for shards. rows: of each."""
    away = [offloaded_rows(each, ratio) for each in rows]
    return sum(room_of(each, block_size, fmt) for each in away for fmt in formats)


def move(old: Sequence[Part], new: Sequence[Part]) -> None:
    """Copy the states of a shard to their new place."""
    for source in old:
        source.settle()
        for target in new:
            here, there = source.among(target.rows), target.among(source.rows)
            copy(source.state[here], target.state[there])


def nbytes_of(state: AdamState) -> int:
    """Return the bytes of codes and scales."""
    blocks: list[Blocks] = [getattr(state, name) for name in STATES]
    return sum(each.nbytes for each in blocks)
