"""The ways to multiply with an FP8 weight.

cublas     x and dy are cast, FP8 products.
emulated   the same casts, decoded and multiplied in FP32: the contract, `ops.products`.
decoded    the weight is decoded to BF16, one at a time; x and dy stay as they are.

The first two are one class that is given its kernels. Under torch.compile the kernels are custom ops.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ds_fp8.ops.products import CastInput, Operand, weight_operand
from ds_fp8.zero_fp8.products.kernels import Kernels, traced
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.shared_casts import SharedCasts


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
        self, x: Tensor, matrix: Matrix, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y, [tokens, N] bfloat16, and what backward needs of x; x: [..., K], of any dtype."""
        ...

    def backward(
        self, dy: Tensor, saved: tuple[Tensor, ...], matrix: Matrix, *, needs: Needs, swapped: bool
    ) -> Gradients:
        """dy: [tokens, N] bfloat16, contiguous."""
        ...


class FP8Products:
    """Products of codes; its kernels cast and multiply."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.name = name
        self._eager = kernels
        self._traced = traced(kernels)
        self.casts = SharedCasts()

    def forward(
        self, x: Tensor, matrix: Matrix, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        cast = self._cast(x, wgrad)
        weight = _transposed(matrix, self._kernels) if swapped else _as_stored(matrix)
        y = _apart_from_autocast(self._kernels.multiply, cast.forward, weight)
        saved = cast.wgrad if wgrad else None
        return y[: x.numel() // x.shape[-1]], () if saved is None else (saved.codes, saved.scales)

    def backward(
        self, dy: Tensor, saved: tuple[Tensor, ...], matrix: Matrix, *, needs: Needs, swapped: bool
    ) -> Gradients:
        if not torch.compiler.is_compiling():
            self.casts.clear()
        kernels = self._kernels
        cast = kernels.cast_gradient(dy, dgrad=needs.input, wgrad=needs.weight, bias=needs.bias)
        dx = dw = None
        if cast.dgrad is not None:
            weight = _as_stored(matrix) if swapped else _transposed(matrix, kernels)
            dx = _apart_from_autocast(kernels.multiply, cast.dgrad, weight)[: len(dy)]
        if cast.wgrad is not None:
            dw = _apart_from_autocast(kernels.multiply, cast.wgrad, Operand(*saved))
            dw = dw.t().contiguous() if swapped else dw
        return Gradients(dx, dw, None if cast.bias is None else cast.bias.to(torch.bfloat16))

    @property
    def _kernels(self) -> Kernels:
        return self._traced if torch.compiler.is_compiling() else self._eager

    def _cast(self, x: Tensor, wgrad: bool) -> CastInput:
        """Common subexpressions are found by the compiler, if there is one."""
        if torch.compiler.is_compiling():
            return self._traced.cast_input(_flat(x), wgrad=wgrad)
        return self.casts.of(x, wgrad, lambda: self._eager.cast_input(_flat(x), wgrad=wgrad))


class DecodedProducts:
    """BF16 products of a weight that is decoded for each."""

    name = "decoded"

    def forward(
        self, x: Tensor, matrix: Matrix, *, swapped: bool, wgrad: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        flat, weight = _flat(x), matrix.values()
        y = flat @ weight if swapped else functional.linear(flat, weight)
        return y, (flat,) if wgrad else ()

    def backward(
        self, dy: Tensor, saved: tuple[Tensor, ...], matrix: Matrix, *, needs: Needs, swapped: bool
    ) -> Gradients:
        dx = dw = None
        if needs.input:
            weight = matrix.values()
            dx = functional.linear(dy, weight) if swapped else dy @ weight
        if needs.weight:
            dw = saved[0].t() @ dy if swapped else dy.t() @ saved[0]
        return Gradients(dx, dw, dy.sum(0) if needs.bias else None)


def _as_stored(matrix: Matrix) -> Operand:
    return weight_operand(matrix.codes, matrix.scales)


def _transposed(matrix: Matrix, kernels: Kernels) -> Operand:
    """The codes are transposed for one product and dropped after it."""
    return weight_operand(kernels.transpose(matrix.codes), matrix.transposed_scales)


def _flat(x: Tensor) -> Tensor:
    """[tokens, K] bfloat16, contiguous."""
    return x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()


def _apart_from_autocast(
    multiply: Callable[[Operand, Operand], Tensor], left: Operand, right: Operand
) -> Tensor:
    """An FP32 product stays one."""
    device = left.codes.device.type
    if not torch.is_autocast_enabled(device):
        return multiply(left, right)
    with torch.autocast(device, enabled=False):
        return multiply(left, right)
