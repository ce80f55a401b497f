"""The number of threads of the C++ kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_asked: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Kernels called within run on `count` threads, whatever torch and OMP_NUM_THREADS say."""
    token = _asked.set(count)
    try:
        yield
    finally:
        _asked.reset(token)


def thread_count() -> int:
    """Threads of a kernel that is called now."""
    return _asked.get() or torch.get_num_threads()
