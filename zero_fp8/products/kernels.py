"""The functions that cast, multiply and decode, as one value, called eagerly or by a compiled graph.

Under torch.compile they are custom ops: it sees names and shapes and looks into none of them. The ops are
functional, so that the compiler finds common casts and drops what nobody uses, and sizes may be symbols.
Called eagerly an op costs tens of microseconds, so only traced code calls them.

Kernels lay scales as cuBLAS reads them, padded or transposed, and want them back so. What a graph passes on,
or autograd saves and somebody moves to the host, is dense: tiles with their padding, and in a graph the
scales of rows transposed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fp8.ops import product_backend, products
from ds_fp8.ops.product_backend import Products
from ds_fp8.ops.products import (
    CastGradient,
    Operand,
    padded_tokens,
    scale_shape,
    tiles,
    weight_operand,
)

_CODES = torch.float8_e4m3fn
_known: dict[str, "Kernels"] = {}  # an op is told by name what to run


@dataclass(frozen=True)
class Kernels(Products):
    """Functions that cast and encode, and how products are multiplied; a name has one set in a process."""

    multiply: Callable[[Operand, Operand, Tensor | None], Tensor] = products.multiply

    def __post_init__(self) -> None:
        known = _known.setdefault(self.name, self)
        assert known == self, f"two sets of kernels have the name {self.name}"

    @classmethod
    def of(cls, name: str, functions: Products, multiply: Callable[..., Tensor]) -> "Kernels":
        return cls(**{**vars(functions), "name": name, "instead": None, "multiply": multiply})


REFERENCE = Kernels.of("reference", product_backend.REFERENCE, products.multiply)


class Right(NamedTuple):
    """The right side of a product, in tiles."""

    codes: Tensor  # [rows, inner]
    scales: Tensor  # `scale_shape(rows, inner)`, dense


class Cast(NamedTuple):
    """x for the forward, and for wgrad if somebody wants it."""

    forward: Operand
    wgrad: Right | None


def cast_input(kernels: Kernels, x: Tensor, *, wgrad: bool) -> Cast:
    """Cast x, [tokens, K] bfloat16."""
    if torch.compiler.is_compiling():
        codes, scales, turned, turned_scales = _cast_input(kernels.name, x, wgrad)
        return Cast(Operand(codes, scales), Right(turned, turned_scales) if wgrad else None)
    cast = kernels.cast_input(x, wgrad=wgrad)
    return Cast(cast.forward, None if cast.wgrad is None else Right(cast.wgrad.codes, _whole(cast.wgrad)))


def cast_gradient(kernels: Kernels, dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool) -> CastGradient:
    """Cast dy, [tokens, N] bfloat16."""
    if not torch.compiler.is_compiling():
        return kernels.cast_gradient(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)
    codes, scales, turned, turned_scales, total = _cast_gradient(kernels.name, dy, dgrad, wgrad, bias)
    return CastGradient(
        Operand(codes, scales) if dgrad else None,
        Operand(turned, turned_scales) if wgrad else None,
        total if bias else None,
    )


def multiply(kernels: Kernels, left: Operand, right: Right, bias: Tensor | None = None) -> Tensor:
    """[rows of left, rows of right] bfloat16."""
    if torch.compiler.is_compiling():
        y: Tensor = _multiply(kernels.name, left.codes, left.scales, right.codes, right.scales, bias)
        return y
    return _multiply_apart(kernels, left, right, bias)


def transpose(kernels: Kernels, codes: Tensor) -> Tensor:
    """Codes transposed, for one product; they are dropped after it."""
    turned: Tensor = (_transpose if torch.compiler.is_compiling() else _run_transpose)(kernels.name, codes)
    return turned


def decode(kernels: Kernels, codes: Tensor, exponents: Tensor) -> Tensor:
    """The values of a weight, bfloat16."""
    run = _decode if torch.compiler.is_compiling() else _run_decode
    values: Tensor = run(kernels.name, codes, exponents)
    return values


def _multiply_apart(kernels: Kernels, left: Operand, right: Right, bias: Tensor | None) -> Tensor:
    """Apart from autocast: an FP32 product stays one."""
    operand = weight_operand(right.codes, right.scales)
    if not torch.is_autocast_enabled(left.codes.device.type):
        return kernels.multiply(left, operand, bias)
    with torch.autocast(left.codes.device.type, enabled=False):
        return kernels.multiply(left, operand, bias)


def _run_transpose(name: str, codes: Tensor) -> Tensor:
    return _known[name].transpose(codes)


def _run_decode(name: str, codes: Tensor, exponents: Tensor) -> Tensor:
    out = codes.new_empty(codes.shape, dtype=torch.bfloat16)
    _known[name].decode_weight(codes, exponents, out)
    return out


def _whole(operand: Operand) -> Tensor:
    """Scales of tiles with the padding that lies behind them, or with some if there is none."""
    scales, shape = operand.scales, scale_shape(*operand.codes.shape)
    if scales.shape == shape:
        return scales.contiguous()
    if scales.stride() == (shape[1], 1):
        return scales.as_strided(shape, (shape[1], 1))
    whole = scales.new_ones(shape)
    whole[:, : scales.shape[1]] = scales
    return whole


# The ops. Where nothing is wanted they give empty tensors, since their results are fixed in number.


@torch.library.custom_op("ds_fp8::cast_input", mutates_args=())
def _cast_input(kernels: str, x: Tensor, wgrad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cast = _known[kernels].cast_input(x, wgrad=wgrad)
    turned = _nothing(x) if cast.wgrad is None else (cast.wgrad.codes, _whole(cast.wgrad))
    return *_turned_scales(cast.forward, x), *turned


@_cast_input.register_fake
def _(kernels: str, x: Tensor, wgrad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, features = padded_tokens(x.shape[0]), x.shape[1]
    whole = scale_shape(features, tokens)
    return (
        *_fake(x, (tokens, features), (tiles(features), tokens), True),
        *_fake(x, (features, tokens), whole, wgrad),
    )


@torch.library.custom_op("ds_fp8::cast_gradient", mutates_args=())
def _cast_gradient(
    kernels: str, dy: Tensor, dgrad: bool, wgrad: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cast = _known[kernels].cast_gradient(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)
    total = dy.new_empty(0, dtype=torch.float32) if cast.bias is None else cast.bias
    return *_turned_scales(cast.dgrad, dy), *_turned_scales(cast.wgrad, dy), total


@_cast_gradient.register_fake
def _(
    kernels: str, dy: Tensor, dgrad: bool, wgrad: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, features = padded_tokens(dy.shape[0]), dy.shape[1]
    return (
        *_fake(dy, (tokens, features), (tiles(features), tokens), dgrad),
        *_fake(dy, (features, tokens), (tiles(tokens), features), wgrad),
        dy.new_empty(features if bias else 0, dtype=torch.float32),
    )


@torch.library.custom_op("ds_fp8::multiply", mutates_args=())
def _multiply(
    kernels: str, left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
) -> Tensor:
    operand = Operand(left, left_scales.t())
    return _multiply_apart(_known[kernels], operand, Right(right, right_scales), bias)


@_multiply.register_fake
def _(
    kernels: str, left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0], dtype=torch.bfloat16)


_transpose = torch.library.custom_op("ds_fp8::transpose", _run_transpose, mutates_args=())


@_transpose.register_fake
def _(name: str, codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])


_decode = torch.library.custom_op("ds_fp8::decode_weight", _run_decode, mutates_args=())


@_decode.register_fake
def _(name: str, codes: Tensor, exponents: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.bfloat16)


def _nothing(like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(0, dtype=_CODES), like.new_empty(0, dtype=torch.float32)


def _turned_scales(operand: Operand | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and scales of rows as [tiles(inner), rows]."""
    return _nothing(like) if operand is None else (operand.codes, operand.scales.t().contiguous())


def _fake(
    like: Tensor, codes: tuple[int, int], scales: tuple[int, int], wanted: bool
) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(codes if wanted else 0, dtype=_CODES),
        like.new_empty(scales if wanted else 0, dtype=torch.float32),
    )
