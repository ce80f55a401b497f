"""Sums of squares that do not depend on the order of additions: rows exactly, their sum in fixed point.

    row        the squares of its codes in float64, each rounded to a multiple of 2^-43 times the power of
               four just below the largest: few enough bits that float64 adds 256 of them without rounding.
               Squares of E4M3 codes are multiples of 2^-18 below 2^17.7 and lose nothing: their sum is exact.
    scale      a power of two, which is exact too; another scale (`ops.fp8_sum`) rounds once per row.
    all rows   the row's bits as digits to base 2^24, each added up as an integer over rows, programs, threads
               and ranks; integers have no order. 2^39 rows fit.

Only `sum_of_digits` rounds, by the same additions everywhere, so norm and clip factor are the same bits on
every backend and at every world size. Float64 sums in the order in which rows happen to lie agree to 1e-16
only, and about one step in 10^8 would round to another FP32 norm.

Given up: digits below 2^-312 of a row. The square of the smallest FP32 number is 2^-298.
"""

import torch
from torch import Tensor

from ds_fp8.ops.blocks import chunks

DIGIT_BITS = 24
DIGITS = 27
LOWEST = -13 * DIGIT_BITS  # exponent of the first digit; the last ends at 2^336, far above every row's sum
MASK = (1 << DIGIT_BITS) - 1
HIDDEN = 1 << 52  # the bit of a float64's significand that is not stored
POSITION = 1023 + 52 + LOWEST  # exponent field of a float64 whose last place is the lowest digit's first bit
SMALLEST = 1023 - 149  # exponent field, as a float64, of the smallest FP32 number


def sums_of_squares(rows: Tensor) -> Tensor:
    """The sum of each row's squares, [rows, at most 256] float32 -> [rows] float64.

    NaN if a value is not finite. Adding a number of which the grid is the last place rounds to it.
    """
    largest = rows.abs().amax(dim=1)
    exponent = (largest.to(torch.float64).view(torch.int64) >> 52).clamp(min=SMALLEST) - 1023
    grid = (2 * exponent + 9 + 1023 << 52 | 1 << 51).view(torch.float64)[:, None]  # 1.5 times a power
    squares = (rows.to(torch.float64).square() + grid) - grid
    return torch.where(largest.isfinite(), squares.sum(dim=1), torch.nan)


def digits_of(values: Tensor) -> Tensor:
    """The sum of float64 values, not negative and finite, [values] -> [DIGITS] int64."""
    digits = torch.zeros(DIGITS, dtype=torch.int64, device=values.device)
    for part in chunks(len(values), 1):
        bits = values[part].view(torch.int64)
        position = (bits >> 52) - POSITION
        significand = torch.where(bits > 0, bits & (HIDDEN - 1) | HIDDEN, 0)
        significand = significand >> (-position).clamp(0, 63)
        first, shift = position.clamp(min=0) // DIGIT_BITS, position.clamp(min=0) % DIGIT_BITS
        low, high = (significand & MASK) << shift, significand >> DIGIT_BITS << shift
        pieces = (
            low & MASK,
            (low >> DIGIT_BITS) + (high & MASK),
            high >> DIGIT_BITS & MASK,
            high >> 2 * DIGIT_BITS,
        )
        for place, piece in enumerate(pieces):
            digits.index_add_(0, first + place, piece)
    return digits


def sum_of_digits(digits: Tensor) -> Tensor:
    """The number that the digits are, 0-d float64, rounded: halves are added, in one order everywhere."""
    exponents = torch.arange(DIGITS, device=digits.device) * DIGIT_BITS + LOWEST
    values = digits.to(torch.float64) * (exponents + 1023 << 52).view(torch.float64)
    values = torch.nn.functional.pad(values, (0, 32 - DIGITS))
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]
