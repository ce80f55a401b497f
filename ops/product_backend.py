"""Chooses the implementations that cast operands of products, encode their weights, and multiply.

The device decides, as for `ops.backend`, and DS_FP8_BACKEND overrides it: Triton on a GPU; on a CPU C++ for
the weights, which offload needs, and the reference for what only tests of training run there.

How to multiply is another choice, by name: `cublas` is fast and needs Hopper (`ops.cublas.obstacle`), where
`ops.hopper` launches it and the casts around it; `emulated` decodes and multiplies in FP32, on any device.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_fp8.ops import backend, cublas, products
from ds_fp8.ops.products import CastGradient, CastInput, Operand, Weight
from ds_fp8.ops.weight_runs import WeightRuns

logger = logging.getLogger("ds_fp8")

Multiply = Callable[[Operand, Operand, Tensor | None], Tensor]
# x, the weight, a bias, and whether the weight is transposed first: the product
MultiplyWeight = Callable[[Operand, Weight, Tensor | None, bool], Tensor]
# dy, the weight, x, which gradients are wanted, swapped: the wanted gradients of input, weight and bias; none
# if it cannot make them all
Differentiate = Callable[[Tensor, Weight, Operand | None, Sequence[bool], bool], list[Tensor]]


@dataclass(frozen=True)
class Products:
    """The functions of `ops.products` by one implementation, all but `multiply`."""

    name: str
    cast_input: Callable[..., CastInput]
    cast_gradient: Callable[..., CastGradient]
    transpose: Callable[[Tensor, Tensor], Operand]
    find_exponents: Callable[[Tensor, int, int, Tensor], None]
    encode_weight: Callable[..., None]
    decode_weight: Callable[[Tensor, Tensor, Tensor], None]
    expand: Callable[[Tensor, Tensor], Operand]
    weight_runs: Callable[..., WeightRuns] = WeightRuns  # of these functions, and runs
    multiply_weight: MultiplyWeight | None = None  # a product and what it needs of the weight, by one call
    differentiate: Differentiate | None = None  # a whole backward by one call, if there is one
    instead: str | None = None  # why this one runs although a faster one was wanted


REFERENCE = Products(
    name="reference",
    cast_input=products.cast_input,
    cast_gradient=products.cast_gradient,
    transpose=products.transpose,
    find_exponents=products.find_exponents,
    encode_weight=products.encode_weight,
    decode_weight=products.decode_weight,
    expand=products.expand,
)


MULTIPLY: dict[str, Multiply] = {"cublas": cublas.multiply, "emulated": products.multiply}


def by_way(name: str, functions: Products) -> tuple[Products, Multiply]:
    """The functions of a way to multiply, and its product; functions: of the device."""
    if name != "cublas":
        return functions, MULTIPLY["emulated"]
    from ds_fp8.ops.hopper import functions as hopper

    obstacle = hopper.obstacle()
    if obstacle is None:
        launched = replace(
            functions,
            cast_input=hopper.cast_input,
            cast_gradient=hopper.cast_gradient,
            transpose=hopper.transpose,
            expand=hopper.expand,
            multiply_weight=hopper.multiply_weight,
            differentiate=hopper.differentiate,
        )
        return launched, hopper.multiply
    logger.warning("FP8 products are launched from Python, which takes the host far longer: %s", obstacle)
    return functions, MULTIPLY["cublas"]


def choose(device: torch.device) -> Products:
    """The implementation for tensors on this device. Raises as `ops.backend.choose` does."""
    chosen = backend.choose(device)
    if chosen.name == REFERENCE.name:
        return replace(REFERENCE, instead=chosen.instead)
    return BUILT[chosen.name]()


def cpu_products() -> Products:
    """C++ for the weights."""
    from ds_fp8.ops.cpu import weight_tiles

    return replace(
        REFERENCE,
        name="cpu",
        find_exponents=weight_tiles.find_exponents,
        encode_weight=weight_tiles.encode_weight,
        decode_weight=weight_tiles.decode_weight,
    )


def triton_products() -> Products:
    """The Triton kernels; Triton is imported only here."""
    from ds_fp8.ops.triton.products import casts, runs, weights

    return Products(
        name="triton",
        cast_input=casts.cast_input,
        cast_gradient=casts.cast_gradient,
        transpose=weights.transpose,
        find_exponents=weights.find_exponents,
        encode_weight=weights.encode_weight,
        decode_weight=weights.decode_weight,
        expand=weights.expand,
        weight_runs=runs.WeightRuns,
    )


BUILT: dict[str, Callable[[], Products]] = {"cpu": cpu_products, "triton": triton_products}
