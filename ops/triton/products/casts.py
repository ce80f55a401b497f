"""The operands of products on a GPU: `cast_input` and `cast_gradient` of `ops.products`.

Each takes one launch, and the gradient of a bias one more.

A program holds a tile of 128 tokens x 128 features in registers, reads it once and writes all that is wanted
of it: codes in rows, codes transposed, sums over its tokens. A scale needs no other program's values.

Scales lie as cuBLAS reads them: those of rows [tiles(inner), rows], returned as its transpose; those of tiles
with the inner dimension padded to a multiple of four.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops import products
from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.guards import check_cast
from ds_fp8.ops.products import CastGradient, CastInput, Operand, padded_tokens, scale_shape, tiles
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
SUMMED = 64  # features of a program that sums parts
REGISTERS = 128  # a thread's at most if columns are reduced, too: a multiprocessor then holds two programs
TILE = tl.constexpr(products.TILE)
PARTS = tl.constexpr(32)  # that a program reads at once


@triton.jit
def scale_of(amax):
    """The factor from values with these largest magnitudes to codes, and their scale, float32; 1 of zeros."""
    e = exponent_of(amax, "e4m3", 0)
    return inverse_scale(e, 0), tl.where(amax == 0, 1.0, power_of_two(e))


@triton.jit
def store_codes(stored, codes, first_row, first_column, rows, columns):
    """A tile of [rows, columns]."""
    row, column = tl.arange(0, TILE), tl.arange(0, TILE)
    inside = (row < rows - first_row)[:, None] & (column < columns - first_column)[None, :]
    codes += first_row.to(tl.int64) * columns + first_column
    tl.store(codes + row[:, None] * columns + column[None, :], stored, mask=inside)


@triton.jit
def store_scales(stored, scales, first, tile, rows):
    """Store the scales of 128 rows; scales: [tiles, rows]."""
    row = tl.arange(0, TILE)
    tl.store(scales + tile.to(tl.int64) * rows + first + row, stored, mask=row < rows - first)


@triton.jit(do_not_specialize=["tokens"])
def cast_kernel(
    values,  # [tokens, features] bfloat16; its rows begin `stride` elements apart
    codes,  # [padded, features] uint8, if ROWS
    scales,  # [tiles(features), padded] float32
    turned_codes,  # [features, padded] uint8, if TURNED
    turned_scales,  # rows: [tiles(padded), features] float32; tiles: [tiles(features), groups]
    sums,  # [tiles(padded), features] float32, if SUM: over the tokens of a tile
    tokens,
    padded,  # tokens, rounded up; those that are not there are zeros
    features,
    stride,
    groups,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,  # rows, tiles or nothing
    SUM: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    across = tl.cdiv(features, TILE)
    token_tile, feature_tile = tl.program_id(0) // across, tl.program_id(0) % across
    token, feature = tl.arange(0, TILE), tl.arange(0, TILE)
    first_token, first_feature = token_tile * TILE, feature_tile * TILE
    inside = feature < features - first_feature
    there = (token < tokens - first_token)[:, None] & inside[None, :]
    values += first_token.to(tl.int64) * stride + first_feature
    x = tl.load(values + token[:, None] * stride + feature[None, :], mask=there, other=0.0)
    x = decode(x, "bf16", False)
    amax = tl.max(magnitude(x), axis=1)
    if ROWS:
        inverse, scale = scale_of(amax)
        stored = encode(x * inverse[:, None], "e4m3", HARDWARE)
        store_codes(stored, codes, first_token, first_feature, padded, features)
        store_scales(scale, scales, first_token, feature_tile, padded)
    if SUM:
        sums += token_tile.to(tl.int64) * features + first_feature
        tl.store(sums + feature, tl.sum(x, axis=0), mask=inside)
    if TURNED == "rows":
        inverse, scale = scale_of(tl.max(magnitude(x), axis=0))
        stored = encode(x * inverse[None, :], "e4m3", HARDWARE)
        store_codes(tl.trans(stored), turned_codes, first_feature, first_token, features, padded)
        store_scales(scale, turned_scales, first_feature, token_tile, features)
    if TURNED == "tiles":
        inverse, scale = scale_of(tl.max(amax, axis=0))
        stored = encode(x * inverse, "e4m3", HARDWARE)
        store_codes(tl.trans(stored), turned_codes, first_feature, first_token, features, padded)
        store_tile_scale(scale, turned_scales, feature_tile, token_tile, tl.cdiv(padded, TILE), groups)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(
    parts,  # [count, features] float32
    sums,  # [features] bfloat16, written
    count,
    features,
    SUMMED: tl.constexpr,
):
    feature = tl.program_id(0) * SUMMED + tl.arange(0, SUMMED)
    inside = feature < features
    total = tl.zeros([SUMMED], tl.float32)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        offset = part.to(tl.int64)[:, None] * features + feature[None, :]
        there = (part < count)[:, None] & inside[None, :]
        total += tl.sum(tl.load(parts + offset, mask=there, other=0.0), axis=0)
    tl.store(sums + feature, round_to_bf16(total), mask=inside)


def cast_input(x: Tensor, *, wgrad: bool) -> CastInput:
    """`ops.products.cast_input` in one launch. The rows of x need not be adjacent."""
    check_cast("x", x)
    tokens, features = padded_tokens(len(x)), x.shape[1]
    forward = _in_rows(tokens, features, x.device)
    turned = _in_tiles(features, tokens, x.device) if wgrad else None
    _cast(x, forward, turned, "tiles" if wgrad else "", None)
    return CastInput(forward, turned)


def cast_gradient(dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool) -> CastGradient:
    """`ops.products.cast_gradient` in one launch, and one more for the sums. dy as x of `cast_input`."""
    cast, parts = cast_and_sum_tiles(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)
    return cast if parts is None else replace(cast, bias=sum_parts(parts))


def cast_and_sum_tiles(
    dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool
) -> tuple[CastGradient, Tensor | None]:
    """Return casts without the sum, and its parts: sums over 128 tokens, [tiles, N] float32."""
    check_cast("dy", dy)
    tokens, features = padded_tokens(len(dy)), dy.shape[1]
    rows = _in_rows(tokens, features, dy.device) if dgrad else None
    turned = _in_rows(features, tokens, dy.device) if wgrad else None
    sums = torch.empty(tiles(tokens), features, dtype=torch.float32, device=dy.device) if bias else None
    _cast(dy, rows, turned, "rows" if wgrad else "", sums)
    return CastGradient(rows, turned, None), sums


def sum_parts(parts: Tensor) -> Tensor:
    """Return their sums, [N] bfloat16, in one launch: FP32 in a fixed order, then rounded."""
    count, features = parts.shape
    sums = parts.new_empty(features, dtype=torch.bfloat16)
    launch(
        sum_kernel,
        -(-features // SUMMED),
        WARPS // 2,
        parts=parts,
        sums=sums,
        count=count,
        features=features,
        SUMMED=SUMMED,
    )
    return sums


def _in_rows(rows: int, inner: int, device: torch.device) -> Operand:
    codes = torch.empty(rows, inner, dtype=E4M3.dtype, device=device)
    return Operand(codes, torch.empty(tiles(inner), rows, dtype=torch.float32, device=device).t())


def _in_tiles(rows: int, inner: int, device: torch.device) -> Operand:
    codes = torch.empty(rows, inner, dtype=E4M3.dtype, device=device)
    return Operand(codes, torch.empty(scale_shape(rows, inner), dtype=torch.float32, device=device))


def _cast(
    values: Tensor, rows: Operand | None, turned: Operand | None, way: str, sums: Tensor | None
) -> None:
    """Fill what is wanted; `way`: how the transposed codes are scaled."""
    tokens, features = values.shape
    if not tokens:
        return
    padded = padded_tokens(tokens)
    launch(
        cast_kernel,
        tiles(padded) * tiles(features),
        WARPS,
        maxnreg=REGISTERS if way == "rows" else None,
        values=values,
        codes=values if rows is None else rows.codes,
        scales=values if rows is None else rows.scales,
        turned_codes=values if turned is None else turned.codes,
        turned_scales=values if turned is None else turned.scales,
        sums=values if sums is None else sums,
        tokens=tokens,
        padded=padded,
        features=features,
        stride=values.stride(0),
        groups=scale_shape(features, padded)[1],
        ROWS=rows is not None,
        TURNED=way,
        SUM=sums is not None,
        HARDWARE=hardware_fp8(values.device),
    )
