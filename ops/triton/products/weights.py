"""Weights of products on a GPU: the functions of `ops.products` on a weight's tiles, one launch each.

A program handles a tile of 128 x 128 alone, also where a rank has a part of it only: no two programs write
one byte, and nothing is atomic.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops import products
from ds_fp8.ops.guards import check_decode, check_run, check_weight
from ds_fp8.ops.products import Operand, scale_shape, tiles
from ds_fp8.ops.triton.launching import launch
from ds_fp8.ops.triton.products.scales import store_tile_scale
from ds_fp8.ops.triton.tiles import (
    decode,
    encode,
    exponent_of,
    hardware_fp8,
    inverse_scale,
    magnitude,
    power_of_two,
    round_to_bf16,
)

WARPS = 8
MANY = 1024  # scales of a program
ONE = tl.constexpr(127)  # the byte of a scale of 1
TILE = tl.constexpr(products.TILE)


@triton.jit
def part_of_tile(first, count, columns, tile):
    """Where a tile begins in a run of elements, its elements' offsets from there, which are in the run."""
    across = tl.cdiv(columns, TILE)
    row, column = tl.arange(0, TILE), tl.arange(0, TILE)
    first_column = tile % across * TILE
    start = (tile // across * TILE).to(tl.int64) * columns + first_column - first
    offset = row[:, None] * columns + column[None, :]
    low = tl.minimum(tl.maximum(-start, 0), TILE * columns).to(tl.int32)
    high = tl.minimum(tl.maximum(count - start, 0), TILE * columns).to(tl.int32)
    inside = (offset >= low) & (offset < high) & (column < columns - first_column)[None, :]
    return start, offset, inside


@triton.jit(do_not_specialize=["first_tile"])
def find_kernel(
    values,  # [count] bfloat16, elements of a matrix from `first` on
    exponents,  # [tiles] uint8, raised
    first,
    count,
    columns,
    first_tile,  # of a row of tiles
):
    find_tile(values, exponents, first, count, columns, first_tile + tl.program_id(0))


@triton.jit
def find_tile(values, exponents, first, count, columns, tile):
    """Raise the exponent of a tile."""
    start, offset, inside = part_of_tile(first, count, columns, tile)
    x = decode(tl.load(values + start + offset, mask=inside, other=0.0), "bf16", False)
    amax = tl.max(tl.max(tl.where(inside, magnitude(x), -1), axis=1), axis=0)
    if amax >= 0:
        e = exponent_of(amax, "e4m3", 0)
        tl.store(exponents + tile, tl.maximum(tl.load(exponents + tile).to(tl.int32), e).to(tl.uint8))


@triton.jit(do_not_specialize=["first_tile"])
def encode_kernel(
    values,  # as for `find_kernel`
    exponents,
    codes,  # [count] uint8, written
    control,  # [2] float32; 0 in its second place: nothing is written
    first,
    count,
    columns,
    first_tile,
    HARDWARE: tl.constexpr,
):
    if tl.load(control + 1) == 0.0:
        return
    encode_tile(
        values=values,
        exponents=exponents,
        codes=codes,
        first=first,
        count=count,
        columns=columns,
        tile=first_tile + tl.program_id(0),
        HARDWARE=HARDWARE,
    )


@triton.jit
def encode_tile(values, exponents, codes, first, count, columns, tile, HARDWARE: tl.constexpr):
    """Encode a tile, or the part of it that is in the run."""
    start, offset, inside = part_of_tile(first, count, columns, tile)
    x = decode(tl.load(values + start + offset, mask=inside, other=0.0), "bf16", False)
    inverse = inverse_scale(tl.load(exponents + tile).to(tl.int32), 0)
    tl.store(codes + start + offset, encode(x * inverse, "e4m3", HARDWARE), mask=inside)


@triton.jit
def decode_kernel(
    codes,  # [rows, columns] uint8
    exponents,  # [tiles(rows), tiles(columns)] uint8
    out,  # [rows, columns] bfloat16 or float32, written
    rows,
    columns,
    HARDWARE: tl.constexpr,
):
    tile = tl.program_id(0)
    start, offset, inside = tile_of_matrix(rows, columns, tile)
    x = decode(tl.load(codes + start + offset, mask=inside, other=0), "e4m3", HARDWARE)
    x = x * power_of_two(tl.load(exponents + tile))
    if out.dtype.element_ty == tl.bfloat16:
        x = round_to_bf16(x)
    tl.store(out + start + offset, x, mask=inside)


@triton.jit
def transpose_kernel(
    codes,  # [rows, columns] uint8
    exponents,  # [tiles(rows), tiles(columns)] uint8
    turned,  # [columns, rows], written
    scales,  # [tiles(columns), groups] float32, written
    rows,
    columns,
    groups,
):
    tile = tl.program_id(0)
    start, offset, inside = tile_of_matrix(rows, columns, tile)
    stored = tl.trans(tl.load(codes + start + offset, mask=inside, other=0))
    down = tl.cdiv(rows, TILE)
    across = tl.cdiv(columns, TILE)
    start, offset, inside = tile_of_matrix(columns, rows, tile % across * down + tile // across)
    tl.store(turned + start + offset, stored, mask=inside)
    scale = power_of_two(tl.load(exponents + tile))
    store_tile_scale(scale, scales, tile % across, tile // across, down, groups)


@triton.jit
def tile_of_matrix(rows, columns, tile):
    """Where a tile of a whole matrix begins, its elements' offsets from there, which are in the matrix."""
    across = tl.cdiv(columns, TILE)
    row, column = tl.arange(0, TILE), tl.arange(0, TILE)
    first_row, first_column = tile // across * TILE, tile % across * TILE
    inside = (row < rows - first_row)[:, None] & (column < columns - first_column)[None, :]
    return (
        first_row.to(tl.int64) * columns + first_column,
        row[:, None] * columns + column[None, :],
        inside,
    )


@triton.jit(do_not_specialize=["rows", "columns", "groups"])
def expand_kernel(
    exponents,  # [rows, columns] uint8
    scales,  # [rows, groups] float32, written; padding is 1
    rows,
    columns,
    groups,
    MANY: tl.constexpr,
):
    place = tl.program_id(0) * MANY + tl.arange(0, MANY)
    row, column = place // groups, place % groups
    inside = row < rows
    stored = tl.load(exponents + row * columns + column, mask=inside & (column < columns), other=ONE)
    tl.store(scales + place, power_of_two(stored), mask=inside)


def find_exponents(values: Tensor, first: int, columns: int, exponents: Tensor) -> None:
    """`ops.products.find_exponents` in one launch."""
    check_run(values, first, columns, exponents)
    if values.numel():
        _launch_run(find_kernel, values, first, columns, exponents)


def encode_weight(
    values: Tensor,
    first: int,
    columns: int,
    exponents: Tensor,
    codes: Tensor,
    control: Tensor | None = None,
) -> None:
    """`ops.products.encode_weight` in one launch."""
    check_run(values, first, columns, exponents, codes)
    if values.numel():
        go = always(values.device) if control is None else control
        more = {"codes": codes, "control": go, "HARDWARE": hardware_fp8(values.device)}
        _launch_run(encode_kernel, values, first, columns, exponents, **more)


@functools.cache
def always(device: torch.device) -> Tensor:
    """A control that lets kernels write."""
    return torch.ones(2, dtype=torch.float32, device=device)


def _launch_run(
    kernel: object, values: Tensor, first: int, columns: int, exponents: Tensor, **more: object
) -> None:
    """A program for each tile in the rows of tiles that the run reaches."""
    first_tile, programs = tile_rows_of(first, values.numel(), columns)
    launch(
        kernel,
        programs,
        WARPS,
        values=values,
        exponents=exponents,
        first=first,
        count=values.numel(),
        columns=columns,
        first_tile=first_tile,
        **more,
    )


def tile_rows_of(first: int, count: int, columns: int) -> tuple[int, int]:
    """The first tile, and the number of tiles, of the rows of tiles that a run reaches."""
    across = tiles(columns)
    first_row = first // columns // products.TILE
    last_row = (first + count - 1) // columns // products.TILE
    return first_row * across, (last_row - first_row + 1) * across


def decode_weight(codes: Tensor, exponents: Tensor, out: Tensor) -> None:
    """`ops.products.decode_weight` in one launch."""
    check_decode(codes, exponents, out)
    rows, columns = codes.shape
    launch(
        decode_kernel,
        tiles(rows) * tiles(columns),
        WARPS,
        codes=codes,
        exponents=exponents,
        out=out,
        rows=rows,
        columns=columns,
        HARDWARE=hardware_fp8(codes.device),
    )


def transpose(codes: Tensor, exponents: Tensor) -> Operand:
    """`ops.products.transpose` in one launch."""
    check_weight(codes, exponents)
    rows, columns = codes.shape
    turned = codes.new_empty(columns, rows)
    scales = codes.new_empty(scale_shape(columns, rows), dtype=torch.float32)
    launch(
        transpose_kernel,
        tiles(rows) * tiles(columns),
        WARPS,
        codes=codes,
        exponents=exponents,
        turned=turned,
        scales=scales,
        rows=rows,
        columns=columns,
        groups=scales.shape[1],
    )
    return Operand(turned, scales)


def expand(codes: Tensor, exponents: Tensor) -> Operand:
    """`ops.products.expand` in one launch."""
    check_weight(codes, exponents)
    scales = codes.new_empty(scale_shape(*codes.shape), dtype=torch.float32)
    launch(
        expand_kernel,
        -(-scales.numel() // MANY),
        WARPS // 2,
        exponents=exponents,
        scales=scales,
        rows=scales.shape[0],
        columns=exponents.shape[1],
        groups=scales.shape[1],
        MANY=MANY,
    )
    return Operand(codes, scales)
