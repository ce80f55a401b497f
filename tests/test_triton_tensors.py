"""One scale per tensor as Triton kernels: the reference's bits."""

from dataclasses import replace
from itertools import cycle

import pytest
from tensor_checks import SWEEPS, check_a_skipped_step, check_accumulate, check_quantize, check_steps
from triton_support import CONVERSIONS, TRITON, conversion, each_conversion

from ds_fp8.ops.backend import triton_tensor_backend
from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP16, FP32, Format

OURS = replace(TRITON, ops=triton_tensor_backend())
SIZES = (1, 31, 128, 4097)
FORMATS = (E4M3, E5M2, FP16, BF16, FP32)
PAIRS = list(zip(SWEEPS, cycle(CONVERSIONS), strict=False))


@each_conversion(*FORMATS)
def test_quantize(fmt: Format, hardware: bool) -> None:
    with conversion(hardware):
        for seed, numel in enumerate(SIZES):
            check_quantize(OURS, fmt, numel, seed)


@each_conversion(*FORMATS)
def test_accumulate(fmt: Format, hardware: bool) -> None:
    with conversion(hardware):
        for overwrite in (True, False):
            for numel in SIZES:
                check_accumulate(OURS, fmt, numel, overwrite=overwrite)


@pytest.mark.parametrize(
    ("formats", "hardware"), list(zip(SWEEPS, cycle(CONVERSIONS), strict=False)), ids=str
)
def test_sweep(formats: tuple[str, str, str, str], hardware: bool) -> None:
    with conversion(hardware):
        check_steps(OURS, formats, len(formats[0]), longest=9, steps=2)


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    check_a_skipped_step(OURS)
