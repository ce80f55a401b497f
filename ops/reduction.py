"""The sum of the ranks' gradients and the figures a step needs of it.

Each rank rounds its own gradient once; the owner decodes and adds in FP32, in rank order, so that
the result does not depend on who arrives first. An FP8 sum inside the collective would round
again at every hop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, chunks, decode, encode


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, fresh: bool) -> None:
    """Add the ranks' pieces, in the order given, and add their sum to the shard.

    pieces: one a rank, each of the shard's length and block size; fresh: the shard's old content
    is not read. The sum is FP32 and is rounded once, into the shard's format.
    """
    for part in chunks(len(shard), shard.block_size):
        total = decode(pieces[0][part])
        for piece in pieces[1:]:
            total = total + decode(piece[part])
        encode(total if fresh else decode(shard[part]) + total, shard[part])


def sum_of_squares(shard: Blocks) -> Tensor:
    """[2] float64: sum of squares of the shard as stored, and its count of non-finite blocks.

    Squares are added in FP32 within a block, halving it until one value is left, and in float64
    between blocks.
    """
    result = torch.zeros(2, dtype=torch.float64, device=shard.codes.device)
    for part in chunks(len(shard), shard.block_size):
        squares = decode(shard[part]).square()
        while squares.shape[1] > 1:
            half = squares.shape[1] // 2
            squares = squares[:, :half] + squares[:, half:]
        result[0] += squares.sum(dtype=torch.float64)
        result[1] += (~squares.isfinite()).sum()
    return result


def first_non_finite_block(shard: Blocks) -> int | None:
    """Index of the first block that holds a value that is not finite."""
    for part in chunks(len(shard), shard.block_size):
        bad = ~decode(shard[part]).isfinite().all(dim=1)
        if bad.any():
            return int(part.start + bad.to(torch.uint8).argmax())
    return None
