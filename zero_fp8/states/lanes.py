"""Side streams of a device, for copies during computation; no-ops on a CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Event = torch.cuda.Event | None  # None on a CPU, where every call has finished


class Lane:
    """A stream of the device; a no-op on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def after(self, *events: Event) -> AbstractContextManager[object]:
        """Make work launched within the `with` wait for these events."""
        if self._stream is None:
            return nullcontext()
        for event in filter(None, events):
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def mark(self) -> Event:
        """Return an event after all work launched so far."""
        return None if self._stream is None else self._stream.record_event()

    def keep(self, tensor: Tensor) -> None:
        """Keep the tensor's memory from being reused until the work launched so far is done."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def wait(self) -> None:
        """Make the host wait for all work launched so far."""
        if self._stream is not None:
            self._stream.synchronize()


def mark(device: torch.device) -> Event:
    """Return an event after all work launched so far on the current stream."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def follow(device: torch.device, event: Event) -> None:
    """Make the current stream wait for an event."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def wait(event: Event) -> None:
    """Make the host wait for an event."""
    if event is not None:
        event.synchronize()
