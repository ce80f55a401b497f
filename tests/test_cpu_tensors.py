"""One scale per tensor in C++: the reference's bits, on any threads and instruction set."""

from dataclasses import replace

import pytest
from cpu_support import CPP, each_isa, running
from tensor_checks import SWEEPS, check_a_skipped_step, check_accumulate, check_quantize, check_steps

from ds_fp8.ops.backend import cpu_tensor_backend
from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP16, FP32, Format

OURS = replace(CPP, ops=cpu_tensor_backend())
SIZES = (1, 31, 32, 100, 128, 4097, 20_000)
each_format = pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16, FP32], ids=lambda fmt: fmt.name)
each_count = pytest.mark.parametrize("threads", [1, 3])


@each_isa
@each_format
@each_count
def test_quantize(isa: str, fmt: Format, threads: int) -> None:
    with running(isa, threads):
        for seed, numel in enumerate(SIZES):
            check_quantize(OURS, fmt, numel, seed)


@each_isa
@each_format
@pytest.mark.parametrize("overwrite", [True, False])
def test_accumulate(isa: str, fmt: Format, overwrite: bool) -> None:
    with running(isa, 2):
        for numel in SIZES:
            check_accumulate(OURS, fmt, numel, overwrite=overwrite)


@each_isa
@each_count
def test_sweep(isa: str, threads: int) -> None:
    with running(isa, threads):
        for seed, formats in enumerate(SWEEPS):
            check_steps(OURS, formats, seed)


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    check_a_skipped_step(OURS)
