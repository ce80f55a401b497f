"""Moments as they are stored: exp_avg (m) over the root of exp_avg_sq (v), and that root.

Adam divides one by the other, so an error of the quotient is one of the step.

exp_avg in INT8     is m / sqrt(v), whole numbers times a block's scale. Cauchy-Schwarz bounds the quotient
                    (`ops.adam.next_clamp`) and gradients of every size give quotients of about one, so that
                    all of a byte's codes are used where a float spends half of them on its range. When it is
                    read, sqrt(v) as stored is multiplied with it: what rounding has changed in sqrt(v) is
                    then changed in m, too, and cancels in the next quotient.
exp_avg otherwise   is m itself, rounded to nearest.
exp_avg_sq          below FP32 is sqrt(v), rounded stochastically, never from non-zero to zero.

An example: m = -0.3 and v = 0.25 make -0.6, and beside a largest quotient of 1.1, whose scale is 2^-6, a code
of -38.4: of ten draws six round it to -38 and four to -39.
"""

import math

import torch
from torch import Tensor

from ds_fp8.ops.blocks import NOT_FINITE, Blocks, decode, encode, fit, power_of_two, scale_exponents
from ds_fp8.ops.formats import FP32
from ds_fp8.ops.rounding import FEWER_BITS, HALF, HALF_OF_FEWER, round_up_from_zero

LOG_UNIT = 24
UNIT = 2.0**LOG_UNIT  # factor of the gradient, m and sqrt(v) inside the sweep
LEAST_BETA2 = 2.0**-80  # beside quotients: with a root that is gone m would be, too
NEXT_TO_ZERO = 2.0**-110  # added to the root of an FP32 number it changes nothing, unless that is 0


def square_root(v: Tensor) -> Tensor:
    """FP32 square roots, correctly rounded: torch's own on a CPU may be off by one in the last place.

    A float64 root has more than twice the digits, so rounding it again changes nothing.
    """
    return v.to(torch.float64).sqrt().to(torch.float32)


def quotient(m: Tensor, root: Tensor) -> Tensor:
    """m over the root of v, of the same unit; 0 if both are 0."""
    return m / (root + NEXT_TO_ZERO)


def encode_quotient(values: Tensor, out: Blocks, bits: Tensor | None = None) -> None:
    """Round quotients, [rows, block size] float32, to whole numbers times a scale.

    bits: 16 random bits per element, int32, for stochastic rounding; None rounds to nearest, and before to 12
    bits, so that the quotient of what was decoded is the code again.
    """
    assert out.scales is not None
    if bits is None:
        values = torch.where(values.isfinite(), _of_twelve_bits(values), values)
    e = scale_exponents(values, out.format)
    out.scales.copy_(e)
    factor = (power_of_two(torch.where(e < NOT_FINITE, 254 - e, 0)) * 2.0**FEWER_BITS).clamp(max=2.0**127)
    fixed = (values * factor[:, None]).to(torch.int32)
    out.codes.copy_((fixed + (HALF_OF_FEWER if bits is None else bits)) >> FEWER_BITS)


def _of_twelve_bits(values: Tensor) -> Tensor:
    dropped = FP32.mantissa_bits - 11
    return (values.view(torch.int32) + (1 << dropped - 1) >> dropped << dropped).view(torch.float32)


def decode_second_moment(blocks: Blocks, factor: float = 1.0) -> Tensor:
    """v of a chunk times UNIT^2 and a factor, [rows, block size] float32.

    A stored root is multiplied with the root of the factor, then squared: so nothing leaves FP32's range.
    """
    if blocks.format is FP32:
        return decode(blocks, UNIT**2 * factor)
    return decode(blocks, UNIT * math.sqrt(factor)).square()


def encode_second_moment(v: Tensor, root: Tensor, out: Blocks, bits: Tensor | None = None) -> None:
    """Store v in FP32, or sqrt(v), non-zero values never as zero.

    bits: 24 random bits per element, int32, for stochastic rounding; None rounds to nearest.
    """
    if out.format is FP32:
        encode(v, out)
        return
    if bits is None:
        bits = torch.full_like(root, HALF, dtype=torch.int32)
    out.codes.copy_(round_up_from_zero(fit(root, out), bits, out.format))
