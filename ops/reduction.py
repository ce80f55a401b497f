"""The sum of the ranks' gradients, and what a step needs of it: parts of its norm, which add up over ranks.

Each rank rounds its own gradient once; the owner decodes and adds in FP32, in rank order, so that
the result does not depend on the order of arrival. An FP8 sum inside the collective would round
again at every hop.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, chunks, decode, encode, scale_values
from ds_fp8.ops.exact import DIGITS, digits_of, sum_of_digits, sums_of_squares

NORM_PARTS = DIGITS + 1  # length of the vector that `norm_parts` returns


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, overwrite: bool) -> Tensor:
    """Add the ranks' pieces, in the order given, and add their sum to the shard; return its `norm_parts`.

    pieces: one per rank, each of the shard's length and block size, at equal distances in one buffer.
    overwrite: the shard's old content is not read. The sum is FP32 and is rounded once, into the shard's
    format.
    """
    for part in chunks(len(shard), shard.block_size):
        total = decode(pieces[0][part])
        for piece in pieces[1:]:
            total = total + decode(piece[part])
        encode(total if overwrite else decode(shard[part]) + total, shard[part])
    return norm_parts(shard)


def norm_parts(shard: Blocks) -> Tensor:
    """[NORM_PARTS] int64: the sum of squares of the finite blocks as stored, and the number of other blocks.

    The sum is given by its digits (`ops.exact`): parts of shards and of ranks add up to those of all blocks,
    whichever rank holds a block and whichever backend added it. `norm_square` rounds the sum.
    """
    squares = torch.empty(len(shard), dtype=torch.float64, device=shard.codes.device)
    for part in chunks(len(shard), shard.block_size):
        sums = sums_of_squares(shard.codes[part].to(torch.float32))
        if shard.scales is not None:
            sums *= scale_values(shard.scales[part]).to(torch.float64).square()
        squares[part] = sums
    return norm_parts_of_blocks(squares)


def norm_parts_of_blocks(squares: Tensor) -> Tensor:
    """`norm_parts` from each block's sum of squares, [blocks] float64, not finite if the block is not."""
    finite = squares.isfinite()
    digits = digits_of(torch.where(finite, squares, 0.0))
    return torch.cat([digits, (~finite).sum()[None]])


def norm_square(parts: Tensor) -> Tensor:
    """The sum of squares from `norm_parts`, 0-d float64, the same bits on every device."""
    return sum_of_digits(parts[:DIGITS])


def norm_of(parts: Tensor) -> Tensor:
    """The root of `norm_square`, 0-d float64, correctly rounded.

    torch's own root on a CPU may be off by one in the last place.
    """
    square = norm_square(parts)
    if square.device.type == "cpu":
        (value,) = square[None].tolist()  # not `item`, which on a GPU would wait
        return square.new_tensor(math.sqrt(value))
    return square.sqrt()


def first_non_finite_block(shard: Blocks) -> int | None:
    """Index of the first block that holds a value that is not finite."""
    for part in chunks(len(shard), shard.block_size):
        bad = ~decode(shard[part]).isfinite().all(dim=1)
        if bad.any():
            return int(part.start + bad.to(torch.uint8).argmax())
    return None
