"""Blocks on a GPU: `quantize` and `dequantize` of `ops.blocks` as Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops import health
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.guards import check_dequantize, check_quantize
from ds_fp8.ops.triton.launching import launch
from ds_fp8.ops.triton.tiles import (
    decode,
    hardware_fp8,
    largest,
    load_codes,
    load_scales,
    magnitude,
    partials,
    power_of_two,
    round_to_bf16,
    scales_of,
    store_blocks,
    tile_of,
    tile_rows,
    times,
)

WARPS = 4
GRADIENT_COUNTS = tl.constexpr(health.GRADIENT_COUNTS)


@triton.jit
def load_values(values, numel, rows, offset, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A tile of a vector of which `numel` elements are left, zeros after them, as float32.

    Whole rows are read in wide words; only a tile with a short last row is read element by element.
    """
    whole = rows < numel // BLOCK
    x = load_as_float(values, offset, whole[:, None])
    if (numel < ROWS * BLOCK) & (numel % BLOCK != 0):
        x = tl.where(whole[:, None], x, load_as_float(values, offset, offset < numel))
    return x


@triton.jit
def load_as_float(values, offset, mask):
    x = tl.load(values + offset, mask=mask, other=0.0)
    if values.dtype.element_ty == tl.bfloat16:
        return decode(x, "bf16", False)
    return x.to(tl.float32)


@triton.jit
def count_gradient(x, stored, e, partial, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """`ops.health.GradientCounts` of a tile of values and their codes, stored as the program's."""
    codes = decode(stored, FORMAT, HARDWARE)
    finite = (tl.max(magnitude(x), axis=1) < 0x7F800000)[:, None]
    value = tl.where(finite, x, 0.0).to(tl.float64)
    error = tl.where(finite, value - times(codes, power_of_two(e), FORMAT).to(tl.float64), 0.0)
    place = partial + tl.program_id(0) * GRADIENT_COUNTS
    tl.store(place, tl.sum(((value != 0.0) & (codes == 0.0)).to(tl.float64)))
    tl.store(place + 1, tl.sum((finite & (tl.abs(codes) == largest(FORMAT))).to(tl.float64)))
    tl.store(place + 2, tl.sum((finite == 0).to(tl.float64)))
    tl.store(place + 3, tl.sum(value * value))
    tl.store(place + 4, tl.sum(error * error))


@triton.jit
def quantize_tile(
    values,
    codes,
    scales,
    partial,
    amax,
    numel,
    blocks,
    tile,
    TENSOR: tl.constexpr,
    COUNT: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of a vector, with the arguments of `quantize_kernel`."""
    first, rows, offset, inside = tile_rows(blocks, tile, BLOCK, ROWS)
    x = load_values(values + first * BLOCK, numel - first * BLOCK, rows, offset, BLOCK, ROWS)
    codes, scales = codes + first * BLOCK, scales + first
    magnitudes = magnitude(x)
    if TENSOR:
        magnitudes = tl.load(amax + tl.zeros((ROWS, 1), tl.int32))
    stored, e = store_blocks(
        x,
        magnitudes,
        codes=codes,
        scales=scales,
        rows=rows,
        offset=offset,
        inside=inside,
        FORMAT=FORMAT,
        HARDWARE=HARDWARE,
        UNIT=0,
    )
    if COUNT:
        count_gradient(x, stored, e, partial, FORMAT, HARDWARE)


@triton.jit
def quantize_kernel(
    values,  # [numel] float32, bfloat16 or float16
    codes,  # [blocks, BLOCK]
    scales,  # [blocks] uint8, not touched if the format has none
    partial,  # [programs, 5] float64: counts, if COUNT
    amax,  # of the tensor, int32, if TENSOR
    numel,
    blocks,
    TENSOR: tl.constexpr,
    COUNT: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    quantize_tile(
        values=values,
        codes=codes,
        scales=scales,
        partial=partial,
        amax=amax,
        numel=numel,
        blocks=blocks,
        tile=tl.program_id(0),
        TENSOR=TENSOR,
        COUNT=COUNT,
        FORMAT=FORMAT,
        HARDWARE=HARDWARE,
        BLOCK=BLOCK,
        ROWS=ROWS,
    )


@triton.jit
def largest_kernel(
    values,
    amax,  # [programs] int32, written: largest magnitudes, as bits
    numel,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    first, rows, offset, _ = tile_rows(blocks, tl.program_id(0), BLOCK, ROWS)
    x = load_values(values + first * BLOCK, numel - first * BLOCK, rows, offset, BLOCK, ROWS)
    tl.store(amax + tl.program_id(0), tl.max(magnitude(x)))


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    values,  # [numel], written
    numel,
    blocks,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    first, rows, offset, inside = tile_rows(blocks, tl.program_id(0), BLOCK, ROWS)
    x = load_codes(codes + first * BLOCK, offset, inside, FORMAT, HARDWARE)
    x = times(x, load_scales(scales + first, rows, inside, FORMAT), FORMAT)
    if values.dtype.element_ty == tl.bfloat16:
        x = round_to_bf16(x)
    x = x.to(values.dtype.element_ty)
    values += first * BLOCK
    left = numel - first * BLOCK
    whole = rows < left // BLOCK
    tl.store(values + offset, x, mask=whole[:, None])
    if (left < ROWS * BLOCK) & (left % BLOCK != 0):
        tl.store(values + offset, x, mask=(offset < left) & (rows == left // BLOCK)[:, None])


def quantize(values: Tensor, out: Blocks, counts: Tensor | None = None) -> None:
    """`ops.blocks.quantize` in one launch."""
    check_quantize(values, out, counts)
    if len(out):
        by_program = launch_quantize(values, out, amax=None, counts=counts)
        if counts is not None:
            counts += by_program.sum(dim=0)


def largest_magnitude(values: Tensor, blocks: int, block_size: int) -> Tensor:
    """The largest magnitude of a vector that fills `blocks` blocks, as bits, 0-d int32."""
    rows, programs = tile_of(blocks, block_size, WARPS)
    amax = torch.zeros(programs, dtype=torch.int32, device=values.device)
    launch(
        largest_kernel,
        programs,
        WARPS,
        values=values,
        amax=amax,
        numel=values.numel(),
        blocks=blocks,
        BLOCK=block_size,
        ROWS=rows,
    )
    return amax.max()


def launch_quantize(values: Tensor, out: Blocks, amax: Tensor | None, counts: Tensor | None) -> Tensor:
    """Quantise, and return each program's counts if `counts` is given.

    amax: the largest magnitude of a tensor whose rows share one scale, as bits.
    """
    rows, programs = tile_of(len(out), out.block_size, WARPS)
    partial = partials(counts, programs, values)
    launch(
        quantize_kernel,
        programs,
        WARPS,
        values=values,
        codes=out.codes,
        scales=scales_of(out),
        partial=partial,
        amax=out.codes if amax is None else amax,
        numel=values.numel(),
        blocks=len(out),
        TENSOR=amax is not None,
        COUNT=counts is not None,
        FORMAT=out.format.name,
        HARDWARE=hardware_fp8(values.device),
        BLOCK=out.block_size,
        ROWS=rows,
    )
    return partial


def dequantize(blocks: Blocks, out: Tensor) -> None:
    """`ops.blocks.dequantize` in one launch."""
    check_dequantize(blocks, out)
    if not len(blocks):
        return
    rows, programs = tile_of(len(blocks), blocks.block_size, WARPS)
    launch(
        dequantize_kernel,
        programs,
        WARPS,
        codes=blocks.codes,
        scales=scales_of(blocks),
        values=out,
        numel=out.numel(),
        blocks=len(blocks),
        FORMAT=blocks.format.name,
        HARDWARE=hardware_fp8(out.device),
        BLOCK=blocks.block_size,
        ROWS=rows,
    )
