"""The sum of the ranks' gradients and the figures a step needs of it.

Each rank rounds its own gradient once; the owner decodes and adds in FP32, in rank order, so that
the result does not depend on who arrives first. An FP8 sum inside the collective would round
again at every hop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, chunks, decode, encode, scale_values

LANES = 16


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, fresh: bool) -> Tensor:
    """Add the ranks' pieces, in the order given, and add their sum to the shard; returns its figures.

    pieces: one a rank, each of the shard's length and block size, at equal distances in one buffer;
    fresh: the shard's old content is not read. The sum is FP32 and is rounded once, into the shard's
    format. Returns what `figures` does of the shard.
    """
    for part in chunks(len(shard), shard.block_size):
        total = decode(pieces[0][part])
        for piece in pieces[1:]:
            total = total + decode(piece[part])
        encode(total if fresh else decode(shard[part]) + total, shard[part])
    return figures(shard)


def figures(shard: Blocks) -> Tensor:
    """[2] float64: sum of squares of the finite blocks as stored, and the count of the others.

    Squares are added in FP32 within a block, without its scale, and in float64 between blocks. Within a
    block there are LANES sums of every LANES-th square, then sums of halves of halves: the order of the C++
    kernels. A GPU adds in an order of its own, and its norm may differ in the last place.
    """
    result = torch.zeros(2, dtype=torch.float64, device=shard.codes.device)
    for part in chunks(len(shard), shard.block_size):
        squares = _sum_in_lanes(shard.codes[part].to(torch.float32).square())
        finite = squares.isfinite()
        squares = squares.to(torch.float64)
        if shard.scales is not None:
            scales = scale_values(shard.scales[part])
            finite = scales.isfinite()
            squares = squares * scales.to(torch.float64).square()
        result += torch.stack([torch.where(finite, squares, 0.0).sum(), (~finite).sum()])
    return result


def _sum_in_lanes(values: Tensor) -> Tensor:
    """Sums of the rows of [rows, block size], in the order that `figures` tells."""
    first, *others = values.view(len(values), -1, LANES).unbind(dim=1)
    sums = sum(others, start=first)
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def first_non_finite_block(shard: Blocks) -> int | None:
    """Index of the first block that holds a value that is not finite."""
    for part in chunks(len(shard), shard.block_size):
        bad = ~decode(shard[part]).isfinite().all(dim=1)
        if bad.any():
            return int(part.start + bad.to(torch.uint8).argmax())
    return None
