"""Masters on a GPU: the device functions of `ops.masters`, bit for bit."""

import triton
import triton.language as tl

from ds_fp8.ops.formats import BY_NAME
from ds_fp8.ops.triton.rounding import as_half, dropped_bits, exponent_shift, round_either_way
from ds_fp8.ops.triton.tiles import (
    decode,
    inverse_scale,
    is_scaled,
    load_codes,
    load_scales,
    power_of_two,
    scale_exponent,
    store_blocks,
    times,
    two_to_the,
)


@triton.constexpr_function
def is_split(name):
    return BY_NAME[name].split


@triton.jit
def load_masters(
    codes,
    scales,
    weights,
    rows,
    offset,
    inside,
    factor,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A tile of masters times a factor, float32."""
    if is_split(FORMAT):
        low = tl.load(codes + offset, mask=inside[:, None], other=0)
        if FORMAT == "split8":
            low = low.to(tl.int8, bitcast=True)
        high = tl.load(weights + offset, mask=inside[:, None], other=0.0).to(tl.int16, bitcast=True)
        bits = high.to(tl.int32) << 16
        low = low.to(tl.int32) << dropped_bits(FORMAT)
        bits += tl.where(bits << 1 == 0, tl.maximum(low, 0), low)  # a weight of zero has nothing to borrow
        return bits.to(tl.float32, bitcast=True) * factor
    else:
        p = load_codes(codes, offset, inside, FORMAT, HARDWARE)
        return p * (load_scales(scales, rows, inside, FORMAT) * factor)[:, None]


@triton.jit
def store_masters(
    p,
    magnitudes,
    random,
    codes,
    scales,
    weights,
    rows,
    offset,
    inside,
    FORMAT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Round a tile into masters, and the weights from what is stored.

    magnitudes: the largest of a row decides its scale. random: 24 random bits per element, the upper ones of
    a uint32, used if STOCHASTIC.
    """
    if is_split(FORMAT):
        store_split(
            p,
            random,
            codes=codes,
            weights=weights,
            offset=offset,
            inside=inside,
            FORMAT=FORMAT,
            STOCHASTIC=STOCHASTIC,
        )
    else:
        if STOCHASTIC:
            e = tl.full(rows.shape, 127, tl.int32)
            if is_scaled(FORMAT):
                e = scale_exponent(magnitudes, FORMAT, 0)
                tl.store(scales + rows, e.to(tl.uint8), mask=inside)
                p = p * inverse_scale(e, 0)[:, None] * two_to_the(exponent_shift(FORMAT))
            stored = as_half(round_either_way(p, random, FORMAT), FORMAT)
            tl.store(codes + offset, stored, mask=inside[:, None])
        else:
            stored, e = store_blocks(
                p,
                magnitudes,
                codes=codes,
                scales=scales,
                rows=rows,
                offset=offset,
                inside=inside,
                FORMAT=FORMAT,
                HARDWARE=HARDWARE,
                UNIT=0,
            )
        p = times(decode(stored, FORMAT, HARDWARE), power_of_two(e), FORMAT)
        store_weights(p, e, weights, offset, inside, FORMAT)


@triton.jit
def store_split(p, random, codes, weights, offset, inside, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round a master to the bits that are kept: the upper half is the BF16 weight, the rest is the code."""
    DROPPED: tl.constexpr = dropped_bits(FORMAT)
    bits = tl.where(p != p, 0x7FC00000, p.to(tl.int32, bitcast=True))
    if DROPPED > 0:
        if STOCHASTIC:
            bits += (random >> (32 - DROPPED)).to(tl.int32)
        else:
            bits += 1 << (DROPPED - 1)
        bits &= -(1 << DROPPED)
    w = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(weights + offset, w, mask=inside[:, None])
    tl.store(codes + offset, (bits >> DROPPED).to(codes.dtype.element_ty), mask=inside[:, None])


@triton.jit
def store_weights(p, e, weights, offset, inside, MASTER: tl.constexpr):
    """Round masters as stored to the model's dtype; `ops.masters.write_weights`."""
    if weights.dtype.element_ty == tl.bfloat16:
        bits = p.to(tl.int32, bitcast=True)
        # The largest NaN, the one that arithmetic makes on a GPU, would carry into the sign.
        if is_scaled(MASTER):
            bits = (bits + tl.where(e == 255, 0, 0x8000)[:, None]) >> 16
        else:
            bits = (tl.minimum(bits, 0x7FFF7FFF) + 0x8000) >> 16
        w = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        w = p.to(weights.dtype.element_ty)
    tl.store(weights + offset, w, mask=inside[:, None])
