"""The last cast of an input: q, k and v, or gate and up, get the same x and save the same codes.

A cast is dropped if its input dies, if the next input is cast, or if a backward begins, so that it never
outlives its use by the graph. In a CUDA graph each product casts for itself: a replay recomputes only what
was captured in it, from the current contents of the input's memory.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fp8.ops.capture import captured
from ds_fp8.ops.products import CastInput


class Last(NamedTuple):
    input: weakref.ref[Tensor]
    version: int
    stream: int
    cast: CastInput


class SharedCasts:
    """Keeps one cast at most."""

    def __init__(self) -> None:
        self._last: Last | None = None  # replaced as a whole, since forwards may run in threads

    def of(self, x: Tensor, wgrad: bool, make: Callable[[], CastInput]) -> CastInput:
        """Return the cast of x: the last one if it still equals what `make` would give."""
        if x.is_inference() or captured(x):  # an inference tensor has no version
            return make()
        last, stream = self._last, _stream(x)
        known = last is not None and last.input() is x and (last.version, last.stream) == (x._version, stream)
        if last is not None and known and (last.cast.wgrad is not None or not wgrad):
            return last.cast
        cast = make()
        self._last = Last(weakref.ref(x, self._forget), x._version, stream, cast)
        return cast

    def clear(self) -> None:
        self._last = None

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last.input is dead:
            self._last = None


def _stream(x: Tensor) -> int:
    """Return the current stream; another stream may not have the cast yet."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
