"""The sum of the ranks' gradients: order, formats, and the parts of its norm."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ds_fp8.ops import blocks as blocks_module
from ds_fp8.ops.blocks import NOT_FINITE, Blocks, decode, dequantize, quantize
from ds_fp8.ops.exact import DIGIT_BITS, DIGITS, LOWEST, digits_of, sum_of_digits, sums_of_squares
from ds_fp8.ops.formats import BF16, BY_NAME, E4M3, E5M2, FP16, FP32, Format
from ds_fp8.ops.reduction import accumulate, first_non_finite_block, norm_parts, norm_square

CPU = torch.device("cpu")
ALL = tuple(fmt for fmt in BY_NAME.values() if fmt.dtype.is_floating_point)
SCALED = (E4M3, E5M2, FP16)
UNSCALED = (FP32, BF16)
CODE_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

each_wire = pytest.mark.parametrize("wire", [E4M3, E5M2, BF16], ids=lambda fmt: fmt.name)
each_shard = pytest.mark.parametrize("shard_format", [FP32, BF16, E4M3], ids=lambda fmt: fmt.name)
each_format = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
each_scaled_format = pytest.mark.parametrize("fmt", SCALED, ids=lambda fmt: fmt.name)
each_unscaled_format = pytest.mark.parametrize("fmt", UNSCALED, ids=lambda fmt: fmt.name)


def gradient(rows: int, block_size: int, seed: int) -> Tensor:
    """Values whose blocks lie far apart, so that the order of addition shows."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, block_size, generator=generator)
    return values * torch.exp2(torch.randint(-20, 20, (rows, 1), generator=generator))


def blocks_of(values: Tensor, fmt: Format) -> Blocks:
    out = Blocks.zeros(values.shape[0], values.shape[1], fmt, CPU)
    quantize(values.reshape(-1), out)
    return out


def values_of(blocks: Blocks) -> Tensor:
    out = torch.empty(blocks.codes.numel())
    dequantize(blocks, out)
    return out.view(len(blocks), -1)


def stale(rows: int, block_size: int, fmt: Format) -> Blocks:
    """A shard full of NaN: whatever reads it shows."""
    shard = Blocks.zeros(rows, block_size, fmt, CPU)
    shard.codes.copy_(torch.full((rows, block_size), torch.nan))
    return shard


def assert_same_bits(actual: Blocks, expected: Blocks) -> None:
    dtype = CODE_DTYPE[actual.format.itemsize]
    wrong = (actual.codes.view(dtype) != expected.codes.view(dtype)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise AssertionError(f"[{row}, {column}]: {actual.codes[row, column]}, {expected.codes[row, column]}")
    if expected.scales is not None and actual.scales is not None:
        assert torch.equal(actual.scales, expected.scales)


def exact_squares(shard: Blocks) -> float:
    """Sum of squares of what is stored, in float64: FP32 may hold neither the values nor their squares."""
    codes = shard.codes.to(torch.float32).to(torch.float64)
    if shard.scales is not None:
        codes = codes * torch.exp2(shard.scales.to(torch.float64) - 127)[:, None]
    return codes.square().sum().item()


def exact_sum(parts: Tensor) -> Fraction:
    """What the digits add up to, without rounding."""
    return sum(
        (
            each * Fraction(2) ** (LOWEST + DIGIT_BITS * place)
            for place, each in enumerate(parts.tolist()[:DIGITS])
        ),
        Fraction(),
    )


def assert_norm_parts(actual: Tensor, shard: Blocks) -> None:
    """Those of a shard of finite values as it is stored now."""
    assert actual.dtype is torch.int64
    assert abs(norm_square(actual).item() / exact_squares(shard) - 1) < 1e-12
    assert actual[-1] == 0
    assert torch.equal(actual, norm_parts(shard))


def sum_in_order(pieces: Sequence[Tensor]) -> Tensor:
    """((first + second) + third) + ..., each sum rounded to FP32 (exact in float64 before that)."""
    total = pieces[0]
    for piece in pieces[1:]:
        total = (total.to(torch.float64) + piece.to(torch.float64)).to(torch.float32)
    return total


@each_wire
@each_shard
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_adds_in_rank_order_in_fp32(wire: Format, shard_format: Format, world_size: int) -> None:
    pieces = [blocks_of(gradient(50, 32, seed=rank), wire) for rank in range(world_size)]
    values = [values_of(piece) for piece in pieces]
    expected = sum_in_order(values)
    shard = stale(50, 32, shard_format)
    assert_norm_parts(accumulate(pieces, shard, overwrite=True), shard)
    assert_same_bits(shard, blocks_of(expected, shard_format))
    if world_size > 2:
        assert not torch.equal(expected, sum_in_order(values[::-1])), "the order does not show in this trial"


@each_wire
@each_shard
def test_adds_the_sum_to_what_the_shard_holds(wire: Format, shard_format: Format) -> None:
    shard = blocks_of(gradient(50, 64, seed=100), shard_format)
    held = values_of(shard)
    for micro_step in range(3):
        pieces = [blocks_of(gradient(50, 64, seed=10 * micro_step + rank), wire) for rank in range(3)]
        assert_norm_parts(accumulate(pieces, shard, overwrite=False), shard)
        total = sum_in_order([held, sum_in_order([values_of(piece) for piece in pieces])])
        assert_same_bits(shard, blocks_of(total, shard_format))
        held = values_of(shard)


@each_shard
def test_pieces_are_left_as_they_are(shard_format: Format) -> None:
    pieces = [blocks_of(gradient(9, 32, seed=rank), E4M3) for rank in range(2)]
    before = [(piece.codes.view(torch.uint8).clone(), piece.scales) for piece in pieces]
    accumulate(pieces, stale(9, 32, shard_format), overwrite=True)
    for piece, (codes, scales) in zip(pieces, before, strict=True):
        assert torch.equal(piece.codes.view(torch.uint8), codes)
        assert piece.scales is scales


@each_shard
def test_one_rank_that_is_not_finite_spoils_that_block(shard_format: Format) -> None:
    good, bad = gradient(5, 32, seed=1), gradient(5, 32, seed=2)
    bad[3, 7] = torch.inf
    shard = stale(5, 32, shard_format)
    returned = accumulate([blocks_of(good, E4M3), blocks_of(bad, E4M3)], shard, overwrite=True)
    rows = values_of(shard).isfinite()
    assert rows.all(dim=1).tolist() == [True, True, True, False, True]
    assert not rows[3].any()
    assert returned[-1] == 1
    assert torch.equal(returned[:-1], (norm_parts(shard[:3]) + norm_parts(shard[4:]))[:-1])


@each_shard
def test_the_sum_does_not_depend_on_the_chunk(shard_format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [blocks_of(gradient(70, 128, seed=rank), E4M3) for rank in range(3)]
    results = []
    for chunk in (1, 1000, 1 << 20):
        monkeypatch.setattr(blocks_module, "CHUNK", chunk)
        shard = stale(70, 128, shard_format)
        first = accumulate(pieces, shard, overwrite=True)
        second = accumulate(pieces[:2], shard, overwrite=False)
        results.append((shard, torch.stack([first, second])))
    for shard, returned in results[1:]:
        assert_same_bits(shard, results[0][0])
        assert torch.equal(returned, results[0][1])


@each_format
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_sum_of_squares(fmt: Format, block_size: int) -> None:
    shard = blocks_of(gradient(300, block_size, seed=3), fmt)
    assert_norm_parts(norm_parts(shard), shard)


def test_a_small_block_counts_beside_a_large_one() -> None:
    """2^13 blocks of 1 beside one of 2^60: float64 would lose every one of them."""
    values = torch.zeros(8193, 32)
    values[:, 5] = 1
    values[17, 5] = 2.0**30
    assert exact_sum(norm_parts(blocks_of(values, FP32))) == 2**60 + 8192


@each_scaled_format
@pytest.mark.parametrize("size", [1e-34, 1e-30, 1e-20, 1e20, 1e30])
def test_squares_beyond_the_range_of_fp32_are_counted(fmt: Format, size: float) -> None:
    """A scale stays outside the FP32 sum: neither tiny nor huge gradients lose their norm."""
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(4)) * size
    in_fp32 = values.square().sum()
    assert in_fp32 < 1e-35 or in_fp32 == torch.inf
    shard = blocks_of(values, fmt)
    assert_norm_parts(norm_parts(shard), shard)
    returned = accumulate([shard, shard], stale(50, 64, fmt), overwrite=True)
    assert abs(norm_square(returned).item() / exact_squares(shard) / 4 - 1) < 1e-12


@each_scaled_format
def test_a_scale_enters_by_its_exact_square(fmt: Format) -> None:
    """From the lowest scale to the highest: the same codes give the same digits."""
    codes = blocks_of(torch.randn(1, 32, generator=torch.Generator().manual_seed(5)), fmt).codes
    at_one = exact_sum(norm_parts(Blocks(codes, torch.tensor([127], dtype=torch.uint8), fmt)))
    for e in range(1, 255):
        found = norm_parts(Blocks(codes, torch.tensor([e], dtype=torch.uint8), fmt))
        assert exact_sum(found) == at_one * Fraction(4) ** (e - 127)
        assert found[-1] == 0


@each_format
def test_shares_of_a_shard_add_up(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the blocks are cut, among ranks or chunks, the parts of the norm are the same."""
    shard = blocks_of(gradient(97, 32, seed=5), fmt)
    whole = norm_parts(shard)
    for chunk, cuts in ((1, (0, 97)), (1 << 20, (0, 13, 14, 60, 97)), (1000, (0, 48, 97))):
        monkeypatch.setattr(blocks_module, "CHUNK", chunk)
        parts = [norm_parts(shard[a:b]) for a, b in pairwise(cuts)]
        assert torch.equal(torch.stack(parts).sum(dim=0), whole)


@each_format
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_blocks_that_are_not_finite_are_counted(
    fmt: Format, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "CHUNK", 3 * 32)
    values = gradient(20, 32, seed=6)
    rest = values.clone()
    assert first_non_finite_block(blocks_of(values, fmt)) is None
    for count, (row, column) in enumerate(((19, 0), (8, 31), (7, 3), (4, 16)), start=1):  # last to first
        values[row, column] = bad
        rest[row] = 0
        shard = blocks_of(values, fmt)
        assert first_non_finite_block(shard) == row
        assert norm_parts(shard).tolist() == [*norm_parts(blocks_of(rest, fmt))[:-1].tolist(), count]
        assert_same_bits(shard, blocks_of(values, fmt))


@each_scaled_format
def test_no_code_of_a_block_that_is_not_finite_is_summed(fmt: Format) -> None:
    """Its codes mean nothing: numbers, infinities and NaN count once a block and add nothing."""
    every = torch.arange(1 << 8 * fmt.itemsize).to(CODE_DTYPE[fmt.itemsize]).view(fmt.dtype).view(-1, 32)
    blocks = Blocks(every, torch.full((len(every),), NOT_FINITE, dtype=torch.uint8), fmt)
    assert norm_parts(blocks).tolist() == [*[0] * DIGITS, len(every)]
    assert all(first_non_finite_block(blocks[row : row + 1]) == 0 for row in range(min(len(every), 64)))
    returned = accumulate([blocks], Blocks.zeros(len(every), 32, fmt, CPU), overwrite=False)
    assert returned.tolist() == [*[0] * DIGITS, len(every)]


@each_unscaled_format
def test_squares_beyond_the_range_of_fp32_are_counted_without_a_scale(fmt: Format) -> None:
    values = torch.ones(4, 32)
    values[2] = 2.0**100
    found = norm_parts(blocks_of(values, fmt))
    assert exact_sum(found) == 32 * 2**200 + 3 * 32
    assert found[-1] == 0


@each_format
def test_an_empty_gradient_is_zero(fmt: Format) -> None:
    shard = Blocks.zeros(3, 128, fmt, CPU)
    assert not norm_parts(shard).any()
    assert first_non_finite_block(shard) is None
    assert not accumulate([shard, shard], shard, overwrite=False).any()
    assert not decode(shard).any()


def exact_squares_of(shard: Blocks) -> Fraction:
    return sum((Fraction(each) ** 2 for each in decode(shard).view(-1).tolist()), Fraction())


@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_the_squares_of_e4m3_are_added_exactly(block_size: int) -> None:
    """Every code, and blocks whose sizes lie 2^40 apart: not a bit is lost."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).nan_to_num(1.0)
    values = torch.cat([codes.view(-1, block_size), gradient(50, block_size, seed=1)])
    shard = blocks_of(values, E4M3)
    assert exact_sum(norm_parts(shard)) == exact_squares_of(shard)


@pytest.mark.parametrize("fmt", [FP32, BF16, E5M2, FP16], ids=lambda fmt: fmt.name)
def test_squares_of_other_formats_lose_less_than_float64_would_between_blocks(fmt: Format) -> None:
    shard = blocks_of(gradient(50, 256, seed=2) * gradient(50, 256, seed=3), fmt)
    exact = exact_squares_of(shard)
    assert abs(exact_sum(norm_parts(shard)) / exact - 1) < 2.0**-40


@each_format
def test_the_order_within_a_block_is_free(fmt: Format) -> None:
    shard = blocks_of(gradient(64, 256, seed=4) * gradient(256, 64, seed=5).T, fmt)
    for seed in range(5):
        order = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
        turned = Blocks(shard.codes[:, order], shard.scales, fmt)
        assert torch.equal(norm_parts(turned), norm_parts(shard))


def test_sums_of_squares_at_the_ends_of_fp32() -> None:
    largest, smallest = 2.0**127 * 1.5, 2.0**-149
    rows = torch.tensor(
        [[largest] * 256, [smallest] * 256, [0.0] * 256, [torch.inf] * 256, [torch.nan] * 256]
    )
    found = sums_of_squares(rows)
    assert found[:3].tolist() == [256 * largest**2, 256 * smallest**2, 0]
    assert found[3:].isnan().all()


def test_digits_of_any_value() -> None:
    """From what lies below the lowest digit to the largest sum that a block can have."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4000, generator=generator, dtype=torch.float64) + 0.5
    values *= torch.exp2(torch.randint(LOWEST - 70, 300, (4000,), generator=generator).to(torch.float64))
    unit = Fraction(2) ** LOWEST
    for value in (*values[:300].tolist(), 0.0, 2.0**294 * (2 - 2.0**-52)):
        assert (
            exact_sum(digits_of(torch.tensor([value], dtype=torch.float64))) == Fraction(value) // unit * unit
        )
    digits = digits_of(values)
    assert exact_sum(digits) == sum(Fraction(value) // unit * unit for value in values.tolist())
    assert abs(sum_of_digits(digits).item() / float(exact_sum(digits)) - 1) < 2.0**-51
