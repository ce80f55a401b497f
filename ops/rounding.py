"""Stochastic rounding from a counter-based generator.

Nearest rounding stands still where a value moves by less than half a code a step, as a second
moment does at (1 - beta2) = .001 to .05; rounding up with the probability of the remainder
follows it in the mean. The bits come from a hash of (seed, step, parameter, element), never from
a generator with a state: they are the same in every kernel, at every world size, after a resume.

One hash gives 32 bits an element and step; exp_avg_sq takes the low 16, the master weight the
high 16, so the two draw independently. Sixteen bits leave a bias of at most 2^-16 of a code.
The mixer is a 32-bit integer hash of two multiplications (constants of Wellons' hash-prospector,
bias 0.107), applied twice around the two words of the key.
"""

import torch
from torch import Tensor

from ds_fp8.ops.formats import Format

MASK = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
KEY_START = (0x243F6A88, 0x85A308D3)  # the first words of pi
RANDOM_BITS = 16  # bits a rounding consumes
CODE_DTYPE = {1: torch.uint8, 2: torch.int16}  # integers as wide as a code


def _mix_word(x: int) -> int:
    """The mixer on one unsigned 32-bit word; `_mix` is the same on a tensor."""
    x ^= x >> 16
    x = x * MULTIPLIERS[0] & MASK
    x ^= x >> 15
    x = x * MULTIPLIERS[1] & MASK
    return x ^ x >> 15


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32, whose own shift is arithmetic."""
    return (x >> bits) & (MASK >> bits)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 16)) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 15)) * _signed(MULTIPLIERS[1])
    return x ^ _shift_right(x, 15)


def key(seed: int, step: int, parameter: int) -> tuple[int, int]:
    """Two 32-bit words for one parameter at one step; seed is taken modulo 2^64."""
    words = (seed & MASK, seed >> 32 & MASK, step & MASK, parameter & MASK)
    low, high = KEY_START
    for word in words:
        low, high = _mix_word(low ^ word), _mix_word(high ^ word)
    return low, high


def random_bits(words: tuple[int, int], first: int, count: int, device: torch.device) -> Tensor:
    """32 random bits for the elements first .. first + count - 1 of a parameter, [count] int32.

    The element index counts modulo 2^32.
    """
    index = torch.arange(first, first + count, dtype=torch.int64, device=device).to(torch.int32)
    return _mix(_mix(index ^ _signed(words[0])) ^ _signed(words[1]))


def round_up_from_zero(values: Tensor, bits: Tensor, fmt: Format) -> Tensor:
    """Codes of non-negative values, rounded stochastically, non-zero values never to zero.

    values: float32, at most fmt.max; bits: int32 of the same shape whose low 16 bits are random;
    returns fmt.dtype. A value between two codes goes to the upper one with the probability of its
    distance from the lower. Works on the integers: a code of a positive value is its exponent and
    mantissa side by side, so a carry out of the mantissa lands where it should, and below the
    smallest normal value only the number of dropped bits grows.
    """
    raw = values.view(torch.int32)
    field = raw >> 23
    significand = (raw & 0x7FFFFF) | (field > 0).to(torch.int32) << 23
    field = field.clamp(min=1)
    lowest = 127 + fmt.min_exponent  # FP32 exponent field of the smallest normal value
    # With 24 bits dropped every significand lands on code 0 or 1, as with more.
    dropped = (23 - fmt.mantissa_bits + (lowest - field).clamp(min=0)).clamp(max=24)
    random = bits & 0xFFFF
    noise = torch.where(
        dropped > RANDOM_BITS,
        random << (dropped - RANDOM_BITS).clamp(min=0),
        random >> (RANDOM_BITS - dropped).clamp(min=0),
    )
    codes = ((significand + noise) >> dropped) + ((field - lowest).clamp(min=0) << fmt.mantissa_bits)
    top = (1 << fmt.exponent_bits + fmt.mantissa_bits) - 1  # a NaN must not carry into the sign
    codes = torch.where(values == 0, 0, codes.clamp(1, top))
    return codes.to(CODE_DTYPE[fmt.itemsize]).view(fmt.dtype)
