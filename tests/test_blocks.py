"""Blocks: scales, nearest rounding, non-finite values, tails, chunks and temporaries.

What a block must hold is worked out here in exact arithmetic (fractions, or float64 where powers of
two keep it exact), never with the functions under test.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fp8.ops import blocks as blocks_module
from ds_fp8.ops.blocks import (
    NOT_FINITE,
    Blocks,
    chunks,
    decode,
    dequantize,
    encode,
    quantize,
    scale_exponents,
)
from ds_fp8.ops.formats import BF16, BY_NAME, E4M3, E5M2, FP16, FP32, Format

CPU = torch.device("cpu")
SCALED = (E4M3, E5M2, FP16)
UNSCALED = (FP32, BF16)
ALL = tuple(fmt for fmt in BY_NAME.values() if fmt.dtype.is_floating_point)
CODE_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
BLOCK_SIZES = (32, 64, 128, 256)

each_scaled_format = pytest.mark.parametrize("fmt", SCALED, ids=lambda fmt: fmt.name)
each_format = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)


def raw(codes: Tensor) -> Tensor:
    """Codes as integers, so that NaN and -0 compare by their bits."""
    return codes.view(CODE_DTYPE[codes.element_size()])


def every_code(fmt: Format) -> Tensor:
    """All codes of a format, in the order of their bits; the first half is not negative."""
    return torch.arange(1 << 8 * fmt.itemsize).to(CODE_DTYPE[fmt.itemsize]).view(fmt.dtype)


def dirty(rows: int, block_size: int, fmt: Format) -> Blocks:
    """Blocks full of what an earlier use may have left."""
    out = Blocks.zeros(rows, block_size, fmt, CPU)
    raw(out.codes).fill_(0x55)
    if out.scales is not None:
        out.scales.fill_(200)
    return out


def quantized(values: Tensor, fmt: Format, block_size: int = 32, extra_rows: int = 0) -> Blocks:
    out = dirty(-(-values.numel() // block_size) + extra_rows, block_size, fmt)
    quantize(values, out)
    return out


def values_of(blocks: Blocks) -> Tensor:
    out = torch.full((blocks.codes.numel(),), torch.nan)
    dequantize(blocks, out)
    return out


def assert_same_bytes(actual: Blocks, expected: Blocks) -> None:
    wrong = (raw(actual.codes) != raw(expected.codes)).nonzero()
    assert not len(wrong), f"first differing code at {wrong[0].tolist()}"
    if expected.scales is None:
        assert actual.scales is None
    else:
        assert actual.scales is not None
        assert actual.scales.tolist() == expected.scales.tolist()


def random_floats(count: int, seed: int) -> Tensor:
    """Finite FP32 values, uniform over the bit patterns: every exponent, and denormals."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (2 * count,), generator=generator).to(torch.int32)
    values = bits.view(torch.float32)
    return values[values.isfinite()][:count]


def smallest_exponent(amax: float, fmt: Format) -> int:
    """The smallest e in 1..254 with amax <= max * 2^(e - 127), in fractions."""
    largest = Fraction(torch.finfo(fmt.dtype).max)
    bounds = [largest * Fraction(2) ** (e - 127) for e in range(1, 255)]
    return bisect_left(bounds, Fraction(amax)) + 1


def nearest(scaled: Tensor, fmt: Format) -> Tensor:
    """Codes of float64 values, to the nearest of all the format's values, ties to the even code."""
    count = 1 << (8 * fmt.itemsize - 1)
    table = torch.arange(count).to(CODE_DTYPE[fmt.itemsize]).view(fmt.dtype).to(torch.float64)
    table = table[table.isfinite()]
    if fmt is BF16:  # no scale keeps its values in range: past the middle to 2^128 they overflow
        table = torch.cat([table, torch.tensor([2.0**128], dtype=torch.float64)])
    middles = (table[:-1] + table[1:]) / 2
    size = scaled.abs()
    code = torch.searchsorted(middles, size)  # middles below the value
    tie = (code < len(middles)) & (middles[code.clamp(max=len(middles) - 1)] == size)
    code = torch.where(tie & (code % 2 == 1), code + 1, code)
    return code + torch.where(scaled.signbit(), count, 0)


def amaxes(fmt: Format) -> Iterator[float]:
    """Magnitudes at which a wrong scale would show."""
    yield from random_floats(300, seed=1).abs().tolist()
    yield from (2.0**exponent for exponent in range(-149, 128, 3))
    yield from (torch.finfo(torch.float32).max, 2.0**-149, 3 * 2.0**-149, 2.0**-126)
    for exponent in (-140, -132, -127, -126, -60, -1, 0, 1, 40, 100):
        top = torch.tensor(fmt.max * 2.0**exponent)
        if top.isfinite() and top > 0:
            for towards in (torch.tensor(0.0), torch.tensor(torch.inf)):
                near = torch.nextafter(top, towards)
                yield from (top.item(), near.item()) if near.isfinite() else (top.item(),)


@each_scaled_format
def test_scale_is_the_smallest_that_fits(fmt: Format) -> None:
    sizes = [size for size in amaxes(fmt) if size > 0]
    rows = torch.empty(len(sizes), 32).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    rows *= torch.tensor(sizes)[:, None]
    for row, size in enumerate(sizes):
        rows[row, row % 32] = size if row % 2 else -size
    e = scale_exponents(rows, fmt)
    expected = [smallest_exponent(size, fmt) for size in sizes]
    wrong = [
        (size, got, want) for size, got, want in zip(sizes, e.tolist(), expected, strict=True) if got != want
    ]
    assert not wrong, f"(amax, e, smallest e that fits): {wrong[0]}"
    assert {1}.issubset(expected), "no block reaches the lowest scale"
    assert quantized(rows.view(-1), fmt).scales.tolist() == expected  # type: ignore[union-attr]


@each_format
def test_block_of_zeros(fmt: Format) -> None:
    values = torch.cat([torch.ones(32), torch.zeros(32), -torch.ones(32)])
    blocks = quantized(values, fmt)
    assert not raw(blocks.codes[1]).any()
    assert torch.equal(values_of(blocks), values)
    if blocks.scales is not None:
        assert blocks.scales[1] == 1


@each_format
def test_zero_decodes_to_zero_at_every_scale(fmt: Format) -> None:
    blocks = Blocks.zeros(254, 32, fmt, CPU)
    if blocks.scales is not None:
        blocks.scales.copy_(torch.arange(1, 255))
    raw(blocks.codes)[:, 16:] = -1 << (8 * fmt.itemsize - 1) if fmt.itemsize > 1 else 0x80  # -0
    assert not values_of(blocks).any()


@each_scaled_format
@pytest.mark.parametrize("bits", [0x7F800000, -0x800000, 0x7FC00000, -0x400000, 0x7F800001, -1], ids=hex)
@pytest.mark.parametrize("position", [0, 31])
def test_a_value_that_is_not_finite_spoils_its_block_only(fmt: Format, bits: int, position: int) -> None:
    values = random_floats(96, seed=2)
    alone = quantized(values, fmt)
    values[32 + position] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    blocks = quantized(values, fmt)
    assert blocks.scales is not None
    assert blocks.scales[1] == NOT_FINITE == 255
    assert not values_of(blocks)[32:64].isfinite().any()
    for neighbour in (slice(0, 1), slice(2, 3)):
        assert_same_bytes(blocks[neighbour], alone[neighbour])
        assert decode(blocks[neighbour]).isfinite().all()


@each_scaled_format
@pytest.mark.parametrize("factor", [1.0, -3.0, 2.0**-126, 0.0])
def test_a_block_that_is_not_finite_decodes_to_no_number_whatever_its_codes(
    fmt: Format, factor: float
) -> None:
    every = every_code(fmt).view(-1, 32)
    blocks = Blocks(every, torch.full((len(every),), NOT_FINITE, dtype=torch.uint8), fmt)
    assert not decode(blocks, factor).isfinite().any()
    assert not decode(blocks, torch.tensor(factor, dtype=torch.float32)).isfinite().any()
    assert not values_of(blocks).isfinite().any()


@pytest.mark.parametrize("fmt", UNSCALED, ids=lambda fmt: fmt.name)
def test_without_a_scale_values_that_are_not_finite_stand_for_themselves(fmt: Format) -> None:
    values = torch.ones(64)
    values[3:6] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    blocks = quantized(values, fmt)
    assert blocks.scales is None
    torch.testing.assert_close(values_of(blocks), values, rtol=0, atol=0, equal_nan=True)


HUGE = 2.0**127  # above it the largest values overflow, see below
finite_floats = st.floats(-HUGE, HUGE, width=32)
alike_floats = st.floats(0.5, 2, width=32) | st.floats(2.0**-16, 2.0**-2, width=32) | st.just(0.0)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(finite_floats, min_size=1, max_size=64) | st.lists(alike_floats, min_size=1, max_size=64),
    st.sampled_from(ALL),
)
def test_requantising_keeps_values(values: list[float], fmt: Format) -> None:
    once = values_of(quantized(torch.tensor(values), fmt))
    twice = values_of(quantized(once, fmt))
    assert torch.equal(once, twice)


@each_scaled_format
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
def test_the_largest_values_overflow_as_in_fp32(fmt: Format, value: float) -> None:
    """They round up to 2^128, which shows as inf, and only there: their neighbour is unharmed."""
    once = values_of(quantized(torch.tensor([value, value / 4]), fmt))
    assert once[0] == math.copysign(math.inf, value)
    assert once[1].isfinite()


@each_scaled_format
def test_requantising_keeps_every_code_at_every_scale_in_use(fmt: Format) -> None:
    """All finite codes under the largest one, at the ends and the middle of the range of scales."""
    every = every_code(fmt)
    every = every[every.to(torch.float32).isfinite()]
    rows = torch.nn.functional.pad(every, (0, -every.numel() % 31)).view(-1, 31)
    codes = torch.cat([torch.full((len(rows), 1), fmt.max).to(fmt.dtype), rows], dim=1)
    for e in (24, 127, 239):
        once = decode(Blocks(codes, torch.full((len(codes),), e, dtype=torch.uint8), fmt))
        assert torch.equal(values_of(quantized(once.reshape(-1), fmt)), once.view(-1))


@each_scaled_format
def test_rounding_goes_to_the_nearest_code(fmt: Format) -> None:
    values = random_floats(64 * 32, seed=3)
    spread = torch.randn(64 * 32, generator=torch.Generator().manual_seed(4)) * 1e-3
    for sample in (values, spread, spread * 1e-37, spread * 2.0**-139):
        blocks = quantized(sample, fmt)
        scales = [smallest_exponent(row.abs().max().item(), fmt) for row in sample.view(-1, 32)]
        factors = torch.tensor([2.0 ** (127 - e) for e in scales], dtype=torch.float64)
        expected = nearest(sample.view(-1, 32).to(torch.float64) * factors[:, None], fmt)
        assert torch.equal(raw(blocks.codes).to(torch.int64) & (1 << 8 * fmt.itemsize) - 1, expected)


@each_scaled_format
@pytest.mark.parametrize("exponent", [-100, 0, 7, 80])
def test_ties_go_to_the_even_code(fmt: Format, exponent: int) -> None:
    """Every middle between two codes, and the two FP32 values beside it."""
    positive = torch.arange(1 << (8 * fmt.itemsize - 1)).to(CODE_DTYPE[fmt.itemsize]).view(fmt.dtype)
    table = positive.to(torch.float32)
    table = table[table.isfinite()]
    middles = (table[:-1] + table[1:]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    scaled = torch.cat([middles, torch.nextafter(middles, up), torch.nextafter(middles, down)])
    scaled = torch.cat([scaled, -scaled])
    scaled = torch.nn.functional.pad(scaled, (0, -scaled.numel() % 31)).view(-1, 31)
    rows = torch.cat([torch.full((len(scaled), 1), fmt.max), scaled], dim=1)
    blocks = quantized((rows * 2.0**exponent).view(-1), fmt)
    expected = nearest(rows.to(torch.float64), fmt)
    assert torch.equal(raw(blocks.codes).to(torch.int64) & (1 << 8 * fmt.itemsize) - 1, expected)


def test_bf16_rounds_to_nearest_without_a_scale() -> None:
    values = random_floats(1 << 15, seed=5)
    ties = (values.view(torch.int32) & -0x10000 | 0x8000).view(torch.float32)
    sample = torch.cat([values, ties])
    codes = raw(quantized(sample, BF16).codes).to(torch.int64).view(-1) & 0xFFFF
    assert torch.equal(codes, nearest(sample.to(torch.float64), BF16))


def test_fp32_keeps_every_bit() -> None:
    values = random_floats(1 << 12, seed=6)
    assert torch.equal(raw(quantized(values, FP32).codes).view(-1), raw(values))


@each_scaled_format
def test_error_is_at_most_half_a_code(fmt: Format) -> None:
    """Half of the last place, or of the smallest step under the scale, which the amax bounds."""
    values = torch.randn(1 << 14, generator=torch.Generator().manual_seed(7)) ** 3
    rows = values.view(-1, 32).to(torch.float64)
    error = (values_of(quantized(values, fmt)).view(-1, 32) - rows).abs()
    amax = rows.abs().amax(dim=1, keepdim=True)
    step = 2 * amax / fmt.max * fmt.smallest  # of a scale less than twice amax / max
    assert (error <= (rows.abs() * 2.0 ** -(fmt.mantissa_bits + 1)).maximum(step / 2)).all()
    assert error.max() > 0


@each_format
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_short_tail_is_filled_with_zeros(fmt: Format, block_size: int) -> None:
    for count in (0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size + 7):
        values = random_floats(count, seed=count)
        blocks = quantized(values, fmt, block_size, extra_rows=2)
        padded = torch.zeros(blocks.codes.numel())
        padded[:count] = values
        assert_same_bytes(blocks, quantized(padded, fmt, block_size))
        assert not raw(blocks.codes).view(-1)[count:].any()
        if blocks.scales is not None:
            assert blocks.scales[-2:].tolist() == [1, 1]


@each_format
def test_one_element(fmt: Format) -> None:
    """Alone in its block, a value of few bits is kept whatever its size."""
    for value in (1.0, -1.5, 2.0**-126, 1.5 * 2.0**-132, 1.75 * 2.0**127):
        exact = values_of(quantized(torch.tensor([value]), fmt))
        assert exact[0].item() == value


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 200])
def test_half_precision_input_equals_its_fp32_values(fmt: Format, dtype: torch.dtype, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(8)).to(dtype)
    assert_same_bytes(quantized(values, fmt), quantized(values.to(torch.float32), fmt))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(fmt: Format, dtype: torch.dtype) -> None:
    """Training scripts that call torch.set_default_dtype(torch.bfloat16) are common."""
    values = random_floats(75, seed=9)
    expected = quantized(values, fmt)
    with default_dtype(dtype):
        blocks = quantized(values, fmt)
        decoded, third = decode(blocks), decode(blocks, 1 / 3)
    assert_same_bytes(blocks, expected)
    assert torch.equal(decoded, decode(expected))
    assert torch.equal(third, decode(expected, 1 / 3))
    assert decoded.dtype is third.dtype is torch.float32


@each_format
@pytest.mark.parametrize("factor", [1 / 3, -7.5, 2.0**24, 2.0**-30, 0.0])
def test_a_factor_is_rounded_with_the_scale_and_then_with_the_code(fmt: Format, factor: float) -> None:
    """Once each, in FP32; the products here are exact in float64. A number is as good as a tensor."""
    normal = torch.randn(64 * 32, generator=torch.Generator().manual_seed(13))
    single = torch.tensor(factor, dtype=torch.float32)
    for size in (1e-37, 1e-3, 1e28):
        blocks = quantized(normal * size, fmt)
        exponents = [127] * 64 if blocks.scales is None else blocks.scales.tolist()
        scales = torch.tensor([2.0 ** (e - 127) for e in exponents], dtype=torch.float64)
        combined = (scales * single.to(torch.float64)).to(torch.float32).to(torch.float64)
        exact = blocks.codes.to(torch.float32).to(torch.float64) * combined[:, None]
        assert torch.equal(decode(blocks, factor), exact.to(torch.float32))
        assert torch.equal(decode(blocks, single), exact.to(torch.float32))


@each_scaled_format
def test_a_factor_brings_values_out_of_reach_of_fp32_into_it(fmt: Format) -> None:
    """It meets the scale first: neither the largest nor the smallest code passes the end of FP32."""
    codes = torch.tensor([[fmt.max, -fmt.max], [fmt.smallest, -fmt.smallest]]).to(fmt.dtype)
    blocks = Blocks(codes, torch.tensor([254, 1], dtype=torch.uint8), fmt)
    assert decode(blocks[:1], 2.0**-24).tolist() == [[fmt.max * 2.0**103, -fmt.max * 2.0**103]]
    assert decode(blocks[1:], 2.0**24).tolist() == [[fmt.smallest * 2.0**-102, -fmt.smallest * 2.0**-102]]


@each_format
def test_dequantize_writes_what_fits_and_nothing_else(fmt: Format) -> None:
    blocks = quantized(torch.arange(96, dtype=torch.float32).remainder(8), fmt)
    for count in (0, 1, 31, 32, 33, 70, 96):
        out = torch.full((128,), torch.nan)
        dequantize(blocks, out[:count])
        assert torch.equal(out[:count], torch.arange(count).remainder(8).to(torch.float32))
        assert out[count:].isnan().all()


@each_format
def test_results_do_not_depend_on_the_chunk(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_floats(5000, seed=10)
    values[1234] = torch.inf
    expected = quantized(values, fmt, 128, extra_rows=3)
    for chunk in (1, 100, 128, 1000, 1 << 20):
        monkeypatch.setattr(blocks_module, "CHUNK", chunk)
        blocks = quantized(values, fmt, 128, extra_rows=3)
        assert_same_bytes(blocks, expected)
        out = torch.full((5000,), torch.nan)
        dequantize(blocks, out)
        torch.testing.assert_close(
            out, decode(expected).view(-1)[:5000], rtol=0, atol=0, equal_nan=True, msg=f"CHUNK {chunk}"
        )


@settings(deadline=None)
@given(st.integers(0, 5000), st.sampled_from(BLOCK_SIZES), st.integers(1, 1 << 12))
def test_chunks_cover_all_rows_in_order(rows: int, block_size: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "CHUNK", chunk)
        parts = list(chunks(rows, block_size))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert all(part.stop - part.start <= max(1, chunk // block_size) for part in parts)


class LargestTemporary(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest tensor made inside it; views and in-place results are not made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given_storages = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for each in _tensors(result):
            if each.untyped_storage().data_ptr() not in given_storages:
                self.nbytes = max(self.nbytes, each.untyped_storage().nbytes())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_as_long_as_its_operand(fmt: Format, dtype: torch.dtype) -> None:
    count = 4 * 1024 * 1024 - 5
    values = torch.ones(count, dtype=dtype)
    out = Blocks.zeros(count // 128 + 1, 128, fmt, CPU)
    back = torch.empty(count)
    with LargestTemporary() as largest:
        quantize(values, out)
        dequantize(out, back)
    assert 0 < largest.nbytes <= 4 * blocks_module.CHUNK
    assert torch.equal(back, values.to(torch.float32))


@each_format
def test_slices_share_memory_and_copies_do_not(fmt: Format) -> None:
    source, target = quantized(random_floats(128, seed=11), fmt), dirty(4, 32, fmt)
    target[1:3].copy_(source[1:3])
    assert_same_bytes(target[1:3], source[1:3])
    assert_same_bytes(target[:1], dirty(1, 32, fmt))
    source.zero_()
    assert_same_bytes(source, Blocks.zeros(4, 32, fmt, CPU))
    assert target[1:3].codes.to(torch.float32).any()


@each_format
def test_bytes_are_codes_and_one_scale_a_block(fmt: Format) -> None:
    blocks = Blocks.zeros(7, 64, fmt, CPU)
    assert blocks.nbytes == 7 * 64 * fmt.itemsize + (7 if fmt.scaled else 0)
    assert (len(blocks), blocks.block_size) == (7, 64)


@each_scaled_format
def test_encode_writes_only_its_rows(fmt: Format) -> None:
    blocks = dirty(3, 32, fmt)
    encode(random_floats(32, seed=12).view(1, 32), blocks[1:2])
    for row in (0, 2):
        assert_same_bytes(blocks[row : row + 1], dirty(1, 32, fmt))
