"""Number formats: derived limits against torch, the OCP tables and every code decoded by hand."""

import dataclasses
import itertools
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from ds_fp8.ops.blocks import to_float32
from ds_fp8.ops.formats import BF16, BY_NAME, E4M3, E5M2, FP16, FP32, INT8, SPLIT8, SPLIT16, UE4M4, Format

NARROW = (E4M3, E5M2, FP16, BF16)
CODE_DTYPE = {1: torch.uint8, 2: torch.int16}
# Largest, smallest normal and smallest subnormal value, bias: IEEE 754 and OCP FP8 v1.0 table 1.
STANDARD = {
    "fp32": (float.fromhex("0x1.fffffep127"), 2.0**-126, 2.0**-149, 127),
    "bf16": (float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-133, 127),
    "fp16": (65504.0, 2.0**-14, 2.0**-24, 15),
    "e4m3": (448.0, 2.0**-6, 2.0**-9, 7),
    "e5m2": (57344.0, 2.0**-14, 2.0**-16, 15),
}


def decode_bits(code: int, exponent_bits: int, mantissa_bits: int, reserved: str) -> float:
    """Value of a sign-exponent-mantissa code, from the definition."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    field = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) & 1 else 1.0
    last = (1 << exponent_bits) - 1
    if reserved == "exponent" and field == last:
        return math.nan if mantissa else sign * math.inf
    if reserved == "code" and field == last and mantissa == (1 << mantissa_bits) - 1:
        return math.nan
    bias = (1 << (exponent_bits - 1)) - 1
    significand = mantissa + (1 << mantissa_bits if field else 0)
    return sign * math.ldexp(significand, max(field, 1) - bias - mantissa_bits)


def all_codes(fmt: Format) -> Tensor:
    """Every code of an 8- or 16-bit format, in the order of its bits."""
    return torch.arange(1 << 8 * fmt.itemsize).to(CODE_DTYPE[fmt.itemsize]).view(fmt.dtype)


def test_every_format_is_known_by_its_name() -> None:
    assert set(BY_NAME) == {*STANDARD, "ue4m4", "int8", "split16", "split8"}
    assert all(fmt.name == name for name, fmt in BY_NAME.items())


@pytest.mark.parametrize("name", STANDARD)
def test_limits_are_those_of_the_standards(name: str) -> None:
    fmt = BY_NAME[name]
    largest, normal, subnormal, bias = STANDARD[name]
    assert (fmt.max, 2.0**fmt.min_exponent, fmt.smallest, fmt.bias) == (largest, normal, subnormal, bias)
    assert math.frexp(largest) == (fmt.max_significand / 2, fmt.max_exponent + 1)
    assert fmt.itemsize * 8 == 1 + fmt.exponent_bits + fmt.mantissa_bits


@pytest.mark.parametrize("name", STANDARD)
def test_limits_are_those_of_torch(name: str) -> None:
    fmt, info = BY_NAME[name], torch.finfo(BY_NAME[name].dtype)
    assert (fmt.max, 2.0**fmt.min_exponent) == (info.max, info.smallest_normal)
    assert 2.0**-fmt.mantissa_bits == info.eps
    assert fmt.itemsize * 8 == info.bits


def test_only_formats_of_fp32_range_go_without_a_scale() -> None:
    assert {name for name, fmt in BY_NAME.items() if fmt.scaled} == {"fp16", "e4m3", "e5m2", "ue4m4", "int8"}


@pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)
def test_every_code_has_the_value_of_its_bits(fmt: Format) -> None:
    values = all_codes(fmt).to(torch.float32)
    expected = torch.tensor(
        [
            decode_bits(code, fmt.exponent_bits, fmt.mantissa_bits, fmt.reserved)
            for code in range(len(values))
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(values.to(torch.float64), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit()[~values.isnan()], expected.signbit()[~expected.isnan()])


def test_e4m3_and_e5m2_special_codes() -> None:
    """OCP FP8 v1.0: E4M3 has no infinity and two NaN codes, E5M2 two infinities and six NaN codes."""
    e4m3, e5m2 = all_codes(E4M3).to(torch.float32), all_codes(E5M2).to(torch.float32)
    assert e4m3.isnan().nonzero().view(-1).tolist() == [0x7F, 0xFF]
    assert not e4m3.isinf().any()
    assert e5m2.isinf().nonzero().view(-1).tolist() == [0x7C, 0xFC]
    assert e5m2.isnan().nonzero().view(-1).tolist() == [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]


@pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)
def test_limits_bound_the_codes(fmt: Format) -> None:
    values = all_codes(fmt).to(torch.float32)
    finite = values[values.isfinite()]
    assert finite.max().item() == fmt.max
    assert finite.min().item() == -fmt.max
    assert finite[finite > 0].min().item() == fmt.smallest
    positive = values[: len(values) // 2]
    ascending = positive[positive.isfinite()]
    assert (ascending.diff() > 0).all(), "positive codes must ascend: stochastic rounding adds to them"


def test_ue4m4_has_no_sign_and_a_value_for_every_code() -> None:
    """Four exponent bits of bias 7, four mantissa bits, up to 496, from 2^-10."""
    values = to_float32(all_codes(UE4M4), UE4M4).to(torch.float64)
    expected = [decode_bits(code, 4, 4, "nothing") for code in range(256)]
    assert values.tolist() == expected
    assert (UE4M4.max, UE4M4.smallest, UE4M4.bias) == (496, 2.0**-10, 7) == (max(expected), expected[1], 7)
    assert (values.diff() > 0).all(), "codes must ascend: stochastic rounding adds to them"
    assert UE4M4.itemsize * 8 == UE4M4.exponent_bits + UE4M4.mantissa_bits


def test_int8_has_its_code_as_value() -> None:
    """From -127 to 127: -128, which nothing is rounded to, has no counterpart."""
    values = to_float32(torch.arange(-127, 128).to(torch.int8), INT8)
    assert values.tolist() == list(range(-127, 128))
    assert (INT8.max, INT8.smallest, 2.0**INT8.min_exponent) == (127, 1, 64)
    assert INT8.max == INT8.max_significand * 2.0**INT8.max_exponent
    assert INT8.itemsize * 8 == 1 + INT8.exponent_bits + INT8.mantissa_bits


def test_split_formats_count_the_bits_of_the_weight() -> None:
    """The sign, the exponent and 7 bits of the mantissa are those of BF16; the code is the rest."""
    for fmt in (SPLIT16, SPLIT8):
        assert 1 + fmt.exponent_bits + fmt.mantissa_bits == 16 + 8 * fmt.itemsize
        assert not fmt.scaled
    assert (SPLIT16.max, SPLIT16.smallest) == (FP32.max, FP32.smallest)


@pytest.mark.parametrize("reserved", ["exponent", "code", "nothing"])
@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits"), list(itertools.product(range(2, 6), range(1, 6)))
)
def test_limits_of_any_format_follow_from_its_bits(
    exponent_bits: int, mantissa_bits: int, reserved: Literal["exponent", "code", "nothing"]
) -> None:
    fmt = Format("trial", exponent_bits, mantissa_bits, reserved, torch.uint8)
    codes = range(1 << (exponent_bits + mantissa_bits))
    values = [decode_bits(code, exponent_bits, mantissa_bits, reserved) for code in codes]
    finite = [value for value in values if math.isfinite(value)]
    assert fmt.max == max(finite)
    assert fmt.smallest == min(value for value in finite if value)
    assert 2.0**fmt.min_exponent == values[1 << mantissa_bits]
    assert fmt.max == fmt.max_significand * 2.0**fmt.max_exponent
    assert 1 <= fmt.max_significand < 2


def test_formats_are_values() -> None:
    assert dataclasses.replace(E4M3) == E4M3
    assert len({FP32, BF16, FP16, E4M3, E5M2, dataclasses.replace(E5M2)}) == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        E4M3.name = "other"  # type: ignore[misc]
