"""FP8 products on Hopper, each cast, transpose and product launched by one call of C++.

Triton's and cuBLASLt's own calls in Python take the host as long as the GPU takes for small products. So C++
launches what has been launched before (`launches.cpp`); a call of a new kind goes to `ops.triton.products`
or `ops.cublas`, which check it, and what they compiled or planned is handed over.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_fp8.ops import cublas, cublas_lt
from ds_fp8.ops.hopper import build
from ds_fp8.ops.products import CastGradient, CastInput, Operand, Weight, padded_tokens, scale_shape
from ds_fp8.ops.triton.launching import ALIGNMENT, latest
from ds_fp8.ops.triton.products import casts, weights

LAUNCHES = torch.ops.ds_fp8_launches  # a call of an overload, `.default`, needs not search for it
NOTHING, ROWS, TILES = range(3)  # how transposed codes are scaled
LARGEST = 2**31 - 1 - 16  # of a size, which a kernel takes as 32 bits


def obstacle() -> str | None:
    """Why C++ cannot launch products; None if it can. Builds the library if it is not there."""
    found = build.load()
    if found is None:
        driver, library = ctypes.CDLL("libcuda.so.1"), cublas_lt.find_library()
        assert library is not None
        functions = (
            driver.cuLaunchKernel,
            driver.cuCtxGetCurrent,
            library.cublasLtMatmulDescSetAttribute,
            library.cublasLtMatmul,
        )
        LAUNCHES.start.default([ctypes.cast(each, ctypes.c_void_p).value for each in functions])
    return found


def cast_input(x: Tensor, *, wgrad: bool) -> CastInput:
    """`ops.products.cast_input`."""
    found = LAUNCHES.cast.default(x, True, TILES if wgrad else NOTHING, False, _stream(x))
    if found:
        return CastInput(Operand(*found[:2]), Operand(*found[2:]) if wgrad else None)
    cast = casts.cast_input(x, wgrad=wgrad)
    _learn_cast(x, True, TILES if wgrad else NOTHING, False)
    return cast


def cast_gradient(dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool) -> CastGradient:
    """`ops.products.cast_gradient`."""
    found = LAUNCHES.cast.default(dy, dgrad, ROWS if wgrad else NOTHING, bias, _stream(dy))
    if found:
        rows = Operand(*found[:2]) if dgrad else None
        turned = Operand(*found[2 * dgrad :][:2]) if wgrad else None
        return CastGradient(rows, turned, found[-1] if bias else None)
    cast, parts = casts.cast_and_sum_tiles(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)
    _learn_cast(dy, dgrad, ROWS if wgrad else NOTHING, bias)
    if parts is None:
        return cast
    sums = casts.sum_parts(parts)
    if _is_usual(parts, parts.shape[1]):
        _learn(parts, LAUNCHES.sum_kind.default())
    return replace(cast, bias=sums)


def transpose(codes: Tensor, exponents: Tensor) -> Operand:
    """`ops.products.transpose`."""
    found = LAUNCHES.transpose.default(codes, exponents, _stream(codes))
    if found:
        return Operand(*found)
    turned = weights.transpose(codes, exponents)
    if _is_usual(codes, *codes.shape):
        groups = turned.scales.shape[1]
        _learn(codes, LAUNCHES.transpose_kind.default(exponents.data_ptr(), groups))
    return turned


def expand(codes: Tensor, exponents: Tensor) -> Operand:
    """`ops.products.expand`."""
    found = LAUNCHES.expand.default(codes, exponents, _stream(codes))
    if found:
        return Operand(codes, found[0])
    expanded = weights.expand(codes, exponents)
    _learn(codes, LAUNCHES.expand_kind.default(exponents.data_ptr()))
    return expanded


def multiply(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """`ops.products.multiply`, as `ops.cublas` has it."""
    operands = left.codes, left.scales, right.codes, right.scales
    found = LAUNCHES.multiply.default(*operands, bias, _stream(left.codes))
    if found:
        return found[0]  # type: ignore[no-any-return]
    product = cublas.multiply(left, right, bias)
    if left.codes.numel():
        LAUNCHES.add_plan.default(*cublas.plan_of(left, right, bias).copy().described())
    return product


def multiply_weight(x: Operand, weight: Weight, bias: Tensor | None, swapped: bool) -> Tensor:
    """`ops.product_backend.MultiplyWeight`."""
    found = LAUNCHES.multiply_weight.default(x.codes, x.scales, *weight, bias, swapped, _stream(x.codes))
    if found:
        return found[0]  # type: ignore[no-any-return]
    return multiply(x, transpose(*weight) if swapped else expand(*weight), bias)


def differentiate(
    dy: Tensor, weight: Weight, x: Operand | None, needs: Sequence[bool], swapped: bool
) -> list[Tensor]:
    """`ops.product_backend.Differentiate`."""
    codes, scales = (None, None) if x is None else (x.codes, x.scales)
    found: list[Tensor] = LAUNCHES.differentiate.default(
        dy, *weight, codes, scales, *needs, swapped, _stream(dy)
    )
    return found


def _learn_cast(values: Tensor, rows: bool, turned: int, sums: bool) -> None:
    """Hand a cast's kernel over that has just run."""
    tokens, features = values.shape
    if tokens and _is_usual(values, features, values.stride(0)):
        groups = scale_shape(features, padded_tokens(tokens))[1]
        kind = LAUNCHES.cast_kind.default(rows, turned, sums, groups)
        _learn(values, kind)


def _is_usual(tensor: Tensor, *sizes: int) -> bool:
    """Whether Triton compiled for an address and sizes that `launches.cpp` takes."""
    return all(each % ALIGNMENT == 0 for each in (tensor.data_ptr(), *sizes)) and max(sizes) < LARGEST


def _learn(given: Tensor, kind: int) -> None:
    """The kernel that was launched last is of this kind."""
    compiled = latest()
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    LAUNCHES.add_kernel.default(given.get_device(), kind, compiled.function, threads, shared)


def _stream(tensor: Tensor) -> int:
    stream: int = torch._C._cuda_getCurrentRawStream(tensor.get_device())
    return stream
