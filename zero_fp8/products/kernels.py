"""The functions that cast, multiply and decode a product's operands, as one value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fp8.ops import product_backend, products
from ds_fp8.ops.product_backend import Products
from ds_fp8.ops.products import CastGradient, Operand

_known: dict[str, "Kernels"] = {}


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


def named(name: str) -> Kernels:
    """Those of a name: a custom op takes names, not functions."""
    return _known[name]


class Needs(NamedTuple):
    """Of what a gradient is wanted."""

    input: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """None where none is wanted."""

    input: Tensor | None  # [tokens, K] bfloat16
    weight: Tensor | None  # as the matrix is stored, bfloat16
    bias: Tensor | None  # [N] bfloat16


def differentiate(
    kernels: Kernels,
    dy: Tensor,
    weight: Operand,
    x: Operand | None,
    needs: Needs,
    swapped: bool,
    count: Callable[[CastGradient], None] | None = None,
) -> Gradients:
    """The gradients of a product for dy, [tokens, N] bfloat16, contiguous.

    weight: the codes as they are stored, and the scales of the right side of dgrad. x: of `cast_input`, if
    the weight's gradient is wanted. swapped: the weight is stored as [K, N]. count: gets the cast of dy.
    """
    cast = kernels.cast_gradient(dy, dgrad=needs.input, wgrad=needs.weight, bias=needs.bias)
    if count is not None:
        count(cast)
    dx = dw = None
    if cast.dgrad is not None:
        right = weight if swapped else Operand(kernels.transpose(weight.codes), weight.scales)
        dx = kernels.multiply(cast.dgrad, right, None)
        dx = dx if len(dx) == len(dy) else dx[: len(dy)]
    if cast.wgrad is not None and x is not None:
        dw = kernels.multiply(cast.wgrad, x, None)
        dw = dw.t().contiguous() if swapped else dw
    return Gradients(dx, dw, None if cast.bias is None else cast.bias.to(torch.bfloat16))


def decode(kernels: Kernels, codes: Tensor, exponents: Tensor) -> Tensor:
    """The values of a weight, bfloat16."""
    out = codes.new_empty(codes.shape, dtype=torch.bfloat16)
    kernels.decode_weight(codes, exponents, out)
    return out
