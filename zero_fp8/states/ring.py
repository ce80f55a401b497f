"""Offloaded states visit the device: chunk after chunk is uploaded, swept and downloaded.

Three buffers and two side streams are created once. While one chunk is swept, the next is uploaded and the
previous one downloaded, so that the link is busy in both directions; an O2 chunk of 8 million parameters
takes a millisecond of it. The host launches all of it and waits for none: events mark when a buffer is free
and when a chunk has arrived. On a CPU the same code copies one chunk after the other.

A step that the device skips downloads what was uploaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.states.lanes import Event, Lane, follow, mark
from ds_fp8.zero_fp8.states.visits import Target, Visit, byte_tensors, chunks_of, copy

BUFFERS = 3


@dataclass
class Buffer:
    """Device memory for a chunk."""

    state: AdamState
    free: Event  # when the last chunk has been downloaded


class Ring:
    """The executor *stream*: the buffers that all shards of a rank share."""

    name = "stream"

    def __init__(
        self, rows: int, block_size: int, formats: Sequence[Format], device: torch.device, backend: Backend
    ) -> None:
        """rows: of a chunk; formats: of master, exp_avg and exp_avg_sq; backend: the device's."""
        self.rows, self.backend = rows, backend
        self.device = self.memory = device
        self._buffers = []
        for _ in range(BUFFERS):
            master, exp_avg, exp_avg_sq = (Blocks.zeros(rows, block_size, fmt, device) for fmt in formats)
            self._buffers.append(Buffer(AdamState(master, exp_avg, exp_avg_sq), mark(device)))
        self._turn = 0
        self._up, self._down = Lane(device), Lane(device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on the device."""
        return sum(tensor.nbytes for each in self._buffers for tensor in byte_tensors(each.state))

    def visits(self, home: AdamState, first: int, target: Target, written: Event) -> Iterator[Visit]:
        """As `Executor.visits`."""
        for rows in chunks_of(len(home.master), self.rows):
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % BUFFERS
            here = buffer.state[: rows.stop - rows.start]
            with self._up.after(written, buffer.free):
                copy(home[rows], here, waits=False)
            follow(self.device, self._up.mark())
            of_shard = slice(first + rows.start, first + rows.stop)
            yield Visit(of_shard, here, replace(target, weights=target.weights[of_shard]))
            with self._down.after(mark(self.device)):
                copy(here, home[rows], waits=False)
            buffer.free = self._down.mark()

    def mark(self) -> Event:
        """As `Executor.mark`."""
        return self._down.mark()

    def settle(self) -> None:
        """As `Executor.settle`."""
        self._down.wait()

    def close(self) -> None:
        """As `Executor.close`."""
        self.settle()
        self._buffers.clear()
