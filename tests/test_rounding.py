"""Stochastic rounding: where it lands, how often, and the bits that decide.

Rates are 3-sigma tests over fixed draws: they pass or fail the same way on every run. What a draw must do
is worked out in fractions, and the generator in Python's integers.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_fp8.ops.blocks import to_float32
from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP16, UE4M4, Format
from ds_fp8.ops.rounding import EXP_AVG_SQ, START, key, mix, random_bits, round_up_from_zero, stream

CPU = torch.device("cpu")
NARROW = (FP16, BF16, E4M3, E5M2, UE4M4)
CODE_DTYPE = {1: torch.uint8, 2: torch.int16}
DRAWS = 1_000_000
ALL_DRAWS = torch.arange(1 << 16, dtype=torch.int32) << 8  # evenly over the 24 bits of a draw
MASK = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
SPREAD = 0x9E3779B9
words32 = st.integers(0, MASK)

each_format = pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)


def table(fmt: Format) -> Tensor:
    """The finite non-negative values of a format, [codes] float32; the index is the code."""
    codes = torch.arange(1 << (8 * fmt.itemsize - fmt.signed)).to(CODE_DTYPE[fmt.itemsize])
    values = to_float32(codes.view(fmt.dtype), fmt)
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


def values_between_codes(fmt: Format) -> Tensor:
    """FP32 values from the smallest code to the largest: subnormal, at the borders, in every binade."""
    codes, top = table(fmt).to(torch.float64), len(table(fmt)) - 1
    first_normal = int(2**fmt.mantissa_bits)
    lower = torch.tensor([1, 2, 3, first_normal - 1, first_normal, top // 2, top - 1])[:, None]
    remainders = torch.tensor([2.0**-16, 2.0**-12, 0.1, 0.5, 2 / 3, 1 - 2.0**-6, 1 - 2.0**-13])
    placed = (codes[lower] + remainders * (codes[lower + 1] - codes[lower])).view(-1).to(torch.float32)
    beside = torch.nextafter(table(fmt)[lower.view(-1)], torch.tensor(torch.inf))
    generator = torch.Generator().manual_seed(2)
    low, high = (int(torch.tensor(end).view(torch.int32)) for end in (fmt.smallest, fmt.max))
    spread = torch.randint(low, high, (60,), generator=generator, dtype=torch.int32).view(torch.float32)
    subnormal = torch.rand(60, generator=generator) * (first_normal - 1) * fmt.smallest + fmt.smallest
    return torch.cat([placed, beside, spread, subnormal])


def bits_of(word: int, element: int) -> int:
    """The 24 random bits of one element, in integers."""
    x = (element * SPREAD + word) & MASK
    x = (x ^ x >> 16) * MULTIPLIERS[0] & MASK
    x = (x ^ x >> 15) * MULTIPLIERS[1] & MASK
    return x >> 8


def unmix(x: int) -> int:
    """What the mixer made x of: its steps undone, the last first."""
    x ^= x >> 15 ^ x >> 30
    x = x * pow(MULTIPLIERS[1], -1, 1 << 32) & MASK
    x ^= x >> 15 ^ x >> 30
    x = x * pow(MULTIPLIERS[0], -1, 1 << 32) & MASK
    return x ^ x >> 16


def uniform(bits: Tensor) -> Tensor:
    """24 bits as numbers of mean 0 and variance 1, float64."""
    return (bits.to(torch.float64) - (2.0**24 - 1) / 2) / math.sqrt((2.0**48 - 1) / 12)


def signs(bits: Tensor) -> Tensor:
    """Each of the 24 bits as -1 or 1, [24, count] float32."""
    return torch.stack([(bits >> place & 1) * 2 - 1 for place in range(24)]).to(torch.float32)


def assert_uncorrelated(a: Tensor, b: Tensor, what: str) -> None:
    """Pearson correlation within 4 sigma of 0, of the numbers and of how far they lie from their mean."""
    for x, y, which in ((a, b, "values"), (a**2 - 1, b**2 - 1, "sizes")):
        z = float((x * y).sum() / x.norm() / y.norm()) * math.sqrt(len(x))
        assert abs(z) < 4, f"{what}, {which}: {z} sigma"


def chi_square(cells: Tensor, count: int) -> float:
    """Sigmas between the counts of the cells and uniform ones."""
    expected = len(cells) / count
    square = float(((torch.bincount(cells, minlength=count) - expected) ** 2 / expected).sum())
    return (square - (count - 1)) / math.sqrt(2 * (count - 1))


@each_format
def test_lands_on_the_two_neighbours(fmt: Format) -> None:
    values, codes = positive_values(fmt, 100_000), table(fmt)
    bits = random_bits(key(stream(0, 1, EXP_AVG_SQ), 2), 0, len(values), CPU)
    below = torch.searchsorted(codes, values, right=True) - 1
    above = torch.searchsorted(codes, values)
    rounded = code_of(round_up_from_zero(values, bits, fmt))
    expected_below = below.clamp(min=1)  # between zero and the first code: never zero
    assert ((rounded == expected_below) | (rounded == above)).all()
    between = (below < above) & (below > 0)
    assert (rounded[between] == below[between]).any()
    assert (rounded[between] == above[between]).any()


@each_format
@pytest.mark.parametrize("bits", [0, 1, 0xFFFFFF, 0x800000, 0x555555])
def test_a_value_of_the_format_is_kept(fmt: Format, bits: int) -> None:
    values = table(fmt)
    rounded = round_up_from_zero(values, torch.full((len(values),), bits, dtype=torch.int32), fmt)
    assert rounded.dtype is fmt.dtype
    assert torch.equal(code_of(rounded), torch.arange(len(values)))


@each_format
def test_the_expected_code_is_the_value_within_one_draw(fmt: Format) -> None:
    """Over 65,536 draws, in fractions. Exact where as many are all that FP32 drops."""
    granularity = Fraction(1, 1 << min(16, 23 - fmt.mantissa_bits))
    codes, values = table(fmt), values_between_codes(fmt)
    assert (values < 2.0**fmt.min_exponent).sum() > 60
    lower = torch.searchsorted(codes, values, right=True) - 1
    for code, value in zip(lower.tolist(), values.tolist(), strict=True):
        low, high = Fraction(codes[code].item()), Fraction(codes[code + 1].item())
        exact = code + (Fraction(value) - low) / (high - low)
        rounded = code_of(round_up_from_zero(torch.tensor(value).expand(1 << 16), ALL_DRAWS, fmt))
        assert ((rounded == code) | (rounded == code + 1)).all(), value
        error = abs(Fraction(int(rounded.sum()), 1 << 16) - exact)
        assert error < granularity, f"{value}: {float(error)} of a code"
        if fmt is BF16 or (fmt is FP16 and value >= 2.0**fmt.min_exponent):
            assert error == 0, value


@pytest.mark.parametrize("fmt", [E4M3, E5M2, UE4M4], ids=lambda fmt: fmt.name)
def test_over_every_draw_the_mean_is_the_value(fmt: Format) -> None:
    """To the last bit of FP32, in 8 bits too, wherever a code is normal."""
    dropped = 23 - fmt.mantissa_bits
    draws = torch.arange(1 << dropped, dtype=torch.int32) << 24 - dropped
    for value in (1.0 + 2.0**-23, 1.0 + 2.0**-10, 1.3, 1.4999999, 7.77):
        rounded = code_of(round_up_from_zero(torch.tensor(value).expand(len(draws)), draws, fmt))
        code, between = int(rounded.min()), Fraction(torch.tensor(value).item())
        low, high = (Fraction(each.item()) for each in table(fmt)[code : code + 2])
        assert Fraction(int((rounded - code).sum()), len(draws)) == (between - low) / (high - low)


@each_format
@pytest.mark.parametrize("remainder", [0.01, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("place", ["subnormal", "normal", "last"])
def test_the_mean_is_the_value(fmt: Format, remainder: float, place: str) -> None:
    codes = table(fmt).to(torch.float64)
    code = {"subnormal": 1, "normal": len(codes) // 2, "last": len(codes) - 2}[place]
    step = float(codes[code + 1] - codes[code])
    value = (codes[code] + remainder * step).to(torch.float32)
    share = (float(value) - float(codes[code])) / step
    bits = random_bits(key(stream(7, code, EXP_AVG_SQ), int(100 * remainder)), 0, DRAWS, CPU)
    rounded = round_up_from_zero(value.expand(DRAWS), bits, fmt)
    mean = code_of(rounded).to(torch.float64).mean().item()
    sigma = math.sqrt(share * (1 - share) / DRAWS)
    assert abs(mean - (code + share)) < 3 * sigma + 2.0**-16


@each_format
def test_a_larger_draw_never_rounds_lower(fmt: Format) -> None:
    for value in values_between_codes(fmt)[::5]:
        rounded = code_of(round_up_from_zero(value.expand(1 << 16), ALL_DRAWS, fmt))
        assert (rounded[1:] >= rounded[:-1]).all()


@each_format
def test_zero_stays_zero_and_nothing_else_becomes_zero(fmt: Format) -> None:
    tiny = torch.tensor([2.0**-149, 2.0**-126, fmt.smallest * 2.0**-16, fmt.smallest / 2, fmt.smallest])
    tiny = tiny[(tiny > 0) & (tiny <= fmt.smallest)]
    for value in tiny:
        assert (code_of(round_up_from_zero(value.expand(1 << 16), ALL_DRAWS, fmt)) == 1).all()
    for zero in (torch.tensor(0.0), torch.tensor(-0.0)):
        assert not code_of(round_up_from_zero(zero.expand(1 << 16), ALL_DRAWS, fmt)).any()


@pytest.mark.parametrize("bits", [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], ids=hex)
def test_without_a_scale_a_value_that_is_not_finite_stays_so(bits: int) -> None:
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert not round_up_from_zero(value.expand(1 << 16), ALL_DRAWS, BF16).isfinite().any()


GOLDEN = [  # seed, step, state, parameter; stream, key, first element, bits of the elements from there on
    ((0, 1, EXP_AVG_SQ, 0), 0x2B55BE41, 0xCCBC6CD9, 0, [4115739, 9899023, 12050048, 6740412]),
    ((1234, 1000, EXP_AVG_SQ, 77), 0xA31127C1, 0x37C66720, 1 << 20, [11921926, 9027484, 11599885, 2126867]),
    (
        (0xDEADBEEFCAFEF00D, 250_000, 1, 4095),
        0x7F4079BB,
        0xA32D203F,
        (1 << 31) - 2,
        [7117705, 6393362, 11445876, 12940495],
    ),
    (
        ((1 << 64) - 1, MASK, 0, MASK),
        0x8D8BCAF7,
        0x07392351,
        (1 << 32) - 2,
        [10994530, 10928299, 2119883, 11324017],
    ),
]


@pytest.mark.parametrize(("place", "stream_word", "key_word", "first", "bits"), GOLDEN)
def test_the_generator_does_not_change(
    place: tuple[int, int, int, int], stream_word: int, key_word: int, first: int, bits: list[int]
) -> None:
    """A resumed run would round otherwise than the run it continues, and every kernel than the next."""
    seed, step, state, parameter = place
    assert stream(seed, step, state) == stream_word
    assert key(stream_word, parameter) == key_word
    assert random_bits(key_word, first, len(bits), CPU).tolist() == bits


@settings(deadline=None, max_examples=60)
@given(words32, st.integers(0, 2**34), st.integers(1, 40))
def test_bits_are_the_upper_half_of_a_hash_of_key_and_element(word: int, first: int, count: int) -> None:
    bits = random_bits(word, first, count, CPU)
    assert bits.dtype is torch.int32
    assert bits.tolist() == [bits_of(word, element) for element in range(first, first + count)]
    assert all(0 <= each <= 0xFFFFFF for each in bits.tolist())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**34), st.lists(st.integers(1, 400), min_size=1, max_size=6), words32)
def test_bits_do_not_depend_on_the_cut(first: int, cuts: list[int], word: int) -> None:
    whole = random_bits(word, first, sum(cuts), CPU)
    starts = [first + sum(cuts[:index]) for index in range(len(cuts))]
    parts = [random_bits(word, start, count, CPU) for start, count in zip(starts, cuts, strict=True)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype is torch.int32


@pytest.mark.parametrize("wrap", [1 << 31, 1 << 32])
def test_element_indices_pass_the_signed_and_the_unsigned_end(wrap: int) -> None:
    word = key(stream(3, 4, EXP_AVG_SQ), 5)
    across = random_bits(word, wrap - 64, 128, CPU)
    assert torch.equal(across[:64], random_bits(word, wrap - 64, 64, CPU))
    assert torch.equal(across[64:], random_bits(word, wrap % (1 << 32), 64, CPU))
    assert across[63:65].tolist() == [bits_of(word, wrap - 1), bits_of(word, wrap)]


@settings(deadline=None)
@given(words32)
def test_the_mixer_can_be_undone(word: int) -> None:
    assert unmix(mix(word)) == word
    assert 0 <= mix(word) <= MASK


def test_the_mixer_loses_nothing() -> None:
    """A hash with collisions on single words would draw some bits twice as often."""
    assert len({mix(word) for word in range(1 << 20)}) == 1 << 20


def test_stream_and_key_take_every_word_of_their_input() -> None:
    streams = [
        stream(*place)
        for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (1, 1, 0), (0, 1, 1))
    ]
    keys = [key(word, parameter) for word in streams for parameter in (0, 1, 2, MASK)]
    assert len({START, *streams, *keys}) == 1 + len(streams) + len(keys)
    assert stream(5 + (1 << 64), 1, 2) == stream(5, 1, 2)
    assert stream(-1, 1, 2) == stream((1 << 64) - 1, 1, 2)
    assert all(0 <= word <= MASK for word in streams + keys)


@pytest.mark.parametrize(
    "other",
    [
        (1, 1, 2, 1),
        (1 << 32, 1, 2, 1),
        (0, 2, 2, 1),
        (0, 1, 2, 2),
        (0, 1, 2, 3),
        (0, 3, 2, 1),
        (1, 2, 2, 1),
        (1, 1, 2, 2),
        (0, 2, 2, 2),
        (0, 1, 0, 1),
        (0, 1, 1, 1),
        (0, 2, 1, 1),
    ],
)
@pytest.mark.parametrize("lag", [0, 1, 128])
def test_seed_step_state_and_parameter_draw_on_their_own(other: tuple[int, int, int, int], lag: int) -> None:
    count, (seed, step, state, parameter) = 100_000, other
    bits = random_bits(key(stream(0, 1, 2), 1), 0, count, CPU)
    others = random_bits(key(stream(seed, step, state), parameter), lag, count, CPU)
    equal = int((bits >> 8 == others >> 8).sum())
    assert abs(equal - count / 65536) < 4 * math.sqrt(count / 65536)
    assert_uncorrelated(uniform(bits), uniform(others), f"(0, 1, 2, 1) and {other}")
    pairs = signs(bits) @ signs(others).T / count
    assert (pairs.abs() < 5 / math.sqrt(count)).all(), "a bit follows one of the other key's"


@pytest.mark.parametrize("word", [key(stream(0, 1, 2), 0), key(stream(1234, 1000, 2), 77)], ids=hex)
def test_bits_are_balanced_and_independent_within_a_draw(word: int) -> None:
    each = signs(random_bits(word, 0, DRAWS, CPU))
    means = each.mean(dim=1)
    assert (means.abs() < 4.5 / math.sqrt(DRAWS)).all(), f"share of ones: {(means / 2 + 0.5).tolist()}"
    pairs = (each @ each.T / DRAWS).fill_diagonal_(0)
    assert pairs.abs().max() < 5 / math.sqrt(DRAWS), "two bits of a draw go together"


@pytest.mark.parametrize("word", [key(stream(0, 1, 2), 0), key(stream(1234, 1000, 2), 77)], ids=hex)
def test_bits_are_uniform(word: int) -> None:
    """Chi-square within 4 sigma: cells of the upper 16 bits, and of 12 at the top, in the middle and last."""
    bits = random_bits(word, 0, DRAWS, CPU)
    for cells, count in (
        (bits >> 8, 1 << 16),
        (bits >> 12, 4096),
        (bits >> 8 & 4095, 4096),
        (bits & 4095, 4096),
    ):
        assert abs(chi_square(cells, count)) < 4


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 32, 128, 1024, 1 << 16])
def test_neighbouring_elements_draw_on_their_own(lag: int) -> None:
    bits = random_bits(key(stream(0, 1, 2), 0), 0, DRAWS, CPU)
    assert_uncorrelated(uniform(bits[:-lag]), uniform(bits[lag:]), f"elements {lag} apart")
    pairs = signs(bits[:-lag]) @ signs(bits[lag:]).T / (DRAWS - lag)
    assert pairs.abs().max() < 5 / math.sqrt(DRAWS - lag), "a bit follows one of its neighbour's"


@pytest.mark.parametrize("lag", [2048, 4096, 5120, 7168, 12288, 20480])
def test_distant_elements_do_not_follow_each_other(lag: int) -> None:
    for step in range(1, 5):
        draws = uniform(random_bits(key(stream(0, step, 2), 0), 0, DRAWS, CPU))
        assert_uncorrelated(draws[:-lag], draws[lag:], f"elements {lag} apart at step {step}")


@pytest.mark.parametrize("along", ["steps", "parameters"])
def test_an_element_draws_on_its_own_from_one_key_to_the_next(along: str) -> None:
    """What one moment sees over a run, and the first elements of many small parameters."""
    count, noise = 10_000, stream(0, 1, 2)
    if along == "steps":
        words = [key(stream(0, step, 2), 3) for step in range(1, count + 1)]
    else:
        words = [key(noise, parameter) for parameter in range(count)]
    draws = torch.stack([random_bits(word, 0, 8, CPU) for word in words])
    for element in range(8):
        bits = draws[:, element]
        assert abs(chi_square(bits >> 16, 256)) < 4
        assert abs(float(uniform(bits).mean())) < 4 / math.sqrt(count)
        for lag in (1, 2, 16):
            assert_uncorrelated(
                uniform(bits[:-lag]), uniform(bits[lag:]), f"element {element}, {lag} {along}"
            )
