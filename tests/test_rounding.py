"""Stochastic rounding: where it lands, how often, and the bits that decide.

Rates are 3-sigma tests over fixed draws: they pass or fail the same way on every run.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP16, Format
from ds_fp8.ops.rounding import KEY_START, _mix, _mix_word, key, random_bits, round_up_from_zero

CPU = torch.device("cpu")
NARROW = (FP16, BF16, E4M3, E5M2)
CODE_DTYPE = {1: torch.uint8, 2: torch.int16}
DRAWS = 1_000_000
SIXTEEN_BITS = torch.arange(1 << 16, dtype=torch.int32)
words32 = st.integers(0, 2**32 - 1)

each_format = pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)


def table(fmt: Format) -> Tensor:
    """The finite non-negative values of a format, [codes] float32; the index is the code."""
    codes = torch.arange(1 << (8 * fmt.itemsize - 1)).to(CODE_DTYPE[fmt.itemsize])
    values = codes.view(fmt.dtype).to(torch.float32)
    return values[values.isfinite()]


def code_of(rounded: Tensor) -> Tensor:
    """Codes as non-negative integers."""
    width = 8 * rounded.element_size()
    return rounded.view(CODE_DTYPE[rounded.element_size()]).to(torch.int64) & (1 << width) - 1


def positive_values(fmt: Format, count: int) -> Tensor:
    """FP32 values of every exponent up to the format's largest, denormals and its last binade included."""
    generator = torch.Generator().manual_seed(1)
    top = torch.tensor(fmt.max).view(torch.int32).item()
    bits = torch.randint(1, int(top) + 1, (count,), generator=generator, dtype=torch.int32)
    last = torch.randint(int(top) - (1 << 24), int(top) + 1, (count,), generator=generator, dtype=torch.int32)
    return torch.cat([bits, last]).view(torch.float32)


def uniform16(bits: Tensor, high: bool = False) -> Tensor:
    """The low or the high 16 bits as numbers of mean 0 and variance 1, float64."""
    half = (bits >> 16 if high else bits) & 0xFFFF
    return (half.to(torch.float64) - 32767.5) / (65536 / math.sqrt(12))


def assert_uncorrelated(a: Tensor, b: Tensor, what: str) -> None:
    """Pearson correlation within 4 sigma of 0."""
    correlation = float((a * b).mean())
    assert abs(correlation) < 4 / math.sqrt(len(a)), f"{what}: correlation {correlation}"


@each_format
def test_lands_on_the_two_neighbours(fmt: Format) -> None:
    values, codes = positive_values(fmt, 100_000), table(fmt)
    bits = random_bits(key(0, 1, 2), 0, len(values), CPU)
    below = torch.searchsorted(codes, values, right=True) - 1
    above = torch.searchsorted(codes, values)
    rounded = code_of(round_up_from_zero(values, bits, fmt))
    expected_below = below.clamp(min=1)  # between zero and the first code: never zero
    assert ((rounded == expected_below) | (rounded == above)).all()
    between = (below < above) & (below > 0)
    assert (rounded[between] == below[between]).any()
    assert (rounded[between] == above[between]).any()


@each_format
@pytest.mark.parametrize("bits", [0, 0xFFFF, -1, 0x5555])
def test_a_value_of_the_format_is_kept(fmt: Format, bits: int) -> None:
    values = table(fmt)
    rounded = round_up_from_zero(values, torch.full((len(values),), bits, dtype=torch.int32), fmt)
    assert rounded.dtype is fmt.dtype
    assert torch.equal(code_of(rounded), torch.arange(len(values)))


@each_format
def test_the_share_of_draws_that_round_up_is_the_remainder(fmt: Format) -> None:
    """Over all 65,536 draws, within one of them; the bits above the low 16 do not matter."""
    values, codes = table(fmt), table(fmt).to(torch.float64)
    top = len(values) - 1
    for code in (1, 2, 3, int(2**fmt.mantissa_bits) - 1, int(2**fmt.mantissa_bits), top // 2, top - 1):
        for remainder in (2.0**-12, 0.1, 0.5, 2 / 3, 1 - 2.0**-6):
            value = (codes[code] + remainder * (codes[code + 1] - codes[code])).to(torch.float32)
            share = (value.to(torch.float64) - codes[code]) / (codes[code + 1] - codes[code])
            rounded = code_of(round_up_from_zero(value.expand(1 << 16), SIXTEEN_BITS, fmt))
            assert abs((rounded == code + 1).sum() - share * 2**16) <= 1, (code, remainder)
            assert ((rounded == code) | (rounded == code + 1)).all()
            with_high = round_up_from_zero(value.expand(1 << 16), SIXTEEN_BITS | 0x5A5A << 16, fmt)
            assert torch.equal(code_of(with_high), rounded)


@each_format
@pytest.mark.parametrize("remainder", [0.01, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("place", ["subnormal", "normal", "last"])
def test_the_mean_is_the_value(fmt: Format, remainder: float, place: str) -> None:
    codes = table(fmt).to(torch.float64)
    code = {"subnormal": 1, "normal": len(codes) // 2, "last": len(codes) - 2}[place]
    step = float(codes[code + 1] - codes[code])
    value = (codes[code] + remainder * step).to(torch.float32)
    share = (float(value) - float(codes[code])) / step
    bits = random_bits(key(7, code, int(100 * remainder)), 0, DRAWS, CPU)
    rounded = round_up_from_zero(value.expand(DRAWS), bits, fmt)
    mean = code_of(rounded).to(torch.float64).mean().item()
    sigma = math.sqrt(share * (1 - share) / DRAWS)
    assert abs(mean - (code + share)) < 3 * sigma + 2.0**-16


@each_format
def test_zero_stays_zero_and_nothing_else_becomes_zero(fmt: Format) -> None:
    tiny = torch.tensor([2.0**-149, 2.0**-126, fmt.smallest * 2.0**-16, fmt.smallest / 2, fmt.smallest])
    tiny = tiny[(tiny > 0) & (tiny <= fmt.smallest)]
    for bits in (0, 1, 0x7FFF, 0x8000, 0xFFFF, -1):
        draws = torch.full((len(tiny),), bits, dtype=torch.int32)
        assert (code_of(round_up_from_zero(tiny, draws, fmt)) == 1).all()
        zeros = torch.tensor([0.0, -0.0])
        assert not code_of(round_up_from_zero(zeros, draws[:2], fmt)).any()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**34),
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.tuples(words32, words32),
)
def test_bits_do_not_depend_on_the_cut(first: int, cuts: list[int], words: tuple[int, int]) -> None:
    whole = random_bits(words, first, sum(cuts), CPU)
    starts = [first + sum(cuts[:index]) for index in range(len(cuts))]
    parts = [random_bits(words, start, count, CPU) for start, count in zip(starts, cuts, strict=True)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype is torch.int32


@pytest.mark.parametrize("wrap", [1 << 31, 1 << 32])
def test_element_indices_pass_the_signed_and_the_unsigned_end(wrap: int) -> None:
    words = key(3, 4, 5)
    across = random_bits(words, wrap - 64, 128, CPU)
    assert torch.equal(across[:64], random_bits(words, wrap - 64, 64, CPU))
    assert torch.equal(across[64:], random_bits(words, wrap % (1 << 32), 64, CPU))
    expected = [
        _mix_word(_mix_word(element & 0xFFFFFFFF ^ words[0]) ^ words[1]) for element in (wrap - 1, wrap)
    ]
    assert [int(each) & 0xFFFFFFFF for each in across[63:65]] == expected


@settings(deadline=None)
@given(st.lists(words32, min_size=1, max_size=50))
def test_the_mixer_is_the_same_on_tensors_and_integers(words: list[int]) -> None:
    tensor = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert [int(each) & 0xFFFFFFFF for each in _mix(tensor)] == [_mix_word(word) for word in words]


def test_the_mixer_loses_nothing() -> None:
    """A hash with collisions on single words would draw some bits twice as often."""
    words = _mix(torch.arange(1 << 20, dtype=torch.int32)).sort().values
    assert (words[1:] != words[:-1]).all()


def test_key_takes_every_word_of_its_input() -> None:
    keys = [
        key(0, 0, 0),
        key(1, 0, 0),
        key(0, 1, 0),
        key(0, 0, 1),
        key(1 << 32, 0, 0),
        key(1, 1, 0),
        key(0, 1, 1),
    ]
    assert len({low for low, _ in keys}) == len({high for _, high in keys}) == len(keys)
    assert key(5 + (1 << 64), 1, 2) == key(5, 1, 2)
    assert key(-1, 1, 2) == key((1 << 64) - 1, 1, 2)
    assert all(0 <= word < 1 << 32 for each in keys for word in each)
    assert key(0, 0, 0) != KEY_START


@pytest.mark.parametrize(
    "other",
    [(1, 1, 1), (1 << 32, 1, 1), (0, 2, 1), (0, 1, 2), (0, 1, 3), (0, 3, 1), (1, 2, 1), (1, 1, 2), (0, 2, 2)],
)
@pytest.mark.parametrize("lag", [0, 1, 128])
def test_seed_step_and_parameter_draw_on_their_own(other: tuple[int, int, int], lag: int) -> None:
    bits = random_bits(key(0, 1, 1), 0, 100_000, CPU)
    others = random_bits(key(*other), lag, 100_000, CPU)
    assert (bits == others).sum() < 5
    assert_uncorrelated(uniform16(bits), uniform16(others), f"low halves of (0, 1, 1) and {other}")
    assert_uncorrelated(uniform16(bits, high=True), uniform16(others, high=True), f"high halves, {other}")
    both = (bits ^ others).view(-1, 1) >> torch.arange(32) & 1
    shares = both.to(torch.float64).mean(dim=0)
    assert ((shares - 0.5).abs() < 5 * 0.5 / math.sqrt(100_000)).all(), "a bit follows the other key's"


@pytest.mark.parametrize("words", [key(0, 1, 0), key(1234, 1000, 77)], ids=["first", "later"])
def test_bits_are_balanced_and_the_two_halves_independent(words: tuple[int, int]) -> None:
    bits = random_bits(words, 0, DRAWS, CPU)
    signs = torch.stack([(bits >> place & 1) * 2 - 1 for place in range(32)]).to(torch.float32)
    means = signs.mean(dim=1)
    assert (means.abs() < 4.5 / math.sqrt(DRAWS)).all(), f"share of ones: {(means / 2 + 0.5).tolist()}"
    pairs = (signs @ signs.T / DRAWS).fill_diagonal_(0)
    assert pairs.abs().max() < 5 / math.sqrt(DRAWS), "two bits of a word go together"
    assert_uncorrelated(uniform16(bits), uniform16(bits, high=True), "low and high half")
    assert_uncorrelated(uniform16(bits) ** 2 - 1, uniform16(bits, high=True) ** 2 - 1, "sizes of the halves")


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 32, 128, 1024, 1 << 16])
def test_neighbouring_elements_draw_on_their_own(lag: int) -> None:
    bits = random_bits(key(0, 1, 0), 0, DRAWS, CPU)
    for high in (False, True):
        half = uniform16(bits, high)
        assert_uncorrelated(half[:-lag], half[lag:], f"elements {lag} apart, high={high}")


def test_low_halves_are_uniform() -> None:
    """Chi-square over 4,096 cells, within 4 sigma."""
    bits = random_bits(key(0, 1, 0), 0, DRAWS, CPU)
    for half in (bits & 0xFFFF, bits >> 16 & 0xFFFF):
        counts = torch.bincount(half >> 4, minlength=4096).to(torch.float64)
        expected = DRAWS / 4096
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 4095) < 4 * math.sqrt(2 * 4095)
