"""Kernels that Triton compiled are kept: C++ launches them by their handles."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_fp8.ops.triton import launching


def test_of_two_compilations_the_first_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton unloads a compilation that nobody holds."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(launching, "_compiled", {})
    begun, compiled = [], []

    class Kernel:
        fn = "kernel"
        params = (SimpleNamespace(name="count", is_constexpr=False, do_not_specialize=False),)

        def __getitem__(self, grid: Any) -> Any:
            return self.compile

        def compile(self, **_: object) -> object:
            begun.append(self)
            if len(begun) == 1:
                launch()  # another thread compiles the same meanwhile
            compiled.append(object())
            return compiled[-1]

    def launch() -> None:
        launching._launch_here(Kernel(), 1, 4, None, {"count": 3})

    launch()
    assert len(compiled) == 2
    assert list(launching._compiled.values()) == [launching.latest()] == compiled[:1]
