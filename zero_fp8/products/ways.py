"""The ways to multiply with an FP8 weight.

cublas     x and dy are cast, FP8 products.
emulated   the same casts, decoded and multiplied in FP32: the contract, `ops.products`.
decoded    the weight is decoded to BF16, one at a time; x and dy stay as they are.

The first two are one class that is given its kernels.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ds_fp8.zero_fp8.products import kernels
from ds_fp8.zero_fp8.products.kernels import Cast, Kernels, Right
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.shared_casts import SharedCasts

Saved = tuple[Tensor, ...]  # of x, for backward


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


class Way(Protocol):
    """`swapped`: the matrix is stored as [K, N]."""

    @property
    def name(self) -> str: ...

    def forward(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, Saved]:
        """y, [tokens, N] bfloat16; x: [..., K], of any dtype; bias: [N] bfloat16."""
        ...

    def backward(self, dy: Tensor, saved: Saved, matrix: Matrix, *, needs: Needs, swapped: bool) -> Gradients:
        """dy: [tokens, N] bfloat16, contiguous."""
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
        weight = self._transposed(matrix) if swapped else _as_stored(matrix)
        y = kernels.multiply(self.kernels, cast.forward, weight, bias)
        return y[: x.numel() // x.shape[-1]], cast.wgrad if wgrad and cast.wgrad is not None else ()

    def backward(self, dy: Tensor, saved: Saved, matrix: Matrix, *, needs: Needs, swapped: bool) -> Gradients:
        if not torch.compiler.is_compiling():
            self.casts.clear()
        cast = kernels.cast_gradient(self.kernels, dy, dgrad=needs.input, wgrad=needs.weight, bias=needs.bias)
        if matrix.counts is not None:
            matrix.counts.of_gradient(dy, cast)
        dx = dw = None
        if cast.dgrad is not None:
            weight = _as_stored(matrix) if swapped else self._transposed(matrix)
            dx = kernels.multiply(self.kernels, cast.dgrad, weight)[: len(dy)]
        if cast.wgrad is not None:
            dw = kernels.multiply(self.kernels, cast.wgrad, Right(*saved))
            dw = dw.t().contiguous() if swapped else dw
        return Gradients(dx, dw, None if cast.bias is None else cast.bias.to(torch.bfloat16))

    def _transposed(self, matrix: Matrix) -> Right:
        return Right(kernels.transpose(self.kernels, matrix.codes), matrix.transposed_scales)

    def _cast(self, x: Tensor, matrix: Matrix, wgrad: bool) -> Cast:
        """Common subexpressions are found by the compiler, if there is one, whose graphs count nothing."""
        if torch.compiler.is_compiling():
            return kernels.cast_input(self.kernels, _flat(x), wgrad=wgrad)
        cast = self.casts.of(x, wgrad, lambda: kernels.cast_input(self.kernels, _flat(x), wgrad=wgrad))
        if matrix.counts is not None and wgrad:
            matrix.counts.of_input(_flat(x), cast.forward)
        return cast


class DecodedProducts:
    """BF16 products of a weight that is decoded for each."""

    name = "decoded"

    def forward(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, Saved]:
        flat, weight = _flat(x), matrix.values()
        y = functional.linear(flat, weight.t() if swapped else weight, bias)
        return y, (flat,) if wgrad else ()

    def backward(self, dy: Tensor, saved: Saved, matrix: Matrix, *, needs: Needs, swapped: bool) -> Gradients:
        dx = dw = None
        if needs.input:
            weight = matrix.values()
            dx = dy @ (weight.t() if swapped else weight)
        if needs.weight:
            dw = saved[0].t() @ dy if swapped else dy.t() @ saved[0]
        return Gradients(dx, dw, dy.sum(0) if needs.bias else None)


def _as_stored(matrix: Matrix) -> Right:
    return Right(matrix.codes, matrix.scales)


def _flat(x: Tensor) -> Tensor:
    """[tokens, K] bfloat16, contiguous."""
    return x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
