"""The Triton kernels for blocks equal the reference bit for bit: every code, nasty values, every shape."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_support import (
    CONVERSIONS,
    CPU,
    DEVICE,
    FLOAT32_MAX,
    ROW_KINDS,
    assert_same,
    assert_same_blocks,
    conversion,
    cycled,
    dirty,
    each_conversion,
    every_code,
    garbage,
    inner,
    nasty_values,
    neighbours,
    not_finite,
    raw,
    rows_of,
    special_values,
    to,
)

from ds_fp8.ops import blocks, blocks_triton, rounding_triton
from ds_fp8.ops.blocks import NOT_FINITE, Blocks
from ds_fp8.ops.blocks_triton import INTERPRETED
from ds_fp8.ops.formats import BF16, BY_NAME, E4M3, E5M2, FP16, FP32, Format
from ds_fp8.ops.rounding import round_up_from_zero

ALL = tuple(BY_NAME.values())
SCALED = tuple(fmt for fmt in ALL if fmt.scaled)
NARROW = (E4M3, E5M2, FP16, BF16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256)
TILE = tl.constexpr(1 << 16 if INTERPRETED else 1 << 12)  # the interpreter pays by the tile

each_format = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
each_narrow_format = pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
quick = settings(deadline=None, derandomize=True, max_examples=60)


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(codes, values, count, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(codes + i, mask=i < count, other=0)
    tl.store(values + i, blocks_triton.decode(x, FORMAT, HARDWARE), mask=i < count)


@triton.jit  # type: ignore[untyped-decorator]
def encode_kernel(values, codes, count, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(values + i, mask=i < count, other=0.0)
    tl.store(codes + i, blocks_triton.encode(x, FORMAT, HARDWARE), mask=i < count)


@triton.jit  # type: ignore[untyped-decorator]
def round_up_kernel(values, bits, codes, count, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(values + i, mask=i < count, other=0.0)
    random = tl.load(bits + i, mask=i < count, other=0).to(tl.uint32) << 16
    floor = (x > 0).to(tl.int32) << 23
    x *= blocks_triton.two_to_the(rounding_triton.exponent_shift(FORMAT))
    code = rounding_triton.round_up_from_zero(x, random, floor, FORMAT)
    tl.store(codes + i, code.to(codes.dtype.element_ty), mask=i < count)


def launch(kernel: Any, source: Tensor, *others: Tensor, **constants: object) -> None:
    tensors = [each.to(DEVICE) for each in (source, *others)]
    programs = -(-source.numel() // TILE.value)
    blocks_triton.launch(kernel, programs, 4, *tensors, source.numel(), **constants)
    others[-1].copy_(tensors[-1])


def readable(codes: Tensor, hardware: bool) -> Tensor:
    """All but the NaN of E4M3, which integers read as 480: it stands only in blocks that are not finite."""
    return codes if codes.dtype is not E4M3.dtype or hardware else codes[codes.to(torch.float32).isfinite()]


@each_conversion(*NARROW)
def test_every_code_is_decoded(fmt: Format, hardware: bool) -> None:
    codes = readable(every_code(fmt), hardware)
    values = torch.full(codes.shape, 7.0)
    with conversion(hardware):
        launch(decode_kernel, blocks_triton.raw(codes), values, FORMAT=fmt.name, HARDWARE=hardware)
    assert_same(values, codes.to(torch.float32), fmt.name)


@each_conversion(*NARROW)
def test_every_nasty_value_is_encoded(fmt: Format, hardware: bool) -> None:
    values = nasty_values(fmt)
    if not fmt.scaled:
        values = torch.cat([values, torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])])
    codes = garbage(len(values), dtype=fmt.dtype)
    with conversion(hardware):
        launch(encode_kernel, values, blocks_triton.raw(codes), FORMAT=fmt.name, HARDWARE=hardware)
    assert_same(codes, values.to(fmt.dtype), fmt.name)


@each_narrow_format
@pytest.mark.parametrize("draw", [0, 1, 0x7FFF, 0x8000, 0xFFFF, None])
def test_every_nasty_value_is_rounded_stochastically(fmt: Format, draw: int | None) -> None:
    """All FP16 and BF16 values too: what is rounded up from zero is not negative."""
    values = nasty_values(fmt)
    values = values[(values >= 0) & ~values.signbit()]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32)
    if draw is not None:
        bits.fill_(draw)
    codes = garbage(len(values), dtype=fmt.dtype)
    launch(round_up_kernel, values, bits, raw(codes), FORMAT=fmt.name)
    assert_same(codes, round_up_from_zero(values, bits, fmt), fmt.name)


def quantized(values: Tensor, outer: Blocks, hardware: bool) -> Blocks:
    """What the kernel makes of a copy of `outer`; the reference's work is left in `outer` itself."""
    twin = to(outer, DEVICE)
    with conversion(hardware):
        blocks_triton.quantize(values.to(DEVICE), inner(twin))
    blocks.quantize(values, inner(outer))
    return to(twin, CPU)


def in_rows(values: Tensor, block_size: int, anchor: float) -> Tensor:
    """Rows of values that end with an anchor, [rows, block size]; the last row is filled with zeros."""
    short = -len(values) % (block_size - 1)
    rows = torch.cat([values, torch.zeros(short)]).view(-1, block_size - 1)
    return torch.cat([rows, torch.full((len(rows), 1), anchor)], dim=1)


@each_conversion(*ALL)
def test_nasty_values_are_quantized(fmt: Format, hardware: bool) -> None:
    """With an anchor of the format's maximum, so that codes meet the values themselves, and without."""
    values = nasty_values(fmt)
    values = values[:: 1 if fmt.itemsize == 1 else 23]  # `encode` alone has seen them all
    others = special_values()[::3]
    anchors = (fmt.max, 0.0, -torch.inf, torch.nan)
    rows = torch.cat([in_rows(values, 64, anchor) for anchor in anchors[:2]])
    rows = torch.cat([rows, rows[:1] * 0.0, *(in_rows(others, 64, anchor) for anchor in anchors)])
    outer = dirty(len(rows), 64, fmt)
    twin = quantized(rows.view(-1), outer, hardware)
    assert_same_blocks(twin, outer, fmt.name)
    if outer.scales is not None:
        assert NOT_FINITE in inner(outer).scales.tolist()  # type: ignore[union-attr]


@each_conversion(*SCALED)
def test_scales_at_their_boundaries(fmt: Format, hardware: bool) -> None:
    """A block's maximum on, just below and just above every power of two times the format's maximum."""
    tops = torch.exp2(torch.arange(-160.0, 121.0, dtype=torch.float64)) * fmt.max
    sizes = neighbours(tops[tops <= FLOAT32_MAX].to(torch.float32))
    sizes = sizes[sizes.isfinite()]
    rows = torch.rand(len(sizes), 32, generator=torch.Generator().manual_seed(0)) * sizes[:, None]
    rows[torch.arange(len(sizes)), torch.arange(len(sizes)) % 32] = sizes
    rows[::2] *= -1
    outer = dirty(len(rows), 32, fmt)
    assert_same_blocks(quantized(rows.view(-1), outer, hardware), outer, fmt.name)
    assert len(inner(outer).scales.unique()) > 230  # type: ignore[union-attr]


def check_dequantize(source: Blocks, numel: int, dtype: torch.dtype, hardware: bool) -> None:
    """Into the first `numel` elements after eight; the others, a tile and more, stay what they are.

    What a block that is not finite decodes to is not finite either, and no more is promised.
    """
    expected = garbage(numel + 4096, dtype=dtype)
    found = expected.to(DEVICE, copy=True)
    with conversion(hardware):
        blocks_triton.dequantize(to(source, DEVICE), found[8 : 8 + numel])
    blocks.dequantize(source, expected[8 : 8 + numel])
    alike = not_finite if source.format.scaled else torch.isnan
    assert_same(found, expected, f"{source.format.name} as {dtype}", alike=alike)


@each_conversion(*NARROW)
@each_dtype
def test_every_code_is_dequantized(fmt: Format, dtype: torch.dtype, hardware: bool) -> None:
    """Every code with every scale where the code has 8 bits, with some of them where it has 16."""
    codes = every_code(fmt)
    if fmt.itemsize == 1:
        raw(codes)[codes.to(torch.float32).isnan()] = 0  # NaN stands in no block that is finite
        scales = torch.arange(1, 256)
    else:
        scales = torch.tensor([1, 2, 127, 255] if fmt.scaled else [127])
    rows = raw(codes).view(-1, 256).repeat(len(scales), 1).view(fmt.dtype)
    of_rows = scales.repeat_interleave(len(codes) // 256).to(torch.uint8) if fmt.scaled else None
    check_dequantize(Blocks(rows, of_rows, fmt), rows.numel(), dtype, hardware)


@each_dtype
def test_fp32_is_dequantized(dtype: torch.dtype) -> None:
    """Rounded to the vector's dtype, ties and values past its maximum included."""
    fmt = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}[dtype]
    values = torch.cat([nasty_values(fmt)[::5], special_values(), torch.tensor([torch.inf, torch.nan])])
    rows = in_rows(values, 64, 65520.0)
    check_dequantize(Blocks(rows, None, FP32), rows.numel(), dtype, hardware=False)


@quick
@given(
    fmt=st.sampled_from(ALL),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    rows=st.integers(0, 70),
    kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=6),
    missing=st.integers(0, 255),
    extra_rows=st.integers(0, 40),
    offset=st.integers(0, 17),
    hardware=st.sampled_from(CONVERSIONS),
    seed=st.integers(0, 1000),
)
def test_any_vector_is_quantized(
    *,
    fmt: Format,
    dtype: torch.dtype,
    block_size: int,
    rows: int,
    kinds: list[str],
    missing: int,
    extra_rows: int,
    offset: int,
    hardware: bool,
    seed: int,
) -> None:
    """From anywhere in a buffer; the last block short by any number, none and one element included."""
    values = rows_of(cycled(kinds, rows), block_size, seed).view(-1)
    numel = max(0, len(values) - missing % block_size)
    buffer = torch.cat([torch.full((offset,), torch.nan), values, torch.full((300,), torch.nan)]).to(dtype)
    outer = dirty(rows + extra_rows, block_size, fmt)
    twin = quantized(buffer[offset : offset + numel], outer, hardware)
    assert_same_blocks(twin, outer, f"{fmt.name} of {numel}")


@quick
@given(
    fmt=st.sampled_from(ALL),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    rows=st.integers(0, 70),
    kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=6),
    missing=st.one_of(st.integers(0, 255), st.integers(0, 10_000)),
    hardware=st.sampled_from(CONVERSIONS),
    seed=st.integers(0, 1000),
)
def test_any_blocks_are_dequantized(
    *,
    fmt: Format,
    dtype: torch.dtype,
    block_size: int,
    rows: int,
    kinds: list[str],
    missing: int,
    hardware: bool,
    seed: int,
) -> None:
    """Into a vector that ends inside a block, or blocks before the last, or has no element at all."""
    source = dirty(rows, block_size, fmt)
    blocks.quantize(rows_of(cycled(kinds, rows), block_size, seed).view(-1), inner(source))
    numel = max(0, rows * block_size - missing)
    check_dequantize(inner(source), numel, dtype, hardware)


@each_format
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33])
def test_few_elements(fmt: Format, numel: int) -> None:
    """No block, a block of one element, one that is one short or just full, and one element more."""
    values = torch.linspace(-3, 3, numel)
    outer = dirty(-(-numel // 32), 32, fmt)
    assert_same_blocks(quantized(values, outer, hardware=False), outer, fmt.name)
    check_dequantize(inner(outer), numel, torch.float32, hardware=False)
