"""Offloaded states visit the device: chunk after chunk is uploaded, swept and downloaded.

Three buffers and two side streams, made once. While one chunk is swept, the next comes up and the one before
goes down, so that the link is busy both ways; an O2 chunk of 8 million parameters takes a millisecond of it.
The host launches all of it and waits for none: events say when a buffer is free and when a chunk has come.
On a CPU the same code copies, one thing after the other.

A step that the device skips downloads what was uploaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format

BUFFERS = 3
CHUNK = 1 << 23  # elements of a chunk
STATES = ("master", "exp_avg", "exp_avg_sq")

Event = torch.cuda.Event | None  # None on a CPU, where whatever has been called is done


def chunk_rows(block_size: int, most: int) -> int:
    """Rows of a chunk; most: of the longest shard."""
    return min(CHUNK // block_size, most)


def byte_tensors(state: AdamState) -> list[Tensor]:
    """Codes and scales of the states."""
    blocks: list[Blocks] = [getattr(state, name) for name in STATES]
    found = [(each.codes.view(torch.uint8), each.scales) for each in blocks]
    return [tensor for pair in found for tensor in pair if tensor is not None]


def copy(source: AdamState, target: AdamState, *, waits: bool = True) -> None:
    """Copy states of the same formats; waits: the host does, for copies from or to a GPU."""
    for ours, theirs in zip(byte_tensors(source), byte_tensors(target), strict=True):
        theirs.copy_(ours, non_blocking=not waits)


class Lane:
    """A stream of the device; on a CPU nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def after(self, *events: Event) -> AbstractContextManager[object]:
        """What is launched within comes when these events have."""
        if self._stream is None:
            return nullcontext()
        for event in filter(None, events):
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def mark(self) -> Event:
        """All that has been launched so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self) -> None:
        """Let the host wait for all that has been launched so far."""
        if self._stream is not None:
            self._stream.synchronize()


def mark(device: torch.device) -> Event:
    """All that the current stream has been given so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def follow(device: torch.device, event: Event) -> None:
    """Let the current stream wait for an event."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


@dataclass
class Buffer:
    """Room for a chunk on the device."""

    state: AdamState
    free: Event  # when the last chunk has left


class Ring:
    """The buffers that all shards of a rank share."""

    def __init__(
        self,
        rows: int,
        block_size: int,
        formats: Sequence[Format],
        device: torch.device,
    ) -> None:
        """rows: of a chunk; formats: of master, exp_avg and exp_avg_sq."""
        self.rows, self.device = rows, device
        self._block_size, self._formats = block_size, formats
        self._buffers = [Buffer(self.room(rows), mark(device)) for _ in range(BUFFERS)]
        self._turn = 0
        self._up, self._down = Lane(device), Lane(device)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for each in self._buffers for tensor in byte_tensors(each.state))

    def room(self, rows: int) -> AdamState:
        """States on the device, zeros."""
        master, exp_avg, exp_avg_sq = (
            Blocks.zeros(rows, self._block_size, fmt, self.device) for fmt in self._formats
        )
        return AdamState(master, exp_avg, exp_avg_sq)

    def visits(self, home: AdamState, written: Event) -> Iterator[tuple[slice, AdamState]]:
        """Chunk after chunk of states on the device: rows of `home`, and what is written back to them.

        written: when `home` holds what it was given last.
        """
        for first in range(0, len(home.master), self.rows):
            rows = slice(first, min(first + self.rows, len(home.master)))
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % BUFFERS
            here = buffer.state[: rows.stop - rows.start]
            with self._up.after(written, buffer.free):
                copy(home[rows], here, waits=False)
            follow(self.device, self._up.mark())
            yield rows, here
            with self._down.after(mark(self.device)):
                copy(here, home[rows], waits=False)
            buffer.free = self._down.mark()

    def mark(self) -> Event:
        """All downloads so far."""
        return self._down.mark()

    def settle(self) -> None:
        """Wait until every chunk is back."""
        self._down.wait()
