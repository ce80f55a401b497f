"""The sum of the ranks' gradients on a GPU: `ops.reduction.accumulate` as two Triton launches.

A program decodes its rows of every rank's message in rank order, adds them to its rows of the shard and
writes the sum of squares of each row as stored, in float64. A second, small launch turns these into the
digits of `ops.exact`; they are added on the device, and nothing waits for the host.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops import exact
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.guards import check_accumulate, check_distances
from ds_fp8.ops.reduction import NORM_PARTS
from ds_fp8.ops.triton.launching import launch, raw
from ds_fp8.ops.triton.tiles import (
    decode,
    hardware_fp8,
    is_scaled,
    load_codes,
    load_scales,
    magnitude,
    scales_of,
    store_blocks,
    tile_of,
    tile_rows,
    times,
)

WARPS = 1
TILES = 4  # tiles per program
PARTS_ROWS, PARTS_WARPS = 512, 4
DIGITS, DIGIT_BITS = tl.constexpr(exact.DIGITS), tl.constexpr(exact.DIGIT_BITS)
HIDDEN, MASK = tl.constexpr(exact.HIDDEN), tl.constexpr(exact.MASK)
POSITION = tl.constexpr(exact.POSITION)


@triton.jit
def square_of_scale(e):
    """4^(e - 127) as float64."""
    return ((2 * e + 769).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def sums_of_squares(x, FORMAT: tl.constexpr):
    """`ops.exact.sums_of_squares` of a tile; of E4M3 codes by integers, which a GPU adds faster."""
    if FORMAT == "e4m3":
        units = (x * 512.0).to(tl.int32).to(tl.int64)  # a code is a multiple of 2^-9
        return tl.sum(units * units, axis=1).to(tl.float64) * 3.814697265625e-06  # 2^-18
    else:
        largest = tl.max(magnitude(x), axis=1)
        wide = largest.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
        exponent = tl.maximum(wide >> 52, 1023 - 149) - 1023
        grid = (((2 * exponent + 9 + 1023) << 52) | (1 << 51)).to(tl.float64, bitcast=True)
        values = x.to(tl.float64)
        squares = (values * values + grid[:, None]) - grid[:, None]
        return tl.where(largest < 0x7F800000, tl.sum(squares, axis=1), float("nan"))


@triton.jit
def squares_of(stored, e, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """Each row's sum of squares as stored, float64; NaN if a value is not finite."""
    squares = sums_of_squares(decode(stored, FORMAT, HARDWARE), FORMAT)
    if is_scaled(FORMAT):
        squares = tl.where(e == 255, float("nan"), squares * square_of_scale(e))
    return squares


@triton.jit
def accumulate_kernel(
    codes,  # of rank 0's piece; the other ranks' follow at a constant distance
    scales,
    stride,  # codes between two ranks' pieces
    scale_stride,  # bytes between two ranks' scales
    shard_codes,
    shard_scales,
    squares,  # [blocks] float64, written: of each block as stored; NaN: not finite
    amax,  # int32: measure: [programs], written; write: of the tensor
    blocks,
    SWEEP: tl.constexpr,  # blocks; of a tensor measure, then write
    RANKS: tl.constexpr,
    OVERWRITE: tl.constexpr,
    WIRE: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
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
        if not OVERWRITE:
            old = load_codes(shard_codes + first * BLOCK, offset, inside, FORMAT, HARDWARE)
            total = times(old, load_scales(shard_scales + first, rows, inside, FORMAT), FORMAT) + total
        if SWEEP == "measure":
            top = tl.maximum(top, tl.max(magnitude(total), axis=1))
        else:
            magnitudes = magnitude(total)
            if SWEEP == "write":
                magnitudes = tl.load(amax + tl.zeros((ROWS, 1), tl.int32))
            stored, e = store_blocks(
                total,
                magnitudes,
                codes=shard_codes + first * BLOCK,
                scales=shard_scales + first,
                rows=rows,
                offset=offset,
                inside=inside,
                FORMAT=FORMAT,
                HARDWARE=HARDWARE,
                UNIT=0,
            )
            tl.store(squares + first + rows, squares_of(stored, e, FORMAT, HARDWARE), mask=inside)
    if SWEEP == "measure":
        tl.store(amax + tl.program_id(0), tl.max(top))


@triton.jit
def norm_parts_kernel(
    squares,  # [blocks] float64
    partial,  # [programs, DIGITS + 1] int64, zeros: digits of their sum, and blocks that are not finite
    blocks,
    ROWS: tl.constexpr,
):
    """A program's share of `ops.reduction.norm_parts_of_blocks`; it writes the digits that its rows reach."""
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value = tl.load(squares + rows, mask=rows < blocks, other=0.0)
    bad = value != value
    bits = tl.where(bad, 0, value.to(tl.int64, bitcast=True))
    position = (bits >> 52).to(tl.int32) - POSITION
    significand = tl.where(bits > 0, (bits & (HIDDEN - 1)) | HIDDEN, 0)
    significand = significand >> tl.minimum(tl.maximum(-position, 0), 63).to(tl.int64)
    position = tl.maximum(position, 0)
    first = tl.min(tl.where(bits > 0, position // DIGIT_BITS, DIGITS))
    last = tl.max(tl.where(bits > 0, position // DIGIT_BITS + 3, 0))  # 53 bits, shifted by up to 23
    place = partial + program * (DIGITS + 1)
    for digit in range(first, last + 1):
        up = position - digit * DIGIT_BITS
        piece = significand << tl.minimum(tl.maximum(up, 0), 63).to(tl.int64)
        piece = (piece >> tl.minimum(tl.maximum(-up, 0), 63).to(tl.int64)) & MASK
        tl.store(place + digit, tl.sum(piece))
    tl.store(place + DIGITS, tl.sum(bad.to(tl.int64)))


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, overwrite: bool) -> Tensor:
    """`ops.reduction.accumulate`; the pieces lie at equal distances in one buffer."""
    check_accumulate(pieces, shard)
    if not len(shard):
        return torch.zeros(NORM_PARTS, dtype=torch.int64, device=shard.codes.device)
    return norm_parts_of_blocks(launch_sum(pieces, shard, raw(shard.codes), "blocks", overwrite=overwrite))


def norm_parts_of_blocks(squares: Tensor) -> Tensor:
    """`ops.reduction.norm_parts_of_blocks`."""
    programs = -(-len(squares) // PARTS_ROWS)
    partial = torch.zeros(programs, NORM_PARTS, dtype=torch.int64, device=squares.device)
    launch(
        norm_parts_kernel,
        programs,
        PARTS_WARPS,
        squares=squares,
        partial=partial,
        blocks=len(squares),
        ROWS=PARTS_ROWS,
    )
    return partial.sum(dim=0)


def largest_sums(shard: Blocks) -> Tensor:
    """Zeros, one per program, into which `launch_sum` writes the largest magnitudes that it measures."""
    _, programs = tile_of(len(shard), shard.block_size, WARPS, TILES)
    return torch.zeros(programs, dtype=torch.int32, device=shard.codes.device)


def launch_sum(
    pieces: Sequence[Blocks], shard: Blocks, amax: Tensor, sweep: str, *, overwrite: bool
) -> Tensor:
    """Each block's sum of squares, if `sweep` writes; amax, sweep: amax and SWEEP of `accumulate_kernel`."""
    check_distances([raw(piece.codes) for piece in pieces])
    check_distances([scales_of(piece) for piece in pieces])
    first, second = pieces[0], pieces[min(1, len(pieces) - 1)]
    rows, programs = tile_of(len(shard), shard.block_size, WARPS, TILES)
    squares = torch.empty(len(shard), dtype=torch.float64, device=shard.codes.device)
    launch(
        accumulate_kernel,
        programs,
        WARPS,
        codes=first.codes,
        scales=scales_of(first),
        stride=second.codes.storage_offset() - first.codes.storage_offset(),
        scale_stride=scales_of(second).storage_offset() - scales_of(first).storage_offset(),
        shard_codes=shard.codes,
        shard_scales=scales_of(shard),
        squares=squares,
        amax=amax,
        blocks=len(shard),
        SWEEP=sweep,
        RANKS=len(pieces),
        OVERWRITE=overwrite,
        WIRE=first.format.name,
        FORMAT=shard.format.name,
        HARDWARE=hardware_fp8(shard.codes.device),
        BLOCK=shard.block_size,
        ROWS=rows,
        TILES=TILES,
    )
    return squares
