"""Offloaded states stay in place: the host sweeps them, and only weights and gradients are copied.

The reduced gradient has come down while backward ran (`gradients.landing`). Once the host knows whether the
step is taken, it sweeps chunk after chunk on its own cores, whatever OMP_NUM_THREADS says, into one of three
buffers of pinned memory, from which weights go up while the next chunk is swept. A split master needs the
weight whose lower bits it holds; that weight comes down while the previous chunk is swept. So an edit of a
weight counts, as it does on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.backend import Backend
from ds_fp8.zero_fp8.states.arena import Arena
from ds_fp8.zero_fp8.states.lanes import Event, Lane, follow, mark, wait
from ds_fp8.zero_fp8.states.visits import Target, Visit, chunks_of

BUFFERS = 3
HOST = torch.device("cpu")


@dataclass
class Buffer:
    """Host memory for the weights of a chunk."""

    room: Tensor  # uint8
    free: Event = None  # when its weights have been uploaded
    filled: Event = None  # when the weights that are read have been downloaded

    def rows(self, like: Tensor) -> Tensor:
        """Return a view of the buffer with the rows and dtype of `like`."""
        return self.room[: like.nbytes].view(like.dtype).view(like.shape)


class HostSweep:
    """The executor *host*."""

    name = "host"
    memory = HOST
    nbytes = 0  # of device memory

    def __init__(
        self, rows: int, row_bytes: int, device: torch.device, backend: Backend, arena: Arena
    ) -> None:
        """rows: of a chunk; row_bytes: of a row of weights; backend: the host's; arena: for the buffers."""
        self.rows, self.device, self.backend = rows, device, backend
        self._buffers = [Buffer(arena.tensor((rows * row_bytes,), torch.uint8)) for _ in range(BUFFERS)]
        self._turn = 0
        self._up, self._down = Lane(device), Lane(device)
        self._control: tuple[Tensor, Tensor] | None = None  # on the device and on the host

    def _on_host(self, control: Tensor) -> Tensor:
        """Make the host wait for the verdict, once per step."""
        if self._control is None or self._control[0] is not control:
            self._control = control, control.to(HOST)
        return self._control[1]

    def visits(self, home: AdamState, first: int, target: Target, written: Event) -> Iterator[Visit]:
        """As `Executor.visits`; none if the step is skipped."""
        control = self._on_host(target.control)
        if not control[1]:
            return
        before, counts = mark(self.device), None
        if target.counts is not None:
            counts = torch.zeros_like(target.counts, device=HOST)
        reads = home.master.format.split
        all_rows = list(chunks_of(len(home.master), self.rows))
        weights = [target.weights[first + rows.start : first + rows.stop] for rows in all_rows]
        ready = [self._prepare(weights[0], before, reads=reads)] if weights else []
        for number, rows in enumerate(all_rows):
            ready += [self._prepare(each, before, reads=reads) for each in weights[number + 1 :][:1]]
            buffer = ready.pop(0)
            wait(buffer.filled)
            here = buffer.rows(weights[number])
            of_shard = slice(first + rows.start, first + rows.stop)
            yield Visit(of_shard, home[rows], Target(here, control, counts))
            with self._up.after(before):
                weights[number].copy_(here, non_blocking=True)
            buffer.free = self._up.mark()
        follow(self.device, self._up.mark())
        if target.counts is not None and counts is not None:
            target.counts.add_(counts.to(self.device))

    def _prepare(self, weights: Tensor, before: Event, *, reads: bool) -> Buffer:
        """Return the next buffer once it is free; if weights are read, start their download."""
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % BUFFERS
        wait(buffer.free)
        if reads:
            with self._down.after(before):
                buffer.rows(weights).copy_(weights, non_blocking=True)
            buffer.filled = self._down.mark()
        return buffer

    def mark(self) -> Event:
        """As `Executor.mark`: the host's sweep has ended."""
        return None

    def settle(self) -> None:
        """As `Executor.settle`."""

    def close(self) -> None:
        """As `Executor.close`."""
        self._up.wait()
        self._buffers.clear()
