"""How states that live in host memory are stepped: chunk by chunk, by one of two executors.

A visit is a chunk that is ready to be swept: its states, the weights that are written with them, and the
other tensors of a sweep, all in one memory, the device's (`ring`) or the host's (`host_sweep`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.zero_fp8.states.lanes import Event

CHUNK = 1 << 23  # elements of a chunk
STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Target:
    """Tensors of a sweep on the device other than states and gradient."""

    weights: Tensor  # [rows of the shard, block size]
    control: Tensor  # as `ops.adam.Sweep`
    counts: Tensor | None  # as `ops.adam.Sweep`


@dataclass(frozen=True)
class Visit:
    """A chunk that is to be swept before the next is requested."""

    rows: slice  # of the shard
    state: AdamState
    target: Target  # its weights are those of the rows


class Executor(Protocol):
    """Steps states that live in host memory."""

    @property
    def backend(self) -> Backend:
        """The kernels that sweep."""

    @property
    def memory(self) -> torch.device:
        """The device on which the kernels run."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def rows(self) -> int:
        """Rows per chunk."""

    def visits(self, home: AdamState, first: int, target: Target, written: Event) -> Iterator[Visit]:
        """Yield chunk after chunk of the states `home`, whose first row is row `first` of the shard.

        written: when the last writes to `home` have finished.
        """

    def mark(self) -> Event:
        """Return an event after which all chunks swept so far are back in host memory."""

    def settle(self) -> None:
        """Wait until all states are back in host memory."""

    def close(self) -> None:
        """Free the executor's memory once no copy is under way."""


def chunk_rows(block_size: int, most: int) -> int:
    """Return the rows of a chunk; most: rows of the longest shard."""
    return min(CHUNK // block_size, most)


def chunks_of(rows: int, step: int) -> Iterator[slice]:
    """Yield rows in chunks."""
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def byte_tensors(state: AdamState) -> list[Tensor]:
    """Return the codes and scales of the states."""
    blocks: list[Blocks] = [getattr(state, name) for name in STATES]
    found = [(each.codes.view(torch.uint8), each.scales) for each in blocks]
    return [tensor for pair in found for tensor in pair if tensor is not None]


def copy(source: AdamState, target: AdamState, *, waits: bool = True) -> None:
    """Copy states of the same formats; waits: whether the host waits, for copies from or to a GPU."""
    for ours, theirs in zip(byte_tensors(source), byte_tensors(target), strict=True):
        theirs.copy_(ours, non_blocking=not waits)


def room_like(state: AdamState, rows: int, device: torch.device) -> AdamState:
    """Create zeros for `rows` rows of states of the same formats."""
    master, exp_avg, exp_avg_sq = (
        Blocks.zeros(rows, each.block_size, each.format, device)
        for each in (state.master, state.exp_avg, state.exp_avg_sq)
    )
    return AdamState(master, exp_avg, exp_avg_sq, stores_sqrt=state.stores_sqrt)
