"""The functions that cast, multiply and decode, as one value; the reference is `ds_fp8.ops.products`.

The same functions are custom ops for torch.compile, `traced`: it sees names and shapes and looks into none of
them. The ops are functional, so that the compiler finds common casts and drops what nobody uses, and sizes
may be symbols. Called eagerly an op costs tens of microseconds, so only traced code calls them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ds_fp8.ops import products
from ds_fp8.ops.products import CastGradient, CastInput, Operand, padded_tokens, tiles

_CODES = torch.float8_e4m3fn
_known: dict[str, "Kernels"] = {}  # an op is told by name what to run


@dataclass(frozen=True)
class Kernels:
    """Functions of the names and contracts of `ds_fp8.ops.products`; a name has one set in a process."""

    name: str
    cast_input: Callable[..., CastInput]
    cast_gradient: Callable[..., CastGradient]
    multiply: Callable[[Operand, Operand], Tensor]
    transpose: Callable[[Tensor], Tensor]
    decode_weight: Callable[[Tensor, Tensor, Tensor], None]

    def __post_init__(self) -> None:
        if not self.name.startswith("traced "):
            _known[self.name] = self


REFERENCE = Kernels(
    "reference",
    products.cast_input,
    products.cast_gradient,
    products.multiply,
    products.transpose,
    products.decode_weight,
)


def traced(kernels: Kernels) -> Kernels:
    """The same kernels as ops."""
    return replace(
        kernels,
        name=f"traced {kernels.name}",
        cast_input=partial(_traced_cast_input, kernels.name),
        cast_gradient=partial(_traced_cast_gradient, kernels.name),
        multiply=partial(_traced_multiply, kernels.name),
        transpose=partial(_transpose, kernels.name),
    )


def _traced_cast_input(name: str, x: Tensor, *, wgrad: bool) -> CastInput:
    codes, scales, turned, turned_scales = _cast_input(name, x, wgrad)
    return CastInput(Operand(codes, scales), Operand(turned, turned_scales) if wgrad else None)


def _traced_cast_gradient(name: str, dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool) -> CastGradient:
    codes, scales, turned, turned_scales, total = _cast_gradient(name, dy, dgrad, wgrad, bias)
    return CastGradient(
        Operand(codes, scales) if dgrad else None,
        Operand(turned, turned_scales) if wgrad else None,
        total if bias else None,
    )


def _traced_multiply(name: str, left: Operand, right: Operand) -> Tensor:
    y: Tensor = _multiply(name, left.codes, left.scales, right.codes, right.scales)
    return y


# The ops. Where nothing is wanted they give empty tensors, since their results are fixed in number.


@torch.library.custom_op("ds_fp8::cast_input", mutates_args=())
def _cast_input(kernels: str, x: Tensor, wgrad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cast = _known[kernels].cast_input(x, wgrad=wgrad)
    return *_parts(cast.forward, x), *_parts(cast.wgrad, x)


@_cast_input.register_fake
def _(kernels: str, x: Tensor, wgrad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, features = padded_tokens(x.shape[0]), x.shape[1]
    scales = (tokens, tiles(features))
    turned_scales = (tiles(features), tiles(tokens))
    return (
        *_fake_operand(x, (tokens, features), scales, True),
        *_fake_operand(x, (features, tokens), turned_scales, wgrad),
    )


@torch.library.custom_op("ds_fp8::cast_gradient", mutates_args=())
def _cast_gradient(
    kernels: str, dy: Tensor, dgrad: bool, wgrad: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cast = _known[kernels].cast_gradient(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)
    total = dy.new_empty(0, dtype=torch.float32) if cast.bias is None else cast.bias
    return *_parts(cast.dgrad, dy), *_parts(cast.wgrad, dy), total


@_cast_gradient.register_fake
def _(
    kernels: str, dy: Tensor, dgrad: bool, wgrad: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, features = padded_tokens(dy.shape[0]), dy.shape[1]
    return (
        *_fake_operand(dy, (tokens, features), (tokens, tiles(features)), dgrad),
        *_fake_operand(dy, (features, tokens), (features, tiles(tokens)), wgrad),
        dy.new_empty(features if bias else 0, dtype=torch.float32),
    )


@torch.library.custom_op("ds_fp8::multiply", mutates_args=())
def _multiply(kernels: str, left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor) -> Tensor:
    return _known[kernels].multiply(Operand(left, left_scales), Operand(right, right_scales))


@_multiply.register_fake
def _(kernels: str, left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0], dtype=torch.bfloat16)


@torch.library.custom_op("ds_fp8::transpose", mutates_args=())
def _transpose(kernels: str, codes: Tensor) -> Tensor:
    return _known[kernels].transpose(codes)


@_transpose.register_fake
def _(kernels: str, codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])


@torch.library.custom_op("ds_fp8::decode_weight", mutates_args=())
def decode_op(kernels: str, codes: Tensor, exponents: Tensor) -> Tensor:
    out = codes.new_empty(codes.shape, dtype=torch.bfloat16)
    _known[kernels].decode_weight(codes, exponents, out)
    return out


@decode_op.register_fake
def _(kernels: str, codes: Tensor, exponents: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.bfloat16)


def _parts(operand: Operand | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if operand is None:
        return like.new_empty(0, dtype=_CODES), like.new_empty(0, dtype=torch.float32)
    return operand.codes, operand.scales


def _fake_operand(
    like: Tensor, codes: tuple[int, int], scales: tuple[int, int], wanted: bool
) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(codes if wanted else 0, dtype=_CODES),
        like.new_empty(scales if wanted else 0, dtype=torch.float32),
    )
