"""How kernels are launched on a GPU: Triton is asked once for each kind of call."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ds_fp8.ops.triton import launching


@dataclass
class Parameter:
    name: str
    is_constexpr: bool = False
    do_not_specialize: bool = False


@dataclass
class Kernel:
    """As Triton's: called through a grid it compiles, and what it compiled is called through one, too."""

    params: list[Parameter]
    fn: object = field(default_factory=object)
    compiled: int = 0
    calls: list[Any] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**arguments: Any) -> Any:
            self.compiled += 1
            assert arguments.pop("enable_fp_fusion") is False
            assert (arguments.pop("num_warps"), arguments.pop("maxnreg")) == (4, None)
            self.calls.append((grid, *arguments.values()))
            return Compiled(self)

        return run


@dataclass
class Compiled:
    kernel: Kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.kernel.calls.append((grid, *values))


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current devices, the last one on top; tensors in host memory say that they are on -1."""
    devices = [-1]

    @contextmanager
    def switch(device: int) -> Iterator[None]:
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: devices[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "device", switch)
    return devices


def test_a_kernel_runs_where_its_tensors_are(current: list[int]) -> None:
    current[:] = [5]
    seen = []

    class Watching(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(current[-1])
            return super().__getitem__(grid)

    launching.launch(Watching([Parameter("n"), Parameter("x")]), 1, 4, n=3, x=torch.zeros(2))
    assert seen == [-1]
    assert current == [5]


@pytest.mark.usefixtures("current")
def test_a_kernel_is_looked_up_once_per_kind_of_call() -> None:
    kernel = Kernel([Parameter("x"), Parameter("n"), Parameter("free", False, True), Parameter("WAY", True)])
    memory = torch.zeros(64, dtype=torch.float8_e4m3fn)

    def launch(x: torch.Tensor, n: Any, free: int = 3, way: str = "rows") -> bool:
        """Whether Triton compiled for it."""
        before = kernel.compiled
        launching.launch(kernel, 7, 4, WAY=way, free=free, n=n, x=x)
        return kernel.compiled > before

    assert launch(memory, 32)
    assert kernel.calls[-1][1:4] == ("rows", 3, 32)
    assert kernel.calls[-1][4].dtype is torch.uint8, "codes are bytes"
    assert not launch(memory, 48, free=16)
    assert kernel.calls[-1] == ((7, 1, 1), memory.data_ptr(), 48, 16, "rows"), "in the kernel's own order"
    assert not launch(torch.zeros(32, dtype=torch.uint8), 64)
    different: list[tuple[Any, ...]] = [
        (memory[1:], 32),
        (memory.float(), 32),
        (memory, 33),
        (memory, 1),
        (memory, 2**31),
        (memory, 32.0),
        (memory, 32, 2**31),
        (memory, 32, 3, "tiles"),
    ]
    assert all(launch(*each) for each in different)
    assert not any(launch(*each) for each in different)
