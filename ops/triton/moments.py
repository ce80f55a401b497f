"""Moments on a GPU: the device functions of `ops.moments`, bit for bit.

Square root and quotient are correctly rounded, without the slow paths of `sqrt.rn` and `div.rn`. The counts
of both moments are here too: `ops.health.StateCounts`, three per program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops import moments
from ds_fp8.ops.triton import launching
from ds_fp8.ops.triton.rounding import (
    FEWER_BITS,
    as_half,
    dropped_bits,
    exponent_shift,
    round_to_whole,
    round_up_from_zero,
    with_noise,
)
from ds_fp8.ops.triton.tiles import (
    decode,
    inverse_scale,
    is_scaled,
    magnitude,
    scale_exponent,
    store_blocks,
    two_to_the,
)

UNIT = tl.constexpr(moments.LOG_UNIT)
NEXT_TO_ZERO = tl.constexpr(moments.NEXT_TO_ZERO)
INTERPRETED = tl.constexpr(launching.INTERPRETED)

# Of the sweep with quotients on Hopper, if masters are rounded to nearest, and stochastically. With the
# assembler's 94 fewer warps run at a time.
QUOTIENT_REGISTERS = 72, 80


def most_registers(exp_avg: str, stochastic: bool, hopper: bool) -> int | None:
    """Return how many registers a thread may have; None if the assembler decides.

    exp_avg: a format. stochastic: how masters are rounded. hopper: whether the device is one.
    """
    return QUOTIENT_REGISTERS[stochastic] if exp_avg == "int8" and hopper else None


def on_hopper(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) == (9, 0)


@triton.jit
def minimum(a, b):
    """The smaller of a and b; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def square_root(v):
    """The root of v, correctly rounded for 0 and from 2^-102 on; v is finite."""
    root, _ = root_and_inverse(v)
    return root


@triton.jit
def root_and_inverse(v):
    """`square_root`, and 1 over it to about 22 bits, for `quotient` alone.

    As `sqrt.rn` does for normal numbers, without its branch for the others: approximate, then correct by the
    exact remainder.
    """
    if INTERPRETED:
        root = tl.sqrt_rn(v)
        return root, root
    y = tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [tl.maximum(v, 1.1754943508222875e-38)], tl.float32, True, 1
    )
    s = v * y
    return tl.fma(tl.fma(s * -1.0, s, v), y * 0.5, s), y


@triton.jit
def quotient(m, root, inverse):
    """`ops.moments.quotient`, from what `root_and_inverse` gave.

    One in about a million is off by one in the last place, of which a code keeps 7 bits: an instruction more
    would change none.
    """
    if INTERPRETED:
        return tl.div_rn(m, root + NEXT_TO_ZERO)
    q = m * inverse
    return tl.fma(tl.fma(root * -1.0, q, m), inverse, q)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded if |a| is 0 or from 2^-102 on and b positive and normal."""
    if INTERPRETED:
        return tl.div_rn(a, b)
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], tl.float32, True, 1)
    y = tl.fma(tl.fma(b * -1.0, y, 1.0), y, y)
    q = a * y
    return tl.fma(tl.fma(b * -1.0, q, a), y, q)


@triton.jit
def second_moment(v, scale, factor, root_factor, M: tl.constexpr, V: tl.constexpr, SWEEP: tl.constexpr):
    """v times a factor, from unscaled codes of v or of its root; root_factor: the factor's square root.

    Also the root of that, if m is over it.
    """
    if V == "fp32":
        v = v * factor
        return v, square_root(v) if M == "int8" else v
    elif SWEEP != "blocks":
        return v * (scale * factor)[:, None], v
    else:
        root = v * (scale * root_factor)[:, None]
        return root * root, root


@triton.jit
def first_moment(m, scale, factor, quotient_factor, root, M: tl.constexpr):
    """m times a factor, from unscaled codes of m or of m over the root of v."""
    if M == "int8":
        return m * (scale * quotient_factor)[:, None] * root
    return m * (scale * factor)[:, None]


@triton.jit
def clamp_first_moment(m, most, CLAMPED: tl.constexpr):
    """m, of magnitude `most` at most if CLAMPED, and its magnitudes."""
    if CLAMPED:
        bounded = minimum(tl.abs(m), most).to(tl.int32, bitcast=True)
        sign = m.to(tl.int32, bitcast=True) & -0x80000000
        return (bounded | sign).to(tl.float32, bitcast=True), bounded
    else:
        return m, magnitude(m)


@triton.jit
def store_first_moment(
    m,
    magnitudes,
    random,
    clamped,
    place,
    codes,
    scales,
    rows,
    offset,
    inside,
    COUNT: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Store m, given times 2^UNIT, to nearest, or what is given as m over the root of v, stochastically.

    magnitudes: the largest of a row decides m's scale. clamped, place: to be counted, and where.
    """
    if FORMAT == "int8":
        stored = store_quotients(
            m, random, codes=codes, scales=scales, rows=rows, offset=offset, inside=inside
        )
    else:
        stored, _ = store_blocks(
            m,
            magnitudes,
            codes=codes,
            scales=scales,
            rows=rows,
            offset=offset,
            inside=inside,
            FORMAT=FORMAT,
            HARDWARE=HARDWARE,
            UNIT=UNIT,
        )
    if COUNT:
        count_state(place, clamped, m, stored, FORMAT, HARDWARE)


@triton.jit
def store_quotients(values, random, codes, scales, rows, offset, inside):
    """`ops.moments.encode_quotient`; returns the codes."""
    e = scale_exponent(magnitude(values), "int8", 0)
    tl.store(scales + rows, e.to(tl.uint8), mask=inside)
    factor = tl.minimum(inverse_scale(e, 0) * two_to_the(FEWER_BITS), 1.7014118346046923e38)  # 2^127
    stored = round_to_whole(values * factor[:, None], random).to(tl.uint8)
    tl.store(codes + offset, stored, mask=inside[:, None])
    return stored


@triton.jit
def store_second_moment(
    v,
    magnitudes,
    random,
    root,
    place,
    codes,
    scales,
    rows,
    offset,
    inside,
    COUNT: tl.constexpr,
    FORMAT: tl.constexpr,
    SWEEP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Store v, given times 4^UNIT, to nearest, or its root.

    magnitudes: the largest of a row decides v's scale. place: of the counts.
    """
    if FORMAT == "fp32" or SWEEP == "write":
        stored, _ = store_blocks(
            v,
            magnitudes,
            codes=codes,
            scales=scales,
            rows=rows,
            offset=offset,
            inside=inside,
            FORMAT=FORMAT,
            HARDWARE=HARDWARE,
            UNIT=2 * UNIT,
        )
        if COUNT and SWEEP == "write":
            count_zeros(place, v, decode(stored, FORMAT, HARDWARE))
    else:
        on_codes = store_roots(
            root,
            random,
            codes=codes,
            scales=scales,
            rows=rows,
            offset=offset,
            inside=inside,
            FORMAT=FORMAT,
        )
        if COUNT:
            count_rescued(place, root, on_codes, random, FORMAT)


@triton.jit
def store_roots(root, random, codes, scales, rows, offset, inside, FORMAT: tl.constexpr):
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

    on_codes: what `store_roots` returned; random: the bits that it was given.
    """
    noisy = with_noise(on_codes.to(tl.int32, bitcast=True), random, FORMAT)
    rescued = (root != 0.0) & ((noisy >> dropped_bits(FORMAT)) == 0)
    tl.store(place + 2, tl.sum(rescued.to(tl.float64)))


@triton.jit
def count_zeros(place, v, stored):
    """Store `StateCounts.zeros` if v itself is stored: non-zero values whose code, unscaled, is zero."""
    tl.store(place + 2, tl.sum(((v != 0.0) & (stored == 0.0)).to(tl.float64)))
