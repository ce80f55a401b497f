"""Stochastic rounding on a GPU: the device functions of `ops.rounding`, bit for bit."""

import triton
import triton.language as tl

from ds_fp8.ops import rounding
from ds_fp8.ops.formats import BY_NAME
from ds_fp8.ops.triton.tiles import is_scaled

SPREAD = tl.constexpr(rounding.SPREAD)
FIRST_MULTIPLIER = tl.constexpr(rounding.MULTIPLIERS[0])
FEWER_BITS = tl.constexpr(rounding.FEWER_BITS)
APART = tl.constexpr(rounding.APART)
SECOND_MULTIPLIER = tl.constexpr(rounding.MULTIPLIERS[1])


@triton.constexpr_function
def dropped_bits(name):
    return BY_NAME[name].dropped_bits


@triton.constexpr_function
def exponent_shift(name):
    return BY_NAME[name].bias - 127


@triton.jit
def mix(x):
    """`ops.rounding.mix` on uint32, without its last step: the upper bits are random."""
    x = (x ^ (x >> 16)) * FIRST_MULTIPLIER
    return (x ^ (x >> 15)) * SECOND_MULTIPLIER


@triton.jit
def row_places(first, rows, table, tile_segments, tile, segments, BLOCK: tl.constexpr):
    """Each row's parameter, int32, and the first element of it that the row holds, uint32.

    table, tile_segments, segments: as `adam_kernel` has them.
    """
    starts, first_blocks, parameters = table, table + segments, table + 2 * segments
    segment = tl.load(tile_segments + tile)
    row = rows + first.to(tl.int32)
    block = row - tl.load(starts + segment) + tl.load(first_blocks + segment)
    parameter = tl.full(rows.shape, tl.load(parameters + segment), tl.int32)
    for other in range(segment + 1, tl.load(tile_segments + tile + 1) + 1):
        start = tl.load(starts + other)
        block = tl.where(row >= start, row - start + tl.load(first_blocks + other), block)
        parameter = tl.where(row >= start, tl.load(parameters + other), parameter)
    return parameter, block.to(tl.uint32) * BLOCK


@triton.jit
def key_of(stream, parameter):
    """`ops.rounding.key`, uint32."""
    x = mix(stream.to(tl.uint32) ^ parameter.to(tl.uint32))
    return x ^ (x >> 15)


@triton.jit
def random_words(key, first, multiplier, odd, BLOCK: tl.constexpr):
    """`ops.rounding.random_words`, uint32: the upper bits of each are drawn.

    key, first: of rows, uint32; the element with which a row begins.
    """
    element = first[:, None] + tl.arange(0, BLOCK)[None, :].to(tl.uint32)
    x = element * SPREAD + key[:, None]
    x = (x ^ (x >> 16)) * FIRST_MULTIPLIER
    return (x ^ (x >> 15) | odd.to(tl.uint32)) * multiplier.to(tl.uint32)


@triton.jit
def with_noise(bits, random, FORMAT: tl.constexpr):
    """The bits of positive values, int32, plus noise below the code bits, which a shift then cuts off.

    random: uint32, of which as many of the upper bits are used as the format drops.
    """
    if not is_scaled(FORMAT):
        bits = tl.minimum(bits, 0x7FC00000)  # a larger NaN would carry into the sign
    return bits + (random >> (32 - dropped_bits(FORMAT))).to(tl.int32)


@triton.jit
def round_up_from_zero(values, random, floor, FORMAT: tl.constexpr):
    """`ops.rounding.round_up_from_zero`.

    floor: at least 1 << 23 as int32 if the result must not be zero, else 0.
    """
    DROPPED: tl.constexpr = dropped_bits(FORMAT)
    noisy = with_noise(values.to(tl.int32, bitcast=True), random, FORMAT)
    return tl.maximum(noisy, tl.minimum(floor, 1 << DROPPED)) >> DROPPED


@triton.jit
def round_either_way(values, random, FORMAT: tl.constexpr):
    """`ops.rounding.round_either_way` into a format of 16 bits."""
    DROPPED: tl.constexpr = dropped_bits(FORMAT)
    bits = values.to(tl.int32, bitcast=True)
    return (with_noise(bits & 0x7FFFFFFF, random, FORMAT) >> DROPPED) | ((bits >> 16) & 0x8000)


@triton.jit
def round_to_whole(fixed, random):
    """Values times 2^FEWER_BITS to whole numbers, int32, up with the probability of the remainder."""
    return (fixed.to(tl.int32) + ((random + APART) >> (32 - FEWER_BITS)).to(tl.int32)) >> FEWER_BITS


@triton.jit
def as_half(code, FORMAT: tl.constexpr):
    """A code of 16 bits, int32, as the format's type."""
    if FORMAT == "fp16":
        return code.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return code.to(tl.int16).to(tl.bfloat16, bitcast=True)
