"""What the tests of the Triton and the C++ kernels share: nasty values, garbage around them, comparisons.

The reference always runs on the CPU, the kernels on their device. Both start from the same garbage, rows
before and after those that they are given included, and all of it is compared: what is not written, and what
is written elsewhere, shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import NOT_FINITE, Blocks, quantize, to_float32
from ds_fp8.ops.cpu import build
from ds_fp8.ops.formats import BF16, BY_NAME, E4M3, E5M2, FP16, FP32, INT8, UE4M4, Format
from ds_fp8.ops.moments import encode_quotient, encode_second_moment

CPU = torch.device("cpu")
GARBAGE = 0xA5
GUARD = 64  # rows of garbage on either side: as many as a tile has, so that a store without a mask shows
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOAT32_MAX = torch.finfo(torch.float32).max
BAD = (torch.inf, -torch.inf, torch.nan)

ALL = tuple(fmt for fmt in BY_NAME.values() if fmt.dtype.is_floating_point)  # to which anything is rounded
SCALED = tuple(fmt for fmt in ALL if fmt.scaled)
NARROW = (E4M3, E5M2, FP16, BF16)
DECODED = (*NARROW, UE4M4)  # whose every code is decoded alone
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256)

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER)

each_format = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
each_narrow_format = pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)
each_decoded_format = pytest.mark.parametrize("fmt", DECODED, ids=lambda fmt: fmt.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Kernels:
    """What is held against the reference, and where it runs."""

    ops: Backend
    device: torch.device


def raw(values: Tensor) -> Tensor:
    """Values as integers, so that -0 and NaN compare by their bits."""
    return values.view(INTEGERS[values.element_size()])


def not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()


def assert_same(
    actual: Tensor,
    expected: Tensor,
    what: str,
    *,
    alike: Callable[[Tensor], Tensor] = torch.isnan,
    free: Tensor | None = None,
) -> None:
    """Bit for bit, but that one NaN is as good as another, and `free` elements mean nothing.

    alike: `not_finite` where values come from blocks that need not tell inf from NaN.
    """
    actual = actual.cpu()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    different = raw(actual) != raw(expected)
    if expected.is_floating_point():
        different &= ~(alike(actual.to(torch.float32)) & alike(expected.to(torch.float32)))
    if free is not None:
        different &= ~free
    if different.any():
        place = tuple(different.nonzero()[0].tolist())
        got, wanted = (f"{x[place].item()} ({raw(x)[place].item():#x})" for x in (actual, expected))
        count = int(different.sum())
        raise AssertionError(f"{what} {list(place)}: {got}, expected {wanted}; {count} differ")


def assert_same_blocks(
    actual: Blocks, expected: Blocks, what: str, *, alike: Callable[[Tensor], Tensor] = torch.isnan
) -> None:
    """Scales and codes; the codes of a block that is not finite mean nothing."""
    free = None
    if expected.scales is not None:
        assert actual.scales is not None
        assert_same(actual.scales, expected.scales, f"{what}, scale")
        free = (expected.scales == NOT_FINITE)[:, None]
    assert_same(actual.codes, expected.codes, f"{what}, code", alike=alike, free=free)


def to(blocks: Blocks, device: torch.device) -> Blocks:
    """A copy."""
    scales = None if blocks.scales is None else blocks.scales.to(device, copy=True)
    return Blocks(blocks.codes.to(device, copy=True), scales, blocks.format)


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(*shape, dtype=dtype)
    values.view(torch.uint8).fill_(GARBAGE)
    return values


def dirty(rows: int, block_size: int, fmt: Format) -> Blocks:
    """Garbage, with `GUARD` rows on either side of those that `inner` gives."""
    codes = garbage(rows + 2 * GUARD, block_size, dtype=fmt.dtype)
    return Blocks(codes, garbage(len(codes), dtype=torch.uint8) if fmt.scaled else None, fmt)


def inner(outer: Blocks) -> Blocks:
    return outer[GUARD : len(outer) - GUARD]


def guarded(values: Tensor, fmt: Format) -> Blocks:
    """Rows of values, rounded by the reference, between guards."""
    outer = dirty(len(values), values.shape[1], fmt)
    round_to_nearest(values, inner(outer))
    return outer


def round_to_nearest(values: Tensor, out: Blocks) -> None:
    """Rows of values into blocks; of an unsigned format their magnitudes."""
    if out.format is INT8:
        encode_quotient(values, out)
    elif out.format.signed:
        quantize(values.reshape(-1), out)
    else:
        encode_second_moment(values, values.abs(), out)


def every_code(fmt: Format) -> Tensor:
    """All codes of an 8-bit or 16-bit format, in order."""
    count = 1 << 8 * fmt.itemsize
    return torch.arange(count).to(INTEGERS[fmt.itemsize]).view(fmt.dtype)


def neighbours(values: Tensor) -> Tensor:
    """The float32 values, the one below and the one above each."""
    below = torch.nextafter(values, torch.tensor(-torch.inf))
    return torch.cat([values, below, torch.nextafter(values, torch.tensor(torch.inf))])


def special_values() -> Tensor:
    """Zeros, denormals, powers of two and the largest values of either sign, finite."""
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float64)).to(torch.float32)
    denormals = torch.arange(1, 1 << 23, 12_345, dtype=torch.int32).view(torch.float32)
    top = torch.tensor([0.0, FLOAT32_MAX])
    values = torch.cat([neighbours(powers), denormals, top])
    return torch.cat([values, -values])


def nasty_values(fmt: Format) -> Tensor:
    """Every code's value and every midpoint between two, the float32 on either side of each, and specials.

    Finite, and not above the format's maximum, which no value exceeds once it is scaled.
    """
    if fmt is FP32:
        return special_values()
    codes = to_float32(every_code(fmt), fmt).to(torch.float64)
    codes = codes[codes.isfinite()].sort().values
    edges = torch.cat([codes, (codes[1:] + codes[:-1]) / 2]).to(torch.float32)
    values = torch.cat([neighbours(edges), torch.tensor([0.0, -0.0]), special_values()])
    return values[values.abs() <= (fmt.max if fmt.scaled else FLOAT32_MAX)]


FINITE_KINDS = ("normal", "zero", "denormal", "tiny", "huge")
ROW_KINDS = (*FINITE_KINDS, "bits", "inf", "nan")


def cycled(kinds: Sequence[str], rows: int, turn: int = 0) -> list[str]:
    return [kinds[(row + turn) % len(kinds)] for row in range(rows)]


def rows_of(kinds: Sequence[str], block_size: int, seed: int) -> Tensor:
    """A row of float32 values of each kind, [kinds, block size]; "bits" may be anything."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(kinds), block_size)
    normal = torch.randn(shape, generator=generator)
    sign = normal.sign()
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    spot = torch.arange(block_size) == torch.randint(block_size, (len(kinds), 1), generator=generator)
    candidates = {
        "normal": normal * torch.exp2(torch.randint(-20, 5, (len(kinds), 1), generator=generator)),
        "zero": sign * 0.0,
        "denormal": (bits & 0x7FFFFF).view(torch.float32) * sign,
        "tiny": normal * 1e-37,
        "weak": normal * 2.0**-40,
        "faint": normal * 2.0**-70,
        "strong": normal * 2.0**60,
        "sparse": torch.where(bits % 3 == 0, normal, (bits & 0x7FFFFF).view(torch.float32) * (bits % 3 - 1)),
        "huge": torch.where(spot, sign * 2.0**127, normal * 1e37),
        "bits": bits.view(torch.float32),
        "inf": torch.where(spot, sign * torch.inf, normal),
        "nan": torch.where(spot, torch.nan, normal),
    }
    if not kinds:
        return torch.empty(shape)
    return torch.stack([candidates[kind][row] for row, kind in enumerate(kinds)])


def in_rows(values: Tensor, block_size: int, anchor: float) -> Tensor:
    """Rows of values that end with an anchor, [rows, block size]; the last row is filled with zeros."""
    short = -len(values) % (block_size - 1)
    rows = torch.cat([values, torch.zeros(short)]).view(-1, block_size - 1)
    return torch.cat([rows, torch.full((len(rows), 1), anchor)], dim=1)
