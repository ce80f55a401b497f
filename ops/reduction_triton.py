"""The sum of the ranks' gradients on a GPU: `ops.reduction.accumulate` as one Triton launch.

A program decodes its rows of every rank's message in rank order, adds them to its rows of the shard
and sums the squares of what it stores. It leaves one pair of partial figures; they are added in
float64 on the device, and nothing waits for the host.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.tiles_triton import (
    decode,
    hardware_fp8,
    is_scaled,
    launch,
    load_codes,
    load_scales,
    magnitude,
    raw,
    scales_of,
    store_blocks,
    tile_of,
    tile_rows,
    times,
)

WARPS = 1
TILES = 4  # tiles a program: its figures are added over threads once


@triton.jit
def square_of_scale(e):
    """4^(e - 127) as float64."""
    return ((2 * e + 769).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def figures_of(stored, e, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """Each row's sum of squares as stored, float64, and whether it holds a non-finite value."""
    x = decode(stored, FORMAT, HARDWARE)
    squares = tl.sum(x * x, axis=1)
    if is_scaled(FORMAT):
        bad = e == 255
    else:
        bad = squares - squares != 0.0  # inf - inf and NaN - NaN are NaN, which equals nothing
    squares = tl.where(bad, 0.0, squares).to(tl.float64)
    if is_scaled(FORMAT):
        squares *= square_of_scale(e)
    return squares, bad.to(tl.int32)


@triton.jit
def accumulate_kernel(
    codes,  # of rank 0's piece; the other ranks' follow at a constant distance
    scales,
    stride,  # codes between two ranks' pieces
    scale_stride,  # bytes between two ranks' scales
    shard_codes,
    shard_scales,
    partial,  # [programs, 2] float64: sum of squares, non-finite blocks
    amax,  # int32: measure: [programs], written; write: of the tensor
    blocks,
    SWEEP: tl.constexpr,  # blocks; of a tensor measure, then write
    RANKS: tl.constexpr,
    FRESH: tl.constexpr,
    WIRE: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    squares = tl.zeros((ROWS,), tl.float64)
    bad = tl.zeros((ROWS,), tl.int32)
    top = tl.zeros((ROWS,), tl.int32)
    for tile in range(TILES):
        first, rows, offset, inside = tile_rows(blocks, tl.program_id(0) * TILES + tile, BLOCK, ROWS)
        piece, piece_scales = codes + first * BLOCK, scales + first
        total = times(
            load_codes(piece, offset, inside, WIRE, HARDWARE),
            load_scales(piece_scales, rows, inside, WIRE),
            WIRE,
        )
        for _ in tl.range(1, RANKS, loop_unroll_factor=4):
            piece += stride
            piece_scales += scale_stride
            x = load_codes(piece, offset, inside, WIRE, HARDWARE)
            # A code times its scale is exact, so that one rounding is as good as two.
            total = tl.fma(x, load_scales(piece_scales, rows, inside, WIRE)[:, None], total)
        if not FRESH:
            old = load_codes(shard_codes + first * BLOCK, offset, inside, FORMAT, HARDWARE)
            total = times(old, load_scales(shard_scales + first, rows, inside, FORMAT), FORMAT) + total
        if SWEEP == "measure":
            top = tl.maximum(top, tl.max(magnitude(total), axis=1))
        else:
            size = magnitude(total)
            if SWEEP == "write":
                size = tl.load(amax + tl.zeros((ROWS, 1), tl.int32))
            stored, e = store_blocks(
                total,
                size,
                shard_codes + first * BLOCK,
                shard_scales + first,
                rows,
                offset,
                inside,
                FORMAT,
                HARDWARE,
                0,
            )
            row_squares, row_bad = figures_of(stored, e, FORMAT, HARDWARE)
            squares += row_squares
            bad += row_bad
    if SWEEP == "measure":
        tl.store(amax + tl.program_id(0), tl.max(top))
    else:
        place = partial + tl.program_id(0) * 2
        tl.store(place, tl.sum(squares))
        tl.store(place + 1, tl.sum(bad).to(tl.float64))


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, fresh: bool) -> Tensor:
    """`ops.reduction.accumulate` in one launch; the pieces lie at equal distances in one buffer."""
    if not len(shard):
        return torch.zeros(2, dtype=torch.float64, device=shard.codes.device)
    return launch_sum(pieces, shard, raw(shard.codes), "blocks", fresh=fresh)


def largest_sums(shard: Blocks) -> Tensor:
    """Where `launch_sum` measures into."""
    _, programs = tile_of(len(shard), shard.block_size, WARPS, TILES)
    return torch.zeros(programs, dtype=torch.int32, device=shard.codes.device)


def launch_sum(pieces: Sequence[Blocks], shard: Blocks, amax: Tensor, sweep: str, *, fresh: bool) -> Tensor:
    """The figures of the shard; amax and sweep: as `accumulate_kernel` has them."""
    first, second = pieces[0], pieces[min(1, len(pieces) - 1)]
    rows, programs = tile_of(len(shard), shard.block_size, WARPS, TILES)
    partial = torch.zeros(programs, 2, dtype=torch.float64, device=shard.codes.device)
    launch(
        accumulate_kernel,
        programs,
        WARPS,
        raw(first.codes),
        scales_of(first),
        second.codes.storage_offset() - first.codes.storage_offset(),
        scales_of(second).storage_offset() - scales_of(first).storage_offset(),
        raw(shard.codes),
        scales_of(shard),
        partial,
        amax,
        len(shard),
        SWEEP=sweep,
        RANKS=len(pieces),
        FRESH=fresh,
        WIRE=first.format.name,
        FORMAT=shard.format.name,
        HARDWARE=hardware_fp8(shard.codes.device),
        BLOCK=shard.block_size,
        ROWS=rows,
        TILES=TILES,
    )
    return partial.sum(dim=0)
