"""FP8 matrix products: how operands are cast, what a weight is made of, and what a product is.

    y = x W^T        x [tokens, K], W [N, K]        forward
    dx = dy W        dy [tokens, N]                 dgrad
    dW = dy^T x                                     wgrad

operands     E4M3 codes times power-of-two scales, current ones: no history, no state (FP8-LM, arXiv
             2310.18313, section 2.3; blocks as in DeepSeek-V3, arXiv 2412.19437, section 3.3).
W            one scale per tile of 128 x 128. Its codes transpose without loss, so that one copy serves
             forward and dgrad. A scale is stored as a byte, its exponent; a product expands what it reads.
x            one scale per token and 128 features for the forward, so that a token's codes depend on nothing
             but the token; for wgrad transposed, in tiles of 128 x 128.
dy           one scale per token and 128 features for dgrad; for wgrad transposed, one per feature and 128
             tokens.
product      both operands decoded, multiplied and added in FP32, rounded to BF16 once.
tokens       are padded to a multiple of 16, with zero codes and scales of 1, which cuBLAS wants; N and K are
             multiples of 16.
inf or NaN   makes the scale of its block or tile inf, and so every value of it inf or NaN (`ops.blocks`).

The functions here are the contract, in plain PyTorch. `ops.triton.products`, `ops.cpu.weight_tiles` and
`ops.cublas` have the same names. Codes and scales are the same bit for bit, products as far as sums are.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fp8.ops.blocks import power_of_two, scale_down, scale_exponents
from ds_fp8.ops.formats import E4M3

TILE = 128  # elements of a scale along each direction that has one
TOKENS = 16  # sides of a product are multiples of this
GROUP = 4  # tiles along the inner dimension per group of scales, as cuBLAS reads them


def tiles(length: int) -> int:
    """Number of tiles along a side of `length` elements."""
    return -(-length // TILE)


def padded_tokens(tokens: int) -> int:
    return -(-tokens // TOKENS) * TOKENS


class Weight(NamedTuple):
    """A weight as it is stored."""

    codes: Tensor  # [rows, columns] float8_e4m3fn
    exponents: Tensor  # [tiles(rows), tiles(columns)] uint8


@dataclass(frozen=True)
class Operand:
    """One side of a product, [rows, inner]: the sum goes over `inner`."""

    codes: Tensor  # [rows, inner] float8_e4m3fn, contiguous
    scales: Tensor  # float32 powers of two: [rows, tiles(inner)], or of tiles: `scale_shape(rows, inner)`

    def decode(self) -> Tensor:
        """The values, [rows, inner] float32."""
        rows, inner = self.codes.shape
        scales = self.scales.repeat_interleave(TILE, 1)[:, :inner]
        if len(scales) != rows:
            scales = scales.repeat_interleave(TILE, 0)[:rows]
        return self.codes.float() * scales


@dataclass(frozen=True)
class CastInput:
    """x cast for the forward, and for wgrad if it is needed."""

    forward: Operand  # [padded tokens, K], a scale per token and 128 features
    wgrad: Operand | None  # [K, padded tokens], in tiles


@dataclass(frozen=True)
class CastGradient:
    """dy for dgrad and wgrad, and its sum over tokens, where wanted."""

    dgrad: Operand | None  # [padded tokens, N], a scale per token and 128 features
    wgrad: Operand | None  # [N, padded tokens], a scale per feature and 128 tokens
    bias: Tensor | None  # [N] bfloat16


def cast_input(x: Tensor, *, wgrad: bool) -> CastInput:
    """Cast x, [tokens, K] bfloat16."""
    whole = _padded(x)
    return CastInput(_in_rows(whole), _in_tiles(whole.t()) if wgrad else None)


def cast_gradient(dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool) -> CastGradient:
    """Cast dy, [tokens, N] bfloat16. The sum is taken in FP32, in any order, and rounded."""
    whole = _padded(dy)
    return CastGradient(
        _in_rows(whole) if dgrad else None,
        _in_rows(whole.t()) if wgrad else None,
        whole.sum(0).to(torch.bfloat16) if bias else None,
    )


def multiply(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """left right^T, [rows of left, rows of right] bfloat16; left has scales per row, right also in tiles.

    bias: [rows of right] bfloat16, added in FP32.
    """
    with torch.autocast(left.codes.device.type, enabled=False):  # an FP32 product stays one
        product = left.decode() @ right.decode().t()
    return (product if bias is None else product + bias.float()).to(torch.bfloat16)


def transpose(codes: Tensor, exponents: Tensor) -> Operand:
    """A weight transposed, [columns, rows], contiguous.

    codes: [rows, columns] float8_e4m3fn; exponents: [tiles(rows), tiles(columns)] uint8.
    """
    return expand(codes.t().contiguous(), exponents.t())


def expand(codes: Tensor, exponents: Tensor) -> Operand:
    """A weight as it is stored, with the FP32 scales that a product reads; arguments as for `transpose`."""
    scales = torch.ones(scale_shape(*codes.shape), dtype=torch.float32, device=codes.device)
    scales[:, : exponents.shape[1]] = power_of_two(exponents)
    return Operand(codes, scales)


# A weight, of which a rank has a run of elements only


def find_exponents(values: Tensor, first: int, columns: int, exponents: Tensor) -> None:
    """Raise the E8M0 byte of each tile to what these values need.

    values: [n] bfloat16, consecutive elements of a matrix from `first` on. exponents: [tiles(rows),
    tiles(columns)] uint8, 0 where nothing is known. The byte of a tile is that of `ops.blocks` for all its
    values: the ranks that have parts of a tile agree on the largest.
    """
    found = scale_exponents(values.float()[:, None], E4M3).to(torch.uint8)
    where = _tile_of(first, len(values), columns, exponents)
    exponents.view(-1).scatter_reduce_(0, where, found, "amax")


def encode_weight(
    values: Tensor,
    first: int,
    columns: int,
    exponents: Tensor,
    codes: Tensor,
    control: Tensor | None = None,
) -> None:
    """Round values to codes, [n] float8_e4m3fn, with the bytes that their tiles have. Arguments as above.

    control: [2] float32, as `ops.adam.Sweep` has it; 0 in its second place leaves the codes as they are.
    """
    if control is not None and not control[1]:
        return
    e = exponents.view(-1)[_tile_of(first, len(values), columns, exponents)].to(torch.int32)
    codes.copy_(scale_down(values.float()[:, None], e)[:, 0])


def decode_weight(codes: Tensor, exponents: Tensor, out: Tensor) -> None:
    """The values of a weight, [N, K], into `out`, bfloat16 or float32: exact but for BF16's subnormals."""
    out.copy_(Operand(codes, power_of_two(exponents)).decode())


def scale_shape(rows: int, inner: int) -> tuple[int, int]:
    """Shape of the scales of an operand in tiles: cuBLAS reads groups of them; the last is padded with 1."""
    return tiles(rows), -(-tiles(inner) // GROUP) * GROUP


def _padded(values: Tensor) -> Tensor:
    """float32, with zero tokens at the end."""
    tokens = values.shape[0]
    whole = values.new_zeros(padded_tokens(tokens), values.shape[1], dtype=torch.float32)
    whole[:tokens] = values
    return whole


def _in_rows(values: Tensor) -> Operand:
    """[rows, inner] float32 with a scale per row and 128 elements."""
    rows, inner = values.shape
    parts = values.new_zeros(rows, tiles(inner) * TILE)
    parts[:, :inner] = values
    parts = parts.view(-1, TILE)
    e = scale_exponents(parts, E4M3)
    codes = scale_down(parts, e).view(rows, tiles(inner) * TILE)[:, :inner].to(E4M3.dtype).contiguous()
    return Operand(codes, _scales(e, parts).view(rows, tiles(inner)))


def _in_tiles(values: Tensor) -> Operand:
    """[rows, inner] float32 in tiles of 128 x 128."""
    rows, inner = values.shape
    shape = (tiles(rows), TILE, tiles(inner), TILE)
    whole = values.new_zeros(shape[0] * TILE, shape[2] * TILE)
    whole[:rows, :inner] = values
    parts = whole.view(shape).transpose(1, 2).reshape(-1, TILE * TILE)
    e = scale_exponents(parts, E4M3)
    down = scale_down(parts, e).view(shape[0], shape[2], TILE, TILE).transpose(1, 2).reshape(whole.shape)
    codes = down[:rows, :inner].to(E4M3.dtype).contiguous()
    scales = values.new_ones(scale_shape(rows, inner))
    scales[:, : shape[2]] = _scales(e, parts).view(shape[0], shape[2])
    return Operand(codes, scales)


def _scales(e: Tensor, parts: Tensor) -> Tensor:
    """FP32 scales; of what is all zeros 1."""
    return torch.where((parts == 0).all(1), 1.0, power_of_two(e))


def _tile_of(first: int, count: int, columns: int, exponents: Tensor) -> Tensor:
    """The number of each element's tile."""
    element = torch.arange(first, first + count, device=exponents.device)
    row, column = element // columns // TILE, element % columns // TILE
    return row * exponents.shape[1] + column
