"""Square root and quotient on a GPU: correctly rounded, without the slow paths of `sqrt.rn` and `div.rn`."""

import triton
import triton.language as tl

from ds_fp8.ops import moments
from ds_fp8.ops.triton import launching

NEXT_TO_ZERO = tl.constexpr(moments.NEXT_TO_ZERO)
INTERPRETED = tl.constexpr(launching.INTERPRETED)


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
