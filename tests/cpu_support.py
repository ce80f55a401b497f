"""What the tests of the C++ kernels share: the instruction sets of this processor, and threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernel_support import CPU, Kernels

from ds_fp8.ops.backend import cpu_backend
from ds_fp8.ops.cpu import build, kernels
from ds_fp8.ops.cpu.build import NO_COMPILER


def instruction_sets() -> list[str]:
    """Those that this processor runs; the best comes first, and each runs what follows it."""
    if build.compiler() is None and not build.library_path().exists():
        pytest.skip(NO_COMPILER, allow_module_level=True)
    sets = list(build.instruction_sets())
    return sets[sets.index(kernels.kernels(None).isa) :]


ISAS = instruction_sets()
CPP = Kernels(cpu_backend(), CPU)

each_isa = pytest.mark.parametrize("isa", ISAS)


@contextmanager
def running(isa: str, threads: int = 1) -> Iterator[None]:
    """The kernels of one instruction set, on `threads` threads."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, isa)
        assert kernels.load().isa == isa
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
