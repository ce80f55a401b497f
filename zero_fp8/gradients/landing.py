"""Reduced gradients that live in host memory: each bucket comes down when its exchange has landed.

The first exchange of a step is added up on the device and comes down as it is stored: 1.008 bytes
per element in E4M3. Later ones (micro-steps, late gradients) are added by the host, in FP32, in the same
order, to the same bits: the ranks' messages come down as they are or, if these are more bytes, their FP32
sum. The host adds on a thread of its own, so that backward goes on.

Device and host have two buffers each. If none is free, work waits: the device's stream for the
device's, the thread that launches backward for the host's.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import FP32
from ds_fp8.zero_fp8.gradients.exchange import blocks_in
from ds_fp8.zero_fp8.gradients.reduced import Sum
from ds_fp8.zero_fp8.offload.sizes import LANDING
from ds_fp8.zero_fp8.placement.messages import Message
from ds_fp8.zero_fp8.states.arena import Arena
from ds_fp8.zero_fp8.states.lanes import Event, Lane, follow, mark, wait


@dataclass
class DeviceBuffer:
    """Room for a bucket's sum on the device."""

    room: Tensor  # uint8
    free: Event = None  # when the last sum has come down


@dataclass
class HostBuffer:
    """Room for what the host adds."""

    room: Tensor  # uint8
    added: "Future[Tensor] | None" = None


class Landing:
    """Buffers, streams and thread that all buckets of a run share on the way to host memory."""

    def __init__(
        self, device: torch.device, backend: Backend, arena: Arena, on_device: int, on_host: int
    ) -> None:
        """backend: of the host. on_device, on_host: bytes of a buffer, of which `arena` has the latter."""
        self.device, self.backend = device, backend
        self.lane = Lane(device)
        self._on_device = [
            DeviceBuffer(torch.empty(on_device, dtype=torch.uint8, device=device), mark(device))
            for _ in range(LANDING)
        ]
        self._on_host = [HostBuffer(arena.tensor((on_host,), torch.uint8)) for _ in range(LANDING)]
        self._worker = ThreadPoolExecutor(1, "ds_fp8 adds gradients")

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on the device."""
        return sum(each.room.nbytes for each in self._on_device)

    def close(self) -> None:
        """End the thread, and give up the buffers."""
        self._worker.shutdown()
        self._on_device.clear()
        self._on_host.clear()

    def bring(self, total: Sum, arrived: Sequence[Blocks], home: Blocks) -> tuple[Tensor, Event]:
        """Add messages up on the device, and copy the sum home; its norm's parts, and when it is there."""
        buffer, message = self._next_on_device(), Message(len(home), home.block_size, home.format)
        there = blocks_in(self._room(buffer, message.nbytes), message)
        parts = total.add(arrived, there, overwrite=True)
        assert isinstance(parts, Tensor)
        with self.lane.after(mark(self.device)):
            home.codes.view(torch.uint8).copy_(there.codes.view(torch.uint8), non_blocking=True)
            if home.scales is not None and there.scales is not None:
                home.scales.copy_(there.scales, non_blocking=True)
        self.lane.keep(there.codes)
        buffer.free = self.lane.mark()
        return parts, buffer.free

    def add(self, total: Sum, arrived: Sequence[Blocks], home: Blocks) -> "Future[Tensor]":
        """Have the host add messages to what is at home; the norm's parts of the result, on the device."""
        rows, size = len(home), home.block_size
        message, wide = Message(rows, size, arrived[0].format), Message(rows, size, FP32)
        if message.nbytes * len(arrived) > wide.nbytes:
            device_buffer = self._next_on_device()
            there = blocks_in(self._room(device_buffer, wide.nbytes), wide)
            total.add(arrived, there, overwrite=True)
            arrived, message = [there], wide
        buffer = self._next_on_host()
        room = buffer.room
        if room.nbytes < message.nbytes * len(arrived):  # a second exchange without micro-steps
            room = torch.empty(message.nbytes * len(arrived), dtype=torch.uint8)
        pieces = [blocks_in(room[number * message.nbytes :], message) for number in range(len(arrived))]
        with self.lane.after(mark(self.device)):
            for there, piece in zip(arrived, pieces, strict=True):
                piece.codes.view(torch.uint8).copy_(there.codes.view(torch.uint8), non_blocking=True)
                if piece.scales is not None and there.scales is not None:
                    piece.scales.copy_(there.scales, non_blocking=True)
        for there in arrived:
            self.lane.keep(there.codes)
        came = self.lane.mark()
        if message is wide:
            device_buffer.free = came
        buffer.added = self._worker.submit(self._add, came, pieces, home)
        return buffer.added

    def _add(self, came: Event, pieces: Sequence[Blocks], home: Blocks) -> Tensor:
        """Add messages to the gradient; runs on the host's thread."""
        wait(came)
        return self.backend.accumulate(pieces, home, overwrite=False).to(self.device)

    def _next_on_device(self) -> DeviceBuffer:
        self._on_device.append(self._on_device.pop(0))
        follow(self.device, self._on_device[-1].free)
        return self._on_device[-1]

    def _next_on_host(self) -> HostBuffer:
        self._on_host.append(self._on_host.pop(0))
        added = self._on_host[-1].added
        if added is not None:
            added.result()
        return self._on_host[-1]

    def _room(self, buffer: DeviceBuffer, nbytes: int) -> Tensor:
        if buffer.room.nbytes >= nbytes:
            return buffer.room
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)  # larger than planned


@dataclass
class HostSum:
    """How a bucket's messages add up in host memory."""

    on_device: Sum  # how messages add up there
    landing: Landing
    _landed: Event = None
    _added: "list[Future[Tensor]]" = field(default_factory=list)  # since what has arrived was last waited for

    def add(
        self, arrived: Sequence[Blocks], gradient: Blocks, *, overwrite: bool
    ) -> "Tensor | Future[Tensor]":
        if overwrite:
            parts, self._landed = self.landing.bring(self.on_device, arrived, gradient)
            return parts
        added = self.landing.add(self.on_device, arrived, gradient)
        self._added.append(added)
        return added

    def forget(self) -> None:
        self.settle()
        self.on_device.forget()

    def settle(self) -> None:
        """Wait until what has arrived has been added up in host memory."""
        wait(self._landed)
        for each in self._added:
            each.result()
        self._landed = None
        self._added.clear()
