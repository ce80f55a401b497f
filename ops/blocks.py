"""Blocks of codes with power-of-two scales, and the nearest rounding into them.

    value = code * 2^(e - 127)

block        consecutive values, a row. In a scaled format it has a byte e, E8M0 (OCP MX v1.0 section 5.4.1).
e            the smallest in 1..254 with which the largest magnitude stays under the format's maximum. It is
             read off the float's bits: a logarithm would round.
exact        scaling by a power of two rounds nothing, so requantising an unchanged block keeps its values.
zeros        e = 1 and zero codes.
inf or NaN   e = 255; the codes are unspecified, and every value of the block decodes to inf or NaN. So
             non-finite values travel in band, and no other pass has to look for them.
overflow     values in the last half code below 2^128 round up to 2^128 and decode to inf, as FP32 overflows.

An example, [1000, -3, 0.1] in E4M3, whose maximum is 448: 1000 / 2^1 = 500 is above it, 1000 / 2^2 = 250 is
not, so e = 127 + 2. The values over 4, [250, -0.75, 0.025], are rounded to the codes [256, -0.75,
0.025390625], which decode, times 4, to [1024, -3, 0.1015625].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fp8.ops.formats import FP32, Format
from ds_fp8.ops.health import count_gradient

CHUNK = 1 << 16  # elements computed at a time, so that no temporary is as long as its operand
NOT_FINITE = 255  # E8M0 code of a block that holds inf or NaN


@dataclass(frozen=True)
class Blocks:
    """Values as codes of one format and, if the format is scaled, one scale per block."""

    codes: Tensor  # [blocks, block size] format.dtype
    scales: Tensor | None  # [blocks] uint8 (E8M0) or float32 (the scale itself); None if not scaled
    format: Format

    @staticmethod
    def zeros(blocks: int, block_size: int, fmt: Format, device: torch.device) -> "Blocks":
        codes = torch.zeros(blocks, block_size, dtype=fmt.dtype, device=device)
        scales = torch.ones(blocks, dtype=torch.uint8, device=device) if fmt.scaled else None
        return Blocks(codes, scales, fmt)

    @property
    def block_size(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows: slice) -> "Blocks":
        scales = self.scales[rows] if self.scales is not None else None
        return Blocks(self.codes[rows], scales, self.format)

    def zero_(self) -> None:
        self.codes.zero_()
        if self.scales is not None:
            self.scales.fill_(1)

    def copy_(self, other: "Blocks") -> None:
        """Copy codes and scales of the same format and shape."""
        assert self.format == other.format
        self.codes.copy_(other.codes)
        if self.scales is not None and other.scales is not None:
            self.scales.copy_(other.scales)


def chunks(blocks: int, block_size: int) -> Iterator[slice]:
    """Rows of at most CHUNK elements each, in order."""
    rows = max(1, CHUNK // block_size)
    for first in range(0, blocks, rows):
        yield slice(first, min(first + rows, blocks))


def padded(vector: Tensor, rows: int, block_size: int) -> Tensor:
    """A vector as [rows, block size], filled up with zeros."""
    whole = vector.new_zeros(rows, block_size)
    whole.view(-1)[: vector.numel()] = vector
    return whole


def scale_exponents(values: Tensor, fmt: Format, unit: int = 0) -> Tensor:
    """The E8M0 byte of each row, [rows, block size] float32 -> [rows] int32.

    values: 2^unit times what is stored.
    """
    bits = values.abs().amax(dim=1).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    max_mantissa = int((fmt.max_significand - 1) * 2**23)
    e = (exponent - (fmt.max_exponent + unit) + (mantissa > max_mantissa)).clamp_(1, 254)
    return torch.where(exponent == 255, NOT_FINITE, e)


def power_of_two(e: Tensor) -> Tensor:
    """2^(e - 127) as float32, for e in 1..254; e = 255 gives inf, and 0 * inf is NaN."""
    return (e.to(torch.int32) << 23).view(torch.float32)


def scale_values(scales: Tensor) -> Tensor:
    """Scales, as `Blocks` holds them, as float32; that of a block that is not finite is not finite."""
    return scales if scales.is_floating_point() else power_of_two(scales)


def scale_down(values: Tensor, e: Tensor, unit: int = 0) -> Tensor:
    """Rows of `values` divided by 2^unit and their scale, exactly.

    In a row with inf or NaN (e = 255), finite values become 0 and the others NaN.
    """
    inverse = torch.where(e < NOT_FINITE, 254 - unit - e, 0).clamp(min=0)
    return values * power_of_two(inverse)[:, None]


def fit(values: Tensor, out: Blocks, unit: int = 0) -> Tensor:
    """Write the scales of a chunk of blocks; return its values over their scales, float32, not rounded yet.

    values: [rows, block size] float32, 2^unit times what is stored. No result exceeds the format's maximum.
    """
    if out.scales is None:
        return values * 2.0**-unit if unit else values
    e = scale_exponents(values, out.format, unit)
    out.scales.copy_(power_of_two(e) if out.scales.is_floating_point() else e)
    return scale_down(values, e, unit)


def encode(values: Tensor, out: Blocks, unit: int = 0) -> None:
    """Round [rows, block size] float32 to nearest, ties to even, into as many blocks.

    One chunk: the caller cuts. values: 2^unit times what is stored. The format is one of torch's own.
    """
    assert out.codes.is_floating_point()
    out.codes.copy_(fit(values, out, unit))


def to_float32(codes: Tensor, fmt: Format) -> Tensor:
    """Codes as numbers, without their scale; split codes are not numbers."""
    assert not fmt.split
    if codes.is_floating_point() or fmt.integer:
        return codes.to(torch.float32)
    # Shifted to their place in FP32, the bits are an FP32 number; the biases' distance corrects its exponent.
    bits = codes.to(torch.int32) << fmt.dropped_bits
    return bits.view(torch.float32) * 2.0 ** (FP32.bias - fmt.bias)


def decode(blocks: Blocks, factor: float | Tensor = 1.0) -> Tensor:
    """Values of a chunk of blocks times a factor, [rows, block size] float32.

    The factor, a number or a 0-d float32 tensor, meets the scale first: each value is multiplied once.
    """
    values = to_float32(blocks.codes, blocks.format)
    if blocks.scales is None:
        return values * factor
    return values * (scale_values(blocks.scales) * factor)[:, None]


def quantize(values: Tensor, out: Blocks, counts: Tensor | None = None) -> None:
    """Quantise a contiguous vector of at most len(out) * block size elements; the rest of `out` is zeros.

    values: [n] float32, bfloat16 or float16, consecutive elements of one parameter from a block boundary on.
    counts: `ops.health.GradientCounts` as a float64 vector on the device of the values, added to.

    Per block: amax = max |value|; e = the smallest with amax / 2^(e - 127) <= format.max (`scale_exponents`);
    code = round(value / 2^(e - 127)) (`scale_down`, then torch's cast).
    """
    block_size = out.block_size
    whole = values.numel() // block_size
    rows = values[: whole * block_size].view(whole, block_size)
    for part in chunks(whole, block_size):
        encode_and_count(rows[part].to(torch.float32), out[part], counts)
    tail = values[whole * block_size :]
    if tail.numel():
        last = padded(tail.to(torch.float32), 1, block_size)
        encode_and_count(last, out[whole : whole + 1], counts)
        whole += 1
    out[whole:].zero_()


def encode_and_count(values: Tensor, out: Blocks, counts: Tensor | None) -> None:
    """`encode` of rows, and `ops.health.GradientCounts` of them added to the counts."""
    encode(values, out)
    if counts is not None:
        counts += count_gradient(values, to_float32(out.codes, out.format), decode(out), out.format)


def dequantize(blocks: Blocks, out: Tensor) -> None:
    """Decode `blocks` into the vector `out`, [n]; values past its end are dropped."""
    for part in chunks(len(blocks), blocks.block_size):
        first = part.start * blocks.block_size
        piece = out[first : part.stop * blocks.block_size]
        piece.copy_(decode(blocks[part]).view(-1)[: piece.numel()])
