"""Stochastic rounding from a counter-based generator.

Nearest rounding stands still where a value moves by less than half a code per step, as a second
moment does at (1 - beta2) = .001 to .05; rounding up with the probability of the remainder
follows the value in the mean. The bits come from a hash of (seed, step, parameter, element), never from
a generator with a state: they are the same in every kernel, at every world size, after a resume.

**Spread draws.** Drawn anew at every step, an element's roundings up come in clusters and gaps, whose error
a moment keeps for as long as it remembers. If its draws are instead a start of its own plus an odd number of
its own times the step's lowest 8 bits in reverse order, over 256, modulo 1 (van der Corput's sequence,
scrambled), each is as uniform over the elements, but 2^k steps from a multiple of 2^k on fill the interval
evenly, and roundings make up for each other: the error of the moments is a fifth to a third less. Starts and
odd numbers are drawn anew every 256 steps. That the latter differ keeps gradients with a rhythm from meeting
the same draws in every element: with the golden ratio for all, where they came every third step, means of v
were 13 % off.

A draw has more bits than any format drops, so that the mean is the value: with 16 of them E4M3 drifts by
a tenth of a code where a step moves a value by 1e-4 of the way. Each state of an element draws from its
own stream. The mixer is a 32-bit integer hash of two multiplications (constants of Wellons'
hash-prospector, bias 0.107).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_fp8.ops.formats import FP32, Format

MASK = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
SPREAD = 0x9E3779B9  # 2^32 over the golden ratio
START = 0x243F6A88  # the first word of pi
RANDOM_BITS = 24  # of a draw; E5M2 drops 21
HALF = 1 << RANDOM_BITS - 1  # in place of a draw: rounds up from the middle on
FEWER_BITS = 16  # of a draw for exp_avg in INT8
HALF_OF_FEWER = 1 << FEWER_BITS - 1
MASTER, EXP_AVG, EXP_AVG_SQ = 0, 1, 2  # states; exp_avg has exp_avg_sq's stream
APART = 0x361962EB  # (1 - 1 / sqrt(3)) / 2 of 2^32: from exp_avg_sq's draw to exp_avg's; `fewer_bits`
STEP_BITS = 8
PERIOD = 1 << STEP_BITS  # steps with one start, where draws are spread
QUIET_NAN = 0x7FC00000
CODE_DTYPE = {1: torch.uint8, 2: torch.int16}  # integers as wide as a code


def mix(x: int) -> int:
    """The mixer on one unsigned 32-bit word."""
    x = (x ^ x >> 16) * MULTIPLIERS[0] & MASK
    x = (x ^ x >> 15) * MULTIPLIERS[1] & MASK
    return x ^ x >> 15


def stream(seed: int, step: int, state: int, spread: bool = False) -> int:
    """The 32-bit word of one state's random bits at one step; seed is taken modulo 2^64.

    spread: of the step's period, in which only `multiplier` changes.
    """
    word = START
    for part in (seed & MASK, seed >> 32 & MASK, (step // PERIOD if spread else step) & MASK, state):
        word = mix(word ^ part)
    return word


def multiplier(step: int) -> int:
    """The mixer's second one at a step, where draws are spread: their words are odd numbers times it."""
    reverse = int(f"{step % PERIOD:0{STEP_BITS}b}"[::-1], 2)
    return MULTIPLIERS[1] + (reverse << 32 - STEP_BITS) & MASK


@dataclass(frozen=True)
class Rounding:
    """A run's random bits, and whether masters too are rounded stochastically."""

    seed: int
    stochastic: bool = False
    spread: bool = False  # an element's draws spread over the interval from step to step (`ops.rounding`)

    @property
    def draws(self) -> str:
        """As `fp8.optimizer.draws` names them."""
        return "spread" if self.spread else "independent"

    def stream(self, step: int, state: int) -> int:
        """The word of a state's random bits at a step."""
        return stream(self.seed, step, state, self.spread)

    def multiplier(self, step: int) -> int:
        """The mixer's last multiplier at a step."""
        return multiplier(step) if self.spread else MULTIPLIERS[1]


def key(stream: int, parameter: int) -> int:
    """The 32-bit word of one parameter in a stream."""
    return mix(stream ^ parameter & MASK)


def signed(word: int) -> int:
    """An unsigned 32-bit word as int32 holds it."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32, whose own shift is arithmetic."""
    return (x >> bits) & (MASK >> bits)


def random_bits(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """24 random bits for the elements first .. first + count - 1 of a parameter, [count] int32."""
    return upper_bits(random_words(key, first, count, device))


def upper_bits(words: Tensor) -> Tensor:
    """24 bits of a random word."""
    return _shift_right(words, 32 - RANDOM_BITS)


def fewer_bits(words: Tensor) -> Tensor:
    """16 bits of a random word for a second draw.

    It lies so far from the first that two values, each rounded with one, are rounded up as often apart as
    together, in the mean over their remainders: there the second Bernoulli polynomial is 0.
    """
    return _shift_right(words + signed(APART), 32 - FEWER_BITS)


def random_words(
    key: int, first: int, count: int, device: torch.device, multiplier: int = MULTIPLIERS[1], odd: int = 0
) -> Tensor:
    """A random word for each of the elements first .. first + count - 1 of a parameter, [count] int32.

    The element index counts modulo 2^32. It is spread over the word before it is mixed, or the bits of
    distant elements would be alike. The mixer's last step is left out: the upper bits do not need it.
    multiplier: the mixer's second; odd: 1 makes what it is multiplied with odd.
    """
    index = torch.arange(first, first + count, dtype=torch.int64, device=device).to(torch.int32)
    x = index * signed(SPREAD) + signed(key)
    x = (x ^ _shift_right(x, 16)) * signed(MULTIPLIERS[0])
    return (x ^ _shift_right(x, 15) | odd) * signed(multiplier)


def round_stochastically(magnitudes: Tensor, bits: Tensor, fmt: Format) -> Tensor:
    """Codes, int32, of non-negative values rounded to one of the two next to them.

    magnitudes: float32, at most fmt.max if the format is scaled; bits: int32 of the same shape, 24 random
    bits. A value between two codes goes to the upper one with the probability of its distance from the lower.

    Where the format's exponents are brought onto FP32's own, its codes are the upper bits of the float,
    subnormals included: adding noise below them and cutting rounds.
    """
    dropped = fmt.dropped_bits
    raw = (magnitudes * 2.0 ** (fmt.bias - FP32.bias)).view(torch.int32)
    raw = torch.where(magnitudes.isnan(), QUIET_NAN, raw)  # another could carry into the sign
    return (raw + (bits >> RANDOM_BITS - dropped)) >> dropped


def round_up_from_zero(values: Tensor, bits: Tensor, fmt: Format) -> Tensor:
    """Codes, fmt.dtype, of non-negative values rounded stochastically, non-zero values never to zero."""
    codes = round_stochastically(values, bits, fmt)
    return as_codes(torch.where(values == 0, 0, codes.clamp(min=1)), fmt)


def round_either_way(values: Tensor, bits: Tensor, fmt: Format) -> Tensor:
    """Codes, fmt.dtype, of values of either sign rounded stochastically."""
    sign = torch.where(values.signbit(), 1 << 8 * fmt.itemsize - 1, 0)
    return as_codes(round_stochastically(values.abs(), bits, fmt) | sign, fmt)


def as_codes(integers: Tensor, fmt: Format) -> Tensor:
    return integers.to(CODE_DTYPE[fmt.itemsize]).view(fmt.dtype)
