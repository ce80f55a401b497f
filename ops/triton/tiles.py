"""Tiles of blocks on a GPU: the device functions that all Triton kernels share.

A tile is [ROWS, BLOCK]: a block is a row, so its amax is a reduction in registers. Formats are compile-time
constants. From sm_89 on the hardware converts FP8; before, integer arithmetic does, to the same bits.

Kernels are bound by instructions as much as by memory. So a scale is multiplied with a row's other factors
before the row is, and a tile's address is one 64-bit base and 32-bit offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from packaging.version import Version
from torch import Tensor

from ds_fp8.ops.adam import Segment
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BY_NAME

# First compute capability whose own conversion is used: on sm_89 Triton before 3.9 goes through FP16 and
# so rounds twice.
FIRST_WITH_FP8 = (8, 9) if Version(triton.__version__) >= Version("3.9") else (9, 0)
PER_WARP = 512  # elements of a tile: 16 per thread, one 16-byte access of an 8-bit format


@dataclass(frozen=True)
class Plan:
    """The segments of a shard, as the sweep looks them up."""

    table: Tensor  # [3, segments] int32: row with which one begins, its block of the parameter, the parameter
    tile_segments: Tensor  # [tiles + 1] int32: the segment with which a tile begins
    blocks: int

    @classmethod
    def of(
        cls, segments: Sequence[Segment], blocks: int, block_size: int, warps: int, device: torch.device
    ) -> "Plan":
        columns = [(s.blocks.start, s.first_element // block_size, s.parameter) for s in segments]
        table = torch.tensor(columns or [(0, 0, 0)], dtype=torch.int32).t().contiguous()
        rows, programs = tile_of(blocks, block_size, warps)
        first_rows = torch.arange(programs + 1, dtype=torch.int32) * rows
        following = torch.searchsorted(table[0], first_rows, right=True, out_int32=True)
        tile_segments = (following - 1).clamp_(min=0)  # rows before the first segment are padding
        return cls(table.to(device), tile_segments.to(device), blocks)


def tile_of(blocks: int, block_size: int, warps: int, tiles: int = 1) -> tuple[int, int]:
    """Rows of a tile that `warps` work at, and the number of programs if each does `tiles` tiles."""
    rows = PER_WARP * warps // block_size
    return rows, -(-blocks // (rows * tiles))


def hardware_fp8(device: torch.device) -> bool:
    """Whether the device converts FP8 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_WITH_FP8


def scales_of(blocks: Blocks) -> Tensor:
    """The scales, or the codes if there are none: a kernel's pointer needs an address."""
    return blocks.codes if blocks.scales is None else blocks.scales


def partials(counts: Tensor | None, programs: int, otherwise: Tensor) -> Tensor:
    """Zeros for each program's counts, or `otherwise` if nothing is counted: a pointer needs an address."""
    if counts is None:
        return otherwise
    return torch.zeros(programs, counts.numel(), dtype=torch.float64, device=counts.device)


@triton.constexpr_function
def is_scaled(name):
    return BY_NAME[name].scaled


@triton.constexpr_function
def max_exponent(name):
    return BY_NAME[name].max_exponent


@triton.constexpr_function
def max_mantissa(name):
    return int((BY_NAME[name].max_significand - 1) * 2**23)


@triton.constexpr_function
def largest(name):
    return BY_NAME[name].max


@triton.constexpr_function
def two_to_the(exponent):
    return 2.0**exponent


@triton.jit
def power_of_two(e):
    """2^(e - 127); e = 255 gives inf, and 0 * inf is NaN."""
    return (e.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode(codes, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes to float32, unscaled."""
    if FORMAT == "e4m3":
        if HARDWARE:
            return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        byte = codes.to(tl.int32)
        bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif FORMAT == "e5m2":  # the upper byte of an FP16
        return (codes.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "ue4m4":  # below the exponent of FP32, brought onto it
        bits = codes.to(tl.int32) << 19
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif FORMAT == "bf16":  # the upper half of an FP32
        return (codes.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        if FORMAT == "int8":
            codes = codes.to(tl.int8, bitcast=True)
        return codes.to(tl.float32)


@triton.jit
def round_to_byte(values, DROPPED: tl.constexpr, BIAS: tl.constexpr):
    """float32 to the code of an 8-bit float, to nearest with ties to even, by integers alone."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (
        magnitude - ((127 - BIAS) << 23) + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    ) >> DROPPED
    # Below the smallest normal value the codes lie as far apart as the float32 near this number.
    MAGIC: tl.constexpr = (127 - BIAS + 1 + DROPPED) << 23
    magic = tl.full(magnitude.shape, MAGIC, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - MAGIC
    code = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def round_to_bf16(values):
    """float32 to the codes of BF16, to nearest with ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values != values, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def encode(values, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """float32 within the format's range to codes, to nearest with ties to even."""
    if FORMAT == "e4m3":
        if HARDWARE:
            return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return round_to_byte(values, 20, 7)
    elif FORMAT == "e5m2":
        return round_to_byte(values, 21, 15)
    elif FORMAT == "fp16":
        return values.to(tl.float16)
    elif FORMAT == "bf16":
        return round_to_bf16(values)
    else:
        return values


@triton.jit
def magnitude(values):
    """The bits of |values|, int32; they are in the order of the values."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def deciding_magnitudes(magnitudes, amax, rows, inside, SWEEP: tl.constexpr):
    """Magnitudes that decide a row's scale.

    SWEEP: blocks: the row's own; measure: these, and the largest is stored in amax; write: its tensor's, from
    amax.
    """
    if SWEEP == "measure":
        tl.store(amax + rows, tl.max(magnitudes, axis=1), mask=inside)
    if SWEEP == "write":
        magnitudes = tl.load(amax + rows, mask=inside, other=0)[:, None]
    return magnitudes


@triton.jit
def scale_exponent(magnitudes, FORMAT: tl.constexpr, UNIT: tl.constexpr):
    """The E8M0 byte of each row, [ROWS] int32; the values are 2^UNIT times what is stored."""
    return exponent_of(tl.max(magnitudes, axis=1), FORMAT, UNIT)


@triton.jit
def exponent_of(amax, FORMAT: tl.constexpr, UNIT: tl.constexpr):
    """The E8M0 byte of what has these largest magnitudes."""
    exponent = amax >> 23
    e = exponent - (max_exponent(FORMAT) + UNIT) + ((amax & 0x7FFFFF) > max_mantissa(FORMAT)).to(tl.int32)
    return tl.where(exponent == 255, 255, tl.minimum(tl.maximum(e, 1), 254))


@triton.jit
def inverse_scale(e, UNIT: tl.constexpr):
    """The factor that brings a row of values onto its codes; 0 for a row that is not finite."""
    return (tl.maximum(tl.where(e == 255, 0, 254 - UNIT - e), 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_codes(codes, offset, inside, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """A tile's codes from memory, as unscaled float32; rows that are not inside are zeros."""
    return decode(tl.load(codes + offset, mask=inside[:, None], other=0), FORMAT, HARDWARE)


@triton.jit
def load_scales(scales, rows, inside, FORMAT: tl.constexpr):
    """The factor of each row's codes, [ROWS] float32, from E8M0 scales or from float32 ones."""
    if is_scaled(FORMAT) and scales.dtype.element_ty == tl.float32:
        return tl.load(scales + rows, mask=inside, other=1.0)
    if is_scaled(FORMAT):
        return power_of_two(tl.load(scales + rows, mask=inside, other=1))
    return tl.full(rows.shape, 1.0, tl.float32)


@triton.jit
def times(values, factor, FORMAT: tl.constexpr):
    """A tile times its rows' scales, if the format has any."""
    if is_scaled(FORMAT):
        return values * factor[:, None]
    return values


@triton.jit
def store_blocks(
    values,
    magnitudes,
    codes,
    scales,
    rows,
    offset,
    inside,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Round a tile of values, 2^UNIT times what is stored, to nearest; returns codes and scale exponents."""
    e = tl.full(rows.shape, 127, tl.int32)
    if is_scaled(FORMAT):
        e = scale_exponent(magnitudes, FORMAT, UNIT)
        tl.store(scales + rows, e.to(tl.uint8), mask=inside)
        values = values * inverse_scale(e, UNIT)[:, None]
    elif UNIT != 0:
        values = values * two_to_the(-UNIT)
    stored = encode(values, FORMAT, HARDWARE)
    tl.store(codes + offset, stored, mask=inside[:, None])
    return stored, e


@triton.jit
def tile_rows(blocks, tile, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """First row of a tile (64 bits), its rows, its elements' offsets, which rows are inside the blocks."""
    first = tile.to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    offset = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return first, rows, offset, rows < blocks - first
