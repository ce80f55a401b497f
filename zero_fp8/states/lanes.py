"""Side streams of a device, on which copies travel while something else computes; on a CPU nothing."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Event = torch.cuda.Event | None  # None on a CPU, where whatever has been called is done


class Lane:
    """A stream of the device; on a CPU nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def after(self, *events: Event) -> AbstractContextManager[object]:
        """Work launched within waits for these events."""
        if self._stream is None:
            return nullcontext()
        for event in filter(None, events):
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def mark(self) -> Event:
        """All that has been launched so far."""
        return None if self._stream is None else self._stream.record_event()

    def keep(self, tensor: Tensor) -> None:
        """Keep the tensor's memory from being reused until what has been launched so far is done."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

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


def wait(event: Event) -> None:
    """Let the host wait for an event."""
    if event is not None:
        event.synchronize()
