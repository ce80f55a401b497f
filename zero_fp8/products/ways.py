"""The ways to multiply with an FP8 weight.

cublas     x and dy are cast, FP8 products.
emulated   the same casts, decoded and multiplied in FP32: the contract, `ops.products`.
decoded    the weight is decoded to BF16, one at a time; x and dy stay as they are.

The first two are one class with different kernels.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ds_fp8.ops.capture import captured
from ds_fp8.ops.products import CastInput, Operand, Weight
from ds_fp8.zero_fp8.products import kernels
from ds_fp8.zero_fp8.products.kernels import Gradients, Kernels, Needs, in_graph
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.shared_casts import SharedCasts

Saved = tuple[Tensor, ...]  # of x, for backward


class Way(Protocol):
    """A way to multiply. `swapped`: the matrix is stored as [K, N]."""

    @property
    def name(self) -> str: ...

    def forward(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, Saved]:
        """Return y, [tokens, N] bfloat16; x: [..., K], of any dtype; bias: [N] bfloat16."""
        ...

    def backward(
        self, dy: Tensor, saved: Saved, matrix: Matrix, codes: Tensor, *, needs: Needs, swapped: bool
    ) -> Gradients:
        """Return gradients. dy: [tokens, N] bfloat16, contiguous; codes: current, or saved by a graph."""
        ...


class FP8Products:
    """Products of codes; its kernels cast and multiply."""

    def __init__(self, name: str, functions: Kernels) -> None:
        self.name = name
        self.casts = SharedCasts()
        self.kernels = functions

    def forward(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, Saved]:
        cast = self._cast(x, matrix, wgrad)
        weight = Weight(matrix.codes, matrix.exponents)
        y = kernels.multiply(self.kernels, cast.forward, weight, bias, swapped)
        tokens = x.numel() // x.shape[-1]
        if in_graph() or len(y) != tokens:  # one graph serves any number of tokens
            y = y[:tokens]
        saved = (cast.wgrad.codes, cast.wgrad.scales) if wgrad and cast.wgrad is not None else ()
        return y, saved

    def backward(
        self, dy: Tensor, saved: Saved, matrix: Matrix, codes: Tensor, *, needs: Needs, swapped: bool
    ) -> Gradients:
        count = None
        if not in_graph():
            self.casts.clear()
            if matrix.counts is not None and not captured(dy):
                count = partial(matrix.counts.of_gradient, dy)
        weight = Weight(codes, matrix.exponents)
        x = Operand(*saved) if needs.weight else None
        return kernels.differentiate(self.kernels, dy, weight, x, needs, swapped, count)

    def _cast(self, x: Tensor, matrix: Matrix, wgrad: bool) -> CastInput:
        """Cast x. A compiler finds common casts itself, and its ops count when they run."""

        def make() -> CastInput:
            return kernels.cast_input(self.kernels, _flat(x), wgrad=wgrad)

        if in_graph():
            return make()
        cast = self.casts.of(x, wgrad, make, aliases=matrix.travels)
        if matrix.counts is not None and wgrad and not captured(x):
            matrix.counts.of_input(_flat(x), cast.forward)
        return cast


class DecodedProducts:
    """BF16 products of a weight that is decoded for each product."""

    name = "decoded"

    def forward(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, Saved]:
        flat, weight = _flat(x), matrix.values()
        y = functional.linear(flat, weight.t() if swapped else weight, bias)
        return y, (flat,) if wgrad else ()

    def backward(
        self, dy: Tensor, saved: Saved, matrix: Matrix, codes: Tensor, *, needs: Needs, swapped: bool
    ) -> Gradients:
        dx = dw = None
        if needs.input:
            weight = matrix.values(codes)
            dx = dy @ (weight.t() if swapped else weight)
        if needs.weight:
            dw = saved[0].t() @ dy if swapped else dy.t() @ saved[0]
        return Gradients(dx, dw, dy.sum(0) if needs.bias else None)


def way_of(name: str, kernels: Kernels) -> Way:
    """Return a way without state."""
    return DecodedProducts() if name == DecodedProducts.name else FP8Products(name, kernels)


def _flat(x: Tensor) -> Tensor:
    """Return x as [tokens, K] bfloat16, contiguous."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat.to(torch.bfloat16).contiguous()
