"""Number formats as values: every limit is derived from the bits.

E4M3 and E5M2 are the OCP 8-bit formats (OCP MX v1.0 section 5.3.1): E4M3 gives up only its
last code to NaN and so reaches 448, E5M2 keeps the IEEE infinities and stops at 57344.
A format with fewer exponent bits than FP32 cannot hold every FP32 value, so a block of it
carries a scale (`ops.blocks`); FP32 and BF16 carry none.

Three kinds of format are ours. UE4M4 has no sign and no code for inf or NaN: a byte for the root of a
second moment, with a mantissa bit more than E4M3. INT8, whole numbers from -127 to 127, holds exp_avg over
the root of exp_avg_sq (`ops.moments`). Of a master in SPLIT16 or SPLIT8 the BF16 weight is the
upper half; its code is what lies below, all 16 bits (the master is FP32) or the upper 8.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    `reserved` says what infinities and NaN take from the top of the range: the whole last
    exponent ("exponent", IEEE 754), the last code only ("code", OCP E4M3), or "nothing".
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    reserved: Literal["exponent", "code", "nothing"]
    dtype: torch.dtype  # of a code; an integer type if torch does not know the format
    signed: bool = True
    integer: bool = False  # the code is the value: one exponent bit, whose two binades have one step
    split: bool = False  # the code is what lies below the bits of the BF16 weight (`ops.masters`)

    @property
    def bias(self) -> int:
        return 1 - self.mantissa_bits if self.integer else int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value."""
        top = int(2**self.exponent_bits) - 1 - self.bias
        return top - 1 if self.reserved == "exponent" else top

    @property
    def max_significand(self) -> float:
        """Significand, in [1, 2), of the largest finite value."""
        lost_codes = 2 if self.reserved == "code" else 1  # the next significand, 2, is one already
        return 2 - lost_codes * 2.0**-self.mantissa_bits

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.max_significand * 2.0**self.max_exponent

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def smallest(self) -> float:
        """Smallest positive value, a subnormal."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def dropped_bits(self) -> int:
        """Bits of FP32's mantissa that the format does not keep."""
        return FP32.mantissa_bits - self.mantissa_bits

    @property
    def itemsize(self) -> int:
        """Bytes per code."""
        return self.dtype.itemsize

    @property
    def scaled(self) -> bool:
        """Whether a block of this format carries an E8M0 scale."""
        return self.exponent_bits < FP32.exponent_bits


FP32 = Format("fp32", 8, 23, "exponent", torch.float32)
BF16 = Format("bf16", 8, 7, "exponent", torch.bfloat16)
FP16 = Format("fp16", 5, 10, "exponent", torch.float16)
E4M3 = Format("e4m3", 4, 3, "code", torch.float8_e4m3fn)
E5M2 = Format("e5m2", 5, 2, "exponent", torch.float8_e5m2)
UE4M4 = Format("ue4m4", 4, 4, "nothing", torch.uint8, signed=False)
INT8 = Format("int8", 1, 6, "nothing", torch.int8, integer=True)
SPLIT16 = Format("split16", 8, 23, "exponent", torch.int16, split=True)
SPLIT8 = Format("split8", 8, 15, "exponent", torch.int8, split=True)

BY_NAME = {fmt.name: fmt for fmt in (FP32, BF16, FP16, E4M3, E5M2, UE4M4, SPLIT16, SPLIT8, INT8)}
