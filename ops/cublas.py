"""FP8 products on Hopper: `multiply` of `ops.products` by cuBLAS, whose block scales are DeepSeek-V3's.

It adds up 128 products in the tensor cores, promotes the sum to FP32 and scales it there, never with fast
accumulation. Which scales it is given shows in their shapes: rows of 128 elements, or tiles.

It reads scales of rows [tiles(inner), rows], and of tiles with the inner dimension padded to a multiple of
four: the strides of `Operand.scales` must say that they lie so. Nothing is copied.
"""

from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from ds_fp8.ops import cublas_lt
from ds_fp8.ops.cublas_lt import Plan, Shape
from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.products import TOKENS, Operand, scale_shape, tiles

CAPABILITY = (9, 0)
OLDEST_CUDA = Version("12.9")
ALIGNMENT, LEAST_ALIGNMENT = 256, 16  # bytes of an address: what cuBLAS makes use of, and what it needs
PLANS = 4096  # that are kept


def obstacle(device: torch.device) -> str | None:
    """Why cuBLAS cannot multiply with block scales on this device; None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cuBLAS needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, needed is 9.0 (H100, H200)"
    if torch.version.cuda is None or Version(torch.version.cuda) < OLDEST_CUDA:
        return f"torch was built with CUDA {torch.version.cuda}, needed is {OLDEST_CUDA} or later"
    if cublas_lt.find_library() is None:
        return "the library of cuBLASLt cannot be loaded by its name"
    return None


def multiply(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """`ops.products.multiply`.

    Raises:
        ValueError: operands that do not lie as cuBLAS reads them.
        RuntimeError: cuBLAS has no algorithm for their shapes.
    """
    if not left.codes.numel():  # no tokens
        return left.codes.new_zeros(len(left.codes), len(right.codes), dtype=torch.bfloat16)
    if bias is not None and bias.data_ptr() % LEAST_ALIGNMENT:
        bias = bias.clone()
    plan = plan_of(left, right, bias)
    return plan(left.codes, left.scales, right.codes, right.scales, bias)


def plan_of(left: Operand, right: Operand, bias: Tensor | None) -> Plan:
    """The plan for operands that lie like these; raises as `multiply` does."""
    operands = left.codes, left.scales, right.codes, right.scales
    layout = None if bias is None else Layout.of(bias)
    return _plan(*map(Layout.of, operands), layout, _alignment(*operands))


class Layout(NamedTuple):
    """All of a tensor but its elements and its address."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _alignment(*tensors: Tensor) -> int:
    """Bytes that divide all addresses, as far as it matters."""
    together = reduce(or_, (each.data_ptr() for each in tensors), ALIGNMENT)
    return together & -together  # its last bit


@lru_cache(PLANS)
def _plan(
    left: Layout,
    left_scales: Layout,
    right: Layout,
    right_scales: Layout,
    bias: Layout | None,
    alignment: int,
) -> Plan:
    """Each check is made once for all products of the same shapes and strides."""
    (rows, inner), columns, device = left.shape, right.shape[0], left.device
    in_tiles = right_scales.shape[0] != columns
    whole = scale_shape(columns, inner)
    lying: list[tuple[str, Layout, torch.dtype, tuple[int, ...], tuple[int, ...]]] = [
        ("left", left, E4M3.dtype, (rows, inner), (inner, 1)),
        ("left scales", left_scales, torch.float32, (rows, tiles(inner)), (1, rows)),
        ("right", right, E4M3.dtype, (columns, inner), (inner, 1)),
        (
            "right scales",
            right_scales,
            torch.float32,
            whole if in_tiles else (columns, tiles(inner)),
            (whole[1], 1) if in_tiles else (1, columns),
        ),
    ]
    if bias is not None:
        lying.append(("bias", bias, torch.bfloat16, (columns,), (1,)))
    for name, received, dtype, shape, strides in lying:
        allowed = Layout(torch.Size(shape), strides, dtype, device)
        if received != allowed:
            raise ValueError(f"{name}: received {_words(received)}; allowed: {_words(allowed)}")
    if any(each % TOKENS for each in (rows, inner, columns)) or alignment < LEAST_ALIGNMENT:
        raise ValueError(
            f"a product of {rows} x {inner} with {columns} x {inner} at addresses that are multiples of "
            f"{alignment}: allowed are multiples of {TOKENS}"
        )
    return Plan(Shape(rows, columns, inner, in_tiles, bias is not None, alignment), device)


def _words(layout: Layout) -> str:
    return f"shape {tuple(layout.shape)} and strides {layout.strides} of {layout.dtype} on {layout.device}"
