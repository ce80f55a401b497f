"""The last cast of an input: q, k and v, or gate and up, get the same x and save the same codes.

A cast is shared within one forward of the model, or one backward that does forwards again: there x is a value
between layers. Between forwards it may be a buffer that was refilled in a way that torch does not count. A
cast is dropped if its input dies, if the next input is cast, or if a backward begins, so that it never
outlives its use by the graph. In a CUDA graph each product casts for itself: a replay recomputes only what
was captured in it, from the current contents of the input's memory.

Under ZeRO 3 DeepSpeed's hooks give each module an alias of its own. There an alias that autograd follows is
known by its storage and by its version, which it shares; its cast lives until the forward ends, or a part of
the model that has parts of its own.
"""

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Module

from ds_fp8.ops.capture import captured
from ds_fp8.ops.products import CastInput


class _Forward(threading.local):
    """The forward that this thread runs."""

    number = 0  # 0: none


_forward = _Forward()
_numbers = itertools.count(1)


def begin_forward(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _forward.number = next(_numbers)


def end_forward(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _forward.number = 0
    end_part()


def end_part(*_: Any) -> None:
    """Drop casts: what follows, such as a head and a loss, may need the memory."""
    if not torch.compiler.is_compiling():
        for each in list(_all):
            each.clear()


def share_in_forwards_of(model: Module) -> None:
    """Share casts within each forward of the model. Its hooks are functions, which can be pickled."""
    if begin_forward in model._forward_pre_hooks.values():
        return
    model.register_forward_pre_hook(begin_forward, prepend=True)
    model.register_forward_hook(end_forward, always_call=True)
    for part in model.children():
        if any(True for _ in part.children()):
            part.register_forward_hook(end_part)


class Moment(NamedTuple):
    """What is the same while a tensor still has the values that were cast."""

    forward: int
    backward: int
    version: int
    address: int
    stream: int

    @classmethod
    def now(cls, x: Tensor) -> "Moment | None":
        """Return None if nothing is shared.

        An inference tensor has no version, and one of the compiler's CUDA graphs is written by each replay.
        """
        at = _forward.number, torch._C._current_graph_task_id()
        replayed = torch._C._is_cached_tensor(x)  # type: ignore[attr-defined]
        if at == (0, -1) or replayed or x.is_inference() or captured(x):
            return None
        return cls(*at, x._version, x.data_ptr(), _stream(x))


class Alias:
    """An input that is known by its storage; its address in it is the moment's."""

    def __init__(self, x: Tensor) -> None:
        self._storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        self._layout = x.shape, x.stride(), x.dtype

    def is_alias_of(self, x: Tensor) -> bool:
        """A tensor that autograd does not follow may have a version of its own, as `x.data` has."""
        alike = x.requires_grad and (x.shape, x.stride(), x.dtype) == self._layout
        return alike and self._storage.cdata == x.untyped_storage()._cdata  # kept from reuse by the reference


class Last(NamedTuple):
    input: weakref.ref[Tensor] | Alias
    moment: Moment
    cast: CastInput

    def is_of(self, x: Tensor, moment: Moment) -> bool:
        if self.moment != moment:
            return False
        return self.input.is_alias_of(x) if isinstance(self.input, Alias) else self.input() is x


class SharedCasts:
    """Keeps one cast at most."""

    def __init__(self) -> None:
        self._last: Last | None = None  # replaced as a whole, since forwards may run in threads
        _all.add(self)

    def of(
        self, x: Tensor, wgrad: bool, make: Callable[[], CastInput], *, aliases: bool = False
    ) -> CastInput:
        """Return the cast of x: the last one if it still equals what `make` would give.

        aliases: modules get aliases of x.
        """
        last, moment = self._last, Moment.now(x)
        if moment is None:
            return make()
        if last is not None and last.is_of(x, moment) and (last.cast.wgrad is not None or not wgrad):
            return last.cast
        cast = make()
        known_by = Alias(x) if aliases and x.requires_grad else weakref.ref(x, self._forget)
        self._last = Last(known_by, moment, cast)
        return cast

    def clear(self) -> None:
        self._last = None

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last.input is dead:
            self._last = None


_all: "weakref.WeakSet[SharedCasts]" = weakref.WeakSet()


def _stream(x: Tensor) -> int:
    """Return the current stream; another stream may not have the cast yet."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
