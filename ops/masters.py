"""Master weights: what is stored of them, and the model weights that are written with them.

weight    the rounded value of its master *as stored*, so that weights are a function of the state. BF16
          weights are rounded by adding half a code to the bits and cutting, ties away from zero.
SPLIT16   only the bits that the cut dropped are stored: with the weight they give the FP32 master. The weight
          is the upper half of the master plus the top bit of the lower, so a decoder adds the lower half to
          the weight as a signed number. Editing a BF16 weight edits its split master.
SPLIT8    the master is rounded to 24 bits first; the top 8 bits of the lower half are stored.
zero      a negative lower half cannot be taken from a weight of zero, of either sign: the borrow would reach
          the sign. No encoder writes that pair, but setting a weight to zero in place makes it, and every
          decoder then takes the lower half as 0.
finite    every other finite weight, and a zero beside a lower half that is not negative, decodes to a finite
          number. A weight of inf may be a finite master, in the last half code below 2^128; NaN stays NaN.
"""

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, chunks, decode, encode, fit, padded
from ds_fp8.ops.rounding import QUIET_NAN, RANDOM_BITS, round_either_way

HALF_CODE = 0x8000  # of BF16, in bits of FP32


def decode_masters(master: Blocks, weights: Tensor, factor: float = 1.0) -> Tensor:
    """Masters of a chunk times a factor, [rows, block size] float32.

    weights: [rows, block size], the model's weights of the same rows; only split masters need them.
    """
    if not master.format.split:
        return decode(master, factor)
    low = master.codes.to(torch.int32) << master.format.dropped_bits
    high = weights.view(torch.int16).to(torch.int32) << 16
    low = torch.where(high << 1 == 0, low.clamp(min=0), low)
    return (high + low).view(torch.float32) * factor


def encode_masters(values: Tensor, master: Blocks, weights: Tensor, bits: Tensor | None = None) -> None:
    """Round float32 rows into the masters, and the weights from what is stored.

    bits: 24 random bits per element, int32, for stochastic rounding; None rounds to nearest.
    """
    if master.format.split:
        _encode_split(values, master, weights, bits)
        return
    if bits is None:
        encode(values, master)
    else:
        master.codes.copy_(round_either_way(fit(values, master), bits, master.format))
    write_weights(decode(master), weights)


def store_masters(values: Tensor, master: Blocks, weights: Tensor) -> None:
    """`encode_masters` of a vector of any length; the last block is filled up with zeros."""
    size = master.block_size
    for part in chunks(len(master), size):
        piece = values[part.start * size : part.stop * size]
        encode_masters(padded(piece, part.stop - part.start, size), master[part], weights[part])


def load_masters(master: Blocks, weights: Tensor, out: Tensor) -> None:
    """`decode_masters` into a float32 vector; values past its end are dropped."""
    size = master.block_size
    for part in chunks(len(master), size):
        piece = out[part.start * size : part.stop * size]
        piece.copy_(decode_masters(master[part], weights[part]).view(-1)[: piece.numel()])


def _encode_split(values: Tensor, master: Blocks, weights: Tensor, bits: Tensor | None) -> None:
    raw = torch.where(values.isnan(), QUIET_NAN, values.view(torch.int32))
    dropped = master.format.dropped_bits
    if dropped:
        raw = raw + (1 << dropped - 1 if bits is None else bits >> RANDOM_BITS - dropped)
    raw = raw >> dropped << dropped
    master.codes.copy_(raw >> dropped)
    write_weights(raw.view(torch.float32), weights)


def write_weights(master: Tensor, weights: Tensor) -> None:
    """Round FP32 masters to the model's dtype; to BF16 with ties away from zero, NaN kept."""
    if weights.dtype is not torch.bfloat16:
        weights.copy_(master)
        return
    rounded = ((master.view(torch.int32) + HALF_CODE) >> 16).to(torch.int16).view(torch.bfloat16)
    weights.copy_(torch.where(master.isnan(), torch.nan, rounded))


def rewrite_weights(master: Blocks, weights: Tensor) -> None:
    """Round stored masters to the model's dtype; of split ones the weights are the upper half already."""
    if master.format.split:
        return
    for part in chunks(len(master), master.block_size):
        write_weights(decode(master[part]), weights[part])


def put(values: Tensor, weights: Tensor) -> None:
    """Copy values, [n] of any float dtype, into weights; FP32 ones are rounded as masters are."""
    if values.dtype is torch.float32:
        write_weights(values.to(weights.device), weights)
    else:
        weights.copy_(values)
