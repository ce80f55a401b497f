"""The Triton kernels for blocks equal the reference bit for bit: every code, nasty values, every shape."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    SEVERAL,
    SOURCES,
    VECTORS,
    Source,
    Vector,
    check_counts,
    check_every_code,
    check_few_elements,
    check_fp32,
    check_nasty_values,
    check_quantize,
    check_quantize_vectors,
    check_scales_at_their_boundaries,
    check_source,
)
from kernel_support import (
    ALL,
    DECODED,
    NARROW,
    SCALED,
    assert_same,
    dirty,
    each_decoded_format,
    each_dtype,
    each_format,
    every_code,
    garbage,
    nasty_values,
    raw,
)
from torch import Tensor
from triton_support import CONVERSIONS, DEVICE, TRITON, conversion, each_conversion

from ds_fp8.ops.blocks import to_float32
from ds_fp8.ops.formats import E4M3, Format
from ds_fp8.ops.rounding import RANDOM_BITS, round_up_from_zero
from ds_fp8.ops.triton import launching
from ds_fp8.ops.triton import quantize_many as quantize_many_triton
from ds_fp8.ops.triton import rounding as rounding_triton
from ds_fp8.ops.triton import tiles as tiles_triton
from ds_fp8.ops.triton.launching import INTERPRETED

TILE = tl.constexpr(1 << 16 if INTERPRETED else 1 << 12)  # the interpreter pays by the tile

quick = settings(deadline=None, derandomize=True, max_examples=60)


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(codes, values, count, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(codes + i, mask=i < count, other=0)
    tl.store(values + i, tiles_triton.decode(x, FORMAT, HARDWARE), mask=i < count)


@triton.jit  # type: ignore[untyped-decorator]
def encode_kernel(values, codes, count, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(values + i, mask=i < count, other=0.0)
    tl.store(codes + i, tiles_triton.encode(x, FORMAT, HARDWARE), mask=i < count)


@triton.jit  # type: ignore[untyped-decorator]
def round_up_kernel(values, bits, codes, count, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(values + i, mask=i < count, other=0.0)
    random = tl.load(bits + i, mask=i < count, other=0).to(tl.uint32) << 8
    floor = (x > 0).to(tl.int32) << 23
    x *= tiles_triton.two_to_the(rounding_triton.exponent_shift(FORMAT))
    code = rounding_triton.round_up_from_zero(x, random, floor, FORMAT)
    tl.store(codes + i, code.to(codes.dtype.element_ty), mask=i < count)


def launch(kernel: Any, source: Tensor, *others: Tensor, **constants: object) -> None:
    tensors = [each.to(DEVICE) for each in (source, *others)]
    programs = -(-source.numel() // TILE.value)
    operands = dict(zip(kernel.arg_names, [*tensors, source.numel()], strict=False))
    launching.launch(kernel, programs, 4, **operands, **constants)
    others[-1].copy_(tensors[-1])


def readable(codes: Tensor, hardware: bool) -> Tensor:
    """All but the NaN of E4M3, which integers read as 480: it stands only in blocks that are not finite."""
    return codes if codes.dtype is not E4M3.dtype or hardware else codes[codes.to(torch.float32).isfinite()]


@each_conversion(*DECODED)
def test_every_code_is_decoded(fmt: Format, hardware: bool) -> None:
    codes = readable(every_code(fmt), hardware)
    values = torch.full(codes.shape, 7.0)
    with conversion(hardware):
        launch(decode_kernel, launching.raw(codes), values, FORMAT=fmt.name, HARDWARE=hardware)
    assert_same(values, to_float32(codes, fmt), fmt.name)


@each_conversion(*NARROW)
def test_every_nasty_value_is_encoded(fmt: Format, hardware: bool) -> None:
    values = nasty_values(fmt)
    if not fmt.scaled:
        values = torch.cat([values, torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])])
    codes = garbage(len(values), dtype=fmt.dtype)
    with conversion(hardware):
        launch(encode_kernel, values, launching.raw(codes), FORMAT=fmt.name, HARDWARE=hardware)
    assert_same(codes, values.to(fmt.dtype), fmt.name)


@each_decoded_format
@pytest.mark.parametrize("draw", [0, 1, 0x7FFFFF, 0x800000, 0xFFFFFF, None])
def test_every_nasty_value_is_rounded_stochastically(fmt: Format, draw: int | None) -> None:
    """All FP16 and BF16 values too: what is rounded up from zero is not negative."""
    values = nasty_values(fmt)
    values = values[(values >= 0) & ~values.signbit()]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(1 << RANDOM_BITS, values.shape, generator=generator, dtype=torch.int32)
    if draw is not None:
        bits.fill_(draw)
    codes = garbage(len(values), dtype=fmt.dtype)
    launch(round_up_kernel, values, bits, raw(codes), FORMAT=fmt.name)
    assert_same(codes, round_up_from_zero(values, bits, fmt), fmt.name)


@each_conversion(*ALL)
def test_nasty_values_are_quantized(fmt: Format, hardware: bool) -> None:
    with conversion(hardware):
        check_nasty_values(TRITON, fmt, every=1 if fmt.itemsize == 1 else 23)  # `encode` alone has seen all


@each_conversion(*SCALED)
def test_scales_at_their_boundaries(fmt: Format, hardware: bool) -> None:
    with conversion(hardware):
        check_scales_at_their_boundaries(TRITON, fmt)


@each_conversion(*DECODED)
@each_dtype
def test_every_code_is_dequantized(fmt: Format, dtype: torch.dtype, hardware: bool) -> None:
    with conversion(hardware):
        check_every_code(TRITON, fmt, dtype)


@each_dtype
def test_fp32_is_dequantized(dtype: torch.dtype) -> None:
    with conversion(hardware=False):
        check_fp32(TRITON, dtype, every=5)


@quick
@given(vector=VECTORS, hardware=st.sampled_from(CONVERSIONS))
def test_any_vector_is_quantized(vector: Vector, hardware: bool) -> None:
    """From anywhere in a buffer; the last block short by any number, none and one element included."""
    with conversion(hardware):
        check_quantize(TRITON, vector.values, vector.blocks)


@quick
@given(vectors=SEVERAL, hardware=st.sampled_from(CONVERSIONS))
def test_any_vectors_are_quantized_together(vectors: list[Vector], hardware: bool) -> None:
    """Of several dtypes, from anywhere in memory, some empty."""
    with conversion(hardware):
        check_quantize_vectors(TRITON, [each.values for each in vectors], [each.blocks for each in vectors])


@pytest.mark.parametrize("count", [64, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 63, 130))])
def test_a_launch_takes_64_vectors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Vectors of one tile and of several, so that programs find theirs in every place of the table."""
    launches = []

    def counting(*arguments: Any, **constants: Any) -> None:
        launches.append(arguments)
        launching.launch(*arguments, **constants)

    monkeypatch.setattr(quantize_many_triton, "launch", counting)
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, 150 * 32, (count,), generator=generator).tolist()
    vectors = [torch.randn(size, generator=generator).to(torch.bfloat16) for size in sizes]
    check_quantize_vectors(TRITON, vectors, [dirty(-(-size // 32), 32, E4M3) for size in sizes])
    assert len(launches) == -(-count // 64)


@quick
@given(source=SOURCES, hardware=st.sampled_from(CONVERSIONS))
def test_any_blocks_are_dequantized(source: Source, hardware: bool) -> None:
    """Into a vector that ends inside a block, or blocks before the last, or has no element at all."""
    with conversion(hardware):
        check_source(TRITON, source)


@each_format
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33])
def test_few_elements(fmt: Format, numel: int) -> None:
    with conversion(hardware=False):
        check_few_elements(TRITON, fmt, numel)


@each_dtype
@each_conversion(*ALL)
def test_counts(fmt: Format, hardware: bool, dtype: torch.dtype) -> None:
    with conversion(hardware):
        check_counts(TRITON, fmt, dtype)
