"""Second moments on a GPU: read from codes of v or of its root, stored with stochastic rounding.

The counts of both moments are here too: `ops.health.StateCounts`, three per program.
"""

import triton
import triton.language as tl

from ds_fp8.ops import moments
from ds_fp8.ops.triton.rounding import (
    as_half,
    dropped_bits,
    exponent_shift,
    round_up_from_zero,
    with_noise,
)
from ds_fp8.ops.triton.tiles import decode, inverse_scale, is_scaled, scale_exponent, two_to_the

UNIT = tl.constexpr(moments.LOG_UNIT)


@triton.jit
def second_moment(v, scale, factor, root_factor, V: tl.constexpr, SWEEP: tl.constexpr):
    """v times a factor, from unscaled codes of v or of its root; root_factor: the factor's square root."""
    if V == "fp32":
        return v * factor
    elif SWEEP != "blocks":
        return v * (scale * factor)[:, None]
    else:
        root = v * (scale * root_factor)[:, None]
        return root * root


@triton.jit
def store_second_moment(root, random, codes, scales, rows, offset, inside, FORMAT: tl.constexpr):
    """Store sqrt(v), given times 2^UNIT, rounded stochastically, non-zero values never to zero.

    Returns the root on the scale of the codes, brought onto FP32's exponents.
    """
    floor = root.to(tl.int32, bitcast=True)
    if is_scaled(FORMAT):
        e = scale_exponent(floor, FORMAT, UNIT)
        tl.store(scales + rows, e.to(tl.uint8), mask=inside)
        root = root * inverse_scale(e, UNIT)[:, None] * two_to_the(exponent_shift(FORMAT))
    else:
        root = root * two_to_the(-UNIT)
    code = round_up_from_zero(root, random, floor, FORMAT)
    if codes.dtype.element_ty.is_floating():
        code = as_half(code, FORMAT)
    tl.store(codes + offset, code.to(codes.dtype.element_ty), mask=inside[:, None])
    return root


@triton.jit
def count_state(place, clamped, m, stored_m, M: tl.constexpr, HARDWARE: tl.constexpr):
    """Store `StateCounts.clamped` and `.underflows` of a tile, at the program's place."""
    underflows = (m != 0.0) & (decode(stored_m, M, HARDWARE) == 0.0)
    tl.store(place, tl.sum(clamped.to(tl.float64)))
    tl.store(place + 1, tl.sum(underflows.to(tl.float64)))


@triton.jit
def count_rescued(place, root, on_codes, random, FORMAT: tl.constexpr):
    """Store `StateCounts.zeros`: non-zero roots that stochastic rounding alone would have taken to zero.

    on_codes: what `store_second_moment` returned; random: the bits that it was given.
    """
    noisy = with_noise(on_codes.to(tl.int32, bitcast=True), random, FORMAT)
    rescued = (root != 0.0) & ((noisy >> dropped_bits(FORMAT)) == 0)
    tl.store(place + 2, tl.sum(rescued.to(tl.float64)))


@triton.jit
def count_zeros(place, v, stored):
    """Store `StateCounts.zeros` if v itself is stored: non-zero values whose code, unscaled, is zero."""
    tl.store(place + 2, tl.sum(((v != 0.0) & (stored == 0.0)).to(tl.float64)))
