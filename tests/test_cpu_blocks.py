"""The C++ kernels for blocks equal the reference bit for bit, whatever the instruction set."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from cpu_support import CPP, ISAS, each_isa, running
from hypothesis import given, settings
from kernel_checks import (
    SOURCES,
    VECTORS,
    Source,
    Vector,
    check_counts,
    check_dequantize,
    check_every_code,
    check_few_elements,
    check_fp32,
    check_nasty_values,
    check_quantize,
    check_scales_at_their_boundaries,
    check_source,
)
from kernel_support import (
    ALL,
    DTYPES,
    ROW_KINDS,
    SCALED,
    assert_same,
    cycled,
    dirty,
    each_decoded_format,
    each_dtype,
    each_format,
    each_narrow_format,
    every_code,
    garbage,
    guarded,
    inner,
    rows_of,
)

from ds_fp8.ops import blocks
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.cpu import kernels
from ds_fp8.ops.formats import BF16, E4M3, FP16, FP32, Format

quick = settings(deadline=None, derandomize=True, max_examples=100)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable's name, what it holds and what it may hold."""
    monkeypatch.setenv("DS_FP8_CPU_ISA", "sse9")
    message = f"^DS_FP8_CPU_ISA: received 'sse9', allowed on this processor: {', '.join(ISAS)}$"
    with pytest.raises(ValueError, match=message):
        kernels.quantize(torch.zeros(32), dirty(1, 32, E4M3))


def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library", lambda: SimpleNamespace(best_isa=lambda: b"portable"))
    message = "^DS_FP8_CPU_ISA: received 'avx2', allowed on this processor: portable$"
    with pytest.raises(ValueError, match=message):
        kernels.kernels.__wrapped__("avx2")


@each_isa
@each_narrow_format
def test_every_code_is_decoded(fmt: Format, isa: str) -> None:
    """Without the reference, in blocks whose scale is one; NaN stands in no such block of E4M3."""
    codes = every_code(fmt).view(-1, 256)
    ones = torch.full((len(codes),), 127, dtype=torch.uint8) if fmt.scaled else None
    values = torch.full((codes.numel(),), 7.0)
    with running(isa):
        kernels.dequantize(Blocks(codes, ones, fmt), values)
    expected = codes.to(torch.float32).view(-1)
    assert_same(values, expected, fmt.name, free=expected.isnan() if fmt is E4M3 else None)


@each_isa
@pytest.mark.parametrize("source", [FP16, BF16], ids=lambda fmt: fmt.name)
def test_every_value_of_two_bytes_is_read(source: Format, isa: str) -> None:
    values = every_code(source)
    out = Blocks(garbage(256, 256, dtype=torch.float32), None, FP32)
    with running(isa):
        kernels.quantize(values, out)
    assert_same(out.codes.view(-1), values.to(torch.float32), source.name)


@each_isa
@each_format
def test_nasty_values_are_quantized(fmt: Format, isa: str) -> None:
    """Every code's value and every midpoint, with what lies on either side."""
    with running(isa):
        check_nasty_values(CPP, fmt, every=1)


@each_isa
@pytest.mark.parametrize("source", [FP16, BF16], ids=lambda fmt: fmt.name)
@each_format
def test_every_value_of_two_bytes_is_quantized(fmt: Format, source: Format, isa: str) -> None:
    """In order, and among values of unlike magnitude."""
    codes = every_code(source)
    shuffled = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    shuffled = shuffled[shuffled.isfinite()]
    values = torch.cat([codes, shuffled])
    with running(isa):
        check_quantize(CPP, values, dirty(-(-len(values) // 32), 32, fmt))


@each_isa
@pytest.mark.parametrize("fmt", SCALED, ids=lambda fmt: fmt.name)
def test_scales_at_their_boundaries(fmt: Format, isa: str) -> None:
    with running(isa):
        check_scales_at_their_boundaries(CPP, fmt)


@each_isa
@each_decoded_format
@each_dtype
def test_every_code_is_dequantized(fmt: Format, dtype: torch.dtype, isa: str) -> None:
    with running(isa):
        check_every_code(CPP, fmt, dtype)


@each_isa
@each_dtype
def test_fp32_is_dequantized(dtype: torch.dtype, isa: str) -> None:
    with running(isa):
        check_fp32(CPP, dtype, every=1)


@quick
@given(vector=VECTORS)
def test_any_vector_is_quantized(vector: Vector) -> None:
    """From anywhere in a buffer; the last block short by any number, rows of zeros after it."""
    for isa in ISAS:
        with running(isa):
            check_quantize(CPP, vector.values, vector.blocks)


@quick
@given(source=SOURCES)
def test_any_blocks_are_dequantized(source: Source) -> None:
    """Into a vector that ends inside a block, or blocks before the last, or has no element at all."""
    for isa in ISAS:
        with running(isa):
            check_source(CPP, source)


@each_isa
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33])
@each_format
def test_few_elements(fmt: Format, numel: int, isa: str) -> None:
    with running(isa):
        check_few_elements(CPP, fmt, numel)


@each_isa
@each_format
def test_rows_after_the_end_are_zero_blocks(fmt: Format, isa: str) -> None:
    """Far more of them than are worked on at a time."""
    outer = dirty(40, 32, fmt)
    with running(isa):
        kernels.quantize(torch.ones(33), inner(outer))
    codes, scales = inner(outer).codes.to(torch.float32), inner(outer).scales
    assert codes.count_nonzero() == 33
    assert not codes[2:].any()
    assert scales is None or (scales[2:] == 1).all()


@each_isa
def test_what_follows_the_blocks_is_kept(isa: str) -> None:
    """In a vector that is longer than they are."""
    source = inner(guarded(rows_of(["normal"] * 3, 32, seed=0), E4M3))
    found, expected = torch.full((2, 200), 7.0)
    with running(isa):
        kernels.dequantize(source, found)
    blocks.dequantize(source, expected)
    assert_same(found, expected, "vector")
    assert (found[96:] == 7.0).all()


@each_isa
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows", [1, 2, 67])
def test_threads_share_the_rows(rows: int, threads: int, isa: str) -> None:
    """Also where there are fewer rows than threads."""
    for fmt, dtype in product(ALL, DTYPES):
        values = rows_of(cycled(ROW_KINDS, rows), 64, seed=rows).to(dtype).view(-1)[:-5]
        outer = dirty(rows + 9, 64, fmt)
        with running(isa, threads):
            check_quantize(CPP, values, outer)
            check_dequantize(CPP, inner(outer), len(values), dtype)


@each_isa
@each_dtype
@each_format
def test_counts(fmt: Format, dtype: torch.dtype, isa: str) -> None:
    for threads in (1, 3):
        with running(isa, threads):
            check_counts(CPP, fmt, dtype)
