"""Masters beside their weights: what a split one is made of, and rounding of either sign.

A split master is checked against integers: the FP32 bits, of which the weight and the code keep all or 24.
"""

import math

import pytest
import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BF16, FP16, FP32, SPLIT8, SPLIT16, Format
from ds_fp8.ops.masters import (
    decode_masters,
    encode_masters,
    load_masters,
    store_masters,
    write_weights,
)
from ds_fp8.ops.rounding import MASTER, key, random_bits, stream

CPU = torch.device("cpu")
DRAWS = 1_000_000
ROUNDED = (FP16, BF16, SPLIT8)  # masters that can be rounded stochastically

each_split = pytest.mark.parametrize("fmt", [SPLIT16, SPLIT8], ids=lambda fmt: fmt.name)
each_rounded = pytest.mark.parametrize("fmt", ROUNDED, ids=lambda fmt: fmt.name)


def bf16_of(bits: int) -> int:
    """Bits of the BF16 weight for a master's FP32 bits: half a code added, then cut; NaN kept."""
    return (bits + 0x8000 >> 16) & 0xFFFF


def test_bf16_weights_round_half_away_from_zero() -> None:
    magnitudes = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x3F808000, 0x3F818000, 0x3F807FFF]
    magnitudes += [0x3FFF8000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000]  # the last: inf
    generator = torch.Generator().manual_seed(0)
    magnitudes += torch.randint(0, 0x7F800000, (10_000,), generator=generator).tolist()
    bits = magnitudes + [each | 0x80000000 for each in magnitudes]
    master = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).view(-1, 2)
    weights = torch.zeros(master.shape, dtype=torch.bfloat16)
    write_weights(master, weights)
    written = (weights.view(-1).view(torch.int16).to(torch.int64) & 0xFFFF).tolist()
    wrong = [hex(b) for b, w in zip(bits, written, strict=True) if w != bf16_of(b)]
    assert not wrong, f"{len(wrong)} masters, the first {wrong[0]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, -0x400000], ids=hex)
def test_a_nan_master_makes_a_nan_weight(dtype: torch.dtype, bits: int) -> None:
    master = torch.tensor([[bits, 0x3F800000]], dtype=torch.int32).view(torch.float32)
    weights = torch.zeros(1, 2, dtype=dtype)
    write_weights(master, weights)
    assert weights[0, 0].isnan()
    assert weights[0, 1] == 1


def finite_bits() -> list[int]:
    """FP32 values of either sign: ties of the weight and of SPLIT8, ends of the range, and any others."""
    ends = [0, 1, 0x7F, 0x80, 0x81, 0x7FFF, 0x8000, 0x8001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF]
    ties = [0x3F800000 + offset for offset in (0x7F, 0x80, 0x180, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0xFF80)]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 0x7F800000, (20_000,), generator=generator).tolist()
    return [each | sign for each in [*ends, *ties, *drawn] for sign in (0, 0x80000000)]


def floats_of(bits: list[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def stored(values: Tensor, fmt: Format, bits: Tensor | None = None) -> tuple[Blocks, Tensor]:
    """Masters of rows of 32 values, and their weights."""
    rows = values.view(-1, 32)
    master = Blocks.zeros(len(rows), 32, fmt, CPU)
    weights = torch.full(rows.shape, torch.nan, dtype=torch.bfloat16)
    encode_masters(rows, master, weights, None if bits is None else bits.view(-1, 32))
    return master, weights


def as_bits(values: Tensor) -> list[int]:
    return [each & 0xFFFFFFFF for each in values.reshape(-1).view(torch.int32).tolist()]


def rounded_to_24_bits(bits: int) -> int:
    """Half of the 256th added, and cut."""
    return (bits + 0x80) >> 8 << 8


@pytest.mark.parametrize(("fmt", "keep"), [(SPLIT16, lambda bits: bits), (SPLIT8, rounded_to_24_bits)])
def test_a_weight_and_its_code_are_the_master(fmt: Format, keep: object) -> None:
    bits = finite_bits()
    bits = bits[: len(bits) // 32 * 32]
    master, weights = stored(floats_of(bits), fmt)
    expected = [keep(each) for each in bits]  # type: ignore[operator]
    assert as_bits(decode_masters(master, weights)) == expected
    halves = [each & 0xFFFF for each in weights.view(-1).view(torch.int16).tolist()]
    assert halves == [bf16_of(each) for each in expected]
    kept = master.codes.view(-1).tolist()
    dropped = 16 - 8 * fmt.itemsize
    assert [each << dropped & 0xFFFF for each in kept] == [each & 0xFFFF for each in expected]


def test_split16_weights_are_those_of_an_fp32_master() -> None:
    values = floats_of(finite_bits())[: 32 * 1000]
    assert torch.equal(stored(values, SPLIT16)[1], stored(values, FP32)[1])


@each_split
def test_storing_a_split_master_again_keeps_it(fmt: Format) -> None:
    master, weights = stored(torch.randn(320, generator=torch.Generator().manual_seed(0)), fmt)
    again, same = stored(decode_masters(master, weights).view(-1), fmt)
    assert torch.equal(again.codes, master.codes)
    assert torch.equal(same, weights)


@each_split
def test_whoever_edits_the_weight_edits_the_master(fmt: Format) -> None:
    master, weights = stored(torch.full((32,), 1.0 + 3 * 2.0**-15), fmt)
    assert (decode_masters(master, weights) == 1.0 + 3 * 2.0**-15).all()
    weights.fill_(2.0)
    assert (decode_masters(master, weights) == 2.0 + 6 * 2.0**-15).all()


def pairs(weights: list[int], low: list[int], fmt: Format) -> tuple[Blocks, Tensor]:
    """Every weight, of these bits, beside every lower half: a row each."""
    of = torch.tensor(weights).to(torch.int16).view(torch.bfloat16)
    codes = torch.tensor(low).to(fmt.dtype)
    return Blocks(codes.expand(len(of), -1), None, fmt), of[:, None].expand(-1, len(codes))


HIGH = range(1 << 16)
LOW = {SPLIT16: [0, 1, 0x7FFF, -0x8000, -0x7FFF, -1], SPLIT8: [0, 1, 0x7F, -0x80, -0x7F, -1]}


@each_split
def test_every_finite_weight_and_every_lower_half_are_a_finite_master(fmt: Format) -> None:
    """The bits are those of the weight plus the lower half, so the ends of its range tell of all between.

    But at zero, whose lower half counts only where it is positive; all of them are tried there, and beside
    the weights next to zero and next to inf.
    """
    master, weights = pairs(list(HIGH), LOW[fmt], fmt)
    decoded = decode_masters(master, weights)
    assert decoded[weights[:, 0].isfinite()].isfinite().all()
    assert decoded[weights[:, 0].isnan()].isnan().all()
    unit = 1 << fmt.dropped_bits
    signed = torch.tensor(LOW[fmt]) * unit
    plain = (torch.tensor(list(HIGH))[:, None] << 16) + signed
    zero = torch.tensor(HIGH) & 0x7FFF == 0
    plain[zero] = (torch.tensor([0, 1 << 31])[:, None]) + signed.clamp(min=0)
    number = ~decoded.isnan()
    assert torch.equal(decoded.view(torch.int32)[number], plain.to(torch.int32)[number])
    edges = [sign | each for sign in (0, 0x8000) for each in (0, 1, 2, 0x7F, 0x80, 0x3F80, 0x7F7E, 0x7F7F)]
    every = list(range(-(1 << 8 * fmt.itemsize - 1), 1 << 8 * fmt.itemsize - 1))
    master, weights = pairs(edges, every, fmt)
    decoded = decode_masters(master, weights)
    assert decoded.isfinite().all()
    assert torch.equal(decoded.signbit(), weights.signbit())


@each_split
@pytest.mark.parametrize("draw", [None, 0, 0xFFFFFF])
def test_no_encoder_writes_a_negative_lower_half_beside_zero(fmt: Format, draw: int | None) -> None:
    """Of every value whose weight is zero, or just is not."""
    small = list(range(0x8000 + 0x200))
    values = floats_of([each | sign for each in small for sign in (0, 0x80000000)])
    bits = None if draw is None else torch.full(values.shape, draw, dtype=torch.int32)
    master, weights = stored(values, fmt, bits)
    zero = weights == 0
    assert zero.any()
    assert not zero.all()
    assert (master.codes[zero] >= 0).all()


@each_split
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_weight_set_to_zero_in_place_is_a_master_of_nearly_zero(fmt: Format, zero: float) -> None:
    master, weights = stored(torch.randn(3200, generator=torch.Generator().manual_seed(0)), fmt)
    weights.fill_(zero)
    decoded = decode_masters(master, weights)
    assert decoded.abs().max() < 2.0**-133
    assert (decoded.signbit() == (math.copysign(1, zero) < 0)).all()


@each_split
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, -torch.nan])
def test_a_split_master_that_is_not_finite(fmt: Format, bad: float) -> None:
    values = torch.ones(32)
    values[3] = bad
    master, weights = stored(values, fmt)
    read = decode_masters(master, weights)[0]
    assert not read[3].isfinite()
    assert read.isnan()[3] == math.isnan(bad)
    assert read.isfinite().sum() == 31


@pytest.mark.parametrize("fmt", [FP32, BF16, FP16, SPLIT16, SPLIT8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 70_000])
def test_vectors_of_any_length(fmt: Format, count: int) -> None:
    """Zeros after the end, in the master and in the weights."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    rows = -(-count // 32) + 1
    master = Blocks.zeros(rows, 32, fmt, CPU)
    weights = torch.full((rows, 32), torch.nan, dtype=torch.bfloat16)
    store_masters(values, master, weights)
    out = torch.full((count,), torch.nan)
    load_masters(master, weights, out)
    assert (out - values).abs().max() <= 2.0**-8 * values.abs().max()
    assert fmt not in (FP32, SPLIT16) or torch.equal(out, values)
    assert not weights.view(-1)[count:].any()
    assert not master.codes.view(-1)[count:].any()


def between(fmt: Format) -> Tensor:
    """Values of either sign between two codes, beside an anchor that fixes the scale, [values]."""
    codes = torch.tensor([1.0, 1.5, 1.984375, 0.5, 2.0**-6, 2.0**-12, 1.0 + 2.0**-7])
    step = codes.abs() * 2.0**-fmt.mantissa_bits * 0.37
    return torch.cat([codes + step, -codes - step])


@each_rounded
def test_stochastic_masters_are_unbiased(fmt: Format) -> None:
    """The mean of a million draws within 3 sigma of the value, and only the two codes next to it."""
    for index, value in enumerate(between(fmt).tolist()):
        values = torch.full((DRAWS // 32, 32), value)
        values[:, 0] = 1.9375  # the largest of every block
        bits = random_bits(key(stream(3, index, MASTER), 1), 0, values.numel(), CPU)
        master, weights = stored(values, fmt, bits)
        read = decode_masters(master, weights)[:, 1:].to(torch.float64)
        found = read.unique()
        assert len(found) == 2
        assert found[0] <= value <= found[1]
        sigma = float(read.std()) / math.sqrt(read.numel())
        assert abs(float(read.mean()) - value) < 3 * sigma, f"{value}"


@each_rounded
@pytest.mark.parametrize("draw", [0, 1, 0x800000, 0xFFFFFF])
def test_a_master_that_needs_no_rounding_is_kept(fmt: Format, draw: int) -> None:
    values = torch.randn(320, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    master, weights = stored(values, fmt)
    kept = decode_masters(master, weights).view(-1)
    again = decode_masters(*stored(kept, fmt, torch.full((320,), draw, dtype=torch.int32)))
    assert torch.equal(again.view(-1), kept)


@each_rounded
def test_weights_are_of_the_masters_as_stored(fmt: Format) -> None:
    values = torch.randn(3200, generator=torch.Generator().manual_seed(0))
    master, weights = stored(values, fmt, random_bits(5, 0, 3200, CPU))
    expected = torch.empty_like(weights)
    write_weights(decode_masters(master, weights), expected)
    assert torch.equal(weights, expected)
    nearest = stored(values, fmt)[0]
    assert not torch.equal(master.codes.view(torch.uint8), nearest.codes.view(torch.uint8))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, -torch.nan])
@each_rounded
def test_a_stochastic_master_that_is_not_finite(fmt: Format, bad: float) -> None:
    values = torch.ones(64)
    values[3] = bad
    for draw in (0, 0xFFFFFF):
        master, weights = stored(values, fmt, torch.full((64,), draw, dtype=torch.int32))
        assert not decode_masters(master, weights)[0, 3].isfinite()
        assert not weights[0, 3].isfinite()
        assert weights[1].isfinite().all()
