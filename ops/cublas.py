"""FP8 products on Hopper: `multiply` of `ops.products` by cuBLAS, whose block scales are DeepSeek-V3's.

It adds up 128 products in the tensor cores, promotes the sum to FP32 and scales it there, never with fast
accumulation. Which scales it is given shows in their shapes: rows of 128 elements, or tiles.

It reads scales of rows [tiles(inner), rows], and of tiles with the inner dimension padded to a multiple of
four: the strides of `Operand.scales` must say that they lie so. Nothing is copied.
"""

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from ds_fp8.ops.products import Operand, scale_shape, tiles

CAPABILITY = (9, 0)
OLDEST_CUDA = Version("12.9")


def obstacle(device: torch.device) -> str | None:
    """Why cuBLAS cannot multiply with block scales on this device; None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cuBLAS needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, needed is 9.0 (H100, H200)"
    if torch.version.cuda is None or Version(torch.version.cuda) < OLDEST_CUDA:
        return f"torch was built with CUDA {torch.version.cuda}, needed is {OLDEST_CUDA} or later"
    return None


def multiply(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """`ops.products.multiply`. Raises ValueError for scales that do not lie as cuBLAS reads them."""
    (rows, inner), columns = left.codes.shape, right.codes.shape[0]
    if not rows or not inner:  # no tokens
        return left.codes.new_zeros(rows, columns, dtype=torch.bfloat16)
    in_tiles = len(right.scales) != columns
    left_scales = _of_rows("left", left)
    right_scales = _of_tiles("right", right) if in_tiles else _of_rows("right", right)
    return F.scaled_mm(
        left.codes,
        right.codes.t(),
        left_scales,
        F.ScalingType.BlockWise1x128,
        right_scales.t() if in_tiles else right_scales,
        F.ScalingType.BlockWise128x128 if in_tiles else F.ScalingType.BlockWise1x128,
        bias=bias,
        output_dtype=torch.bfloat16,
        use_fast_accum=False,
    )


def _of_rows(name: str, operand: Operand) -> Tensor:
    """[rows, tiles(inner)]."""
    scales, (rows, inner) = operand.scales, operand.codes.shape
    _check(name, scales, (rows, tiles(inner)), (1, rows))
    return scales


def _of_tiles(name: str, operand: Operand) -> Tensor:
    """[tiles(rows), padded tiles(inner)]: also what lies behind the operand's view of them."""
    scales, (rows, inner) = operand.scales, operand.codes.shape
    whole = scale_shape(rows, inner)
    _check(name, scales, (tiles(rows), tiles(inner)), (whole[1], 1))
    return scales.as_strided(whole, (whole[1], 1))


def _check(name: str, scales: Tensor, shape: tuple[int, int], strides: tuple[int, int]) -> None:
    if (*scales.shape, *scales.stride()) != (*shape, *strides):
        raise ValueError(
            f"{name}: received scales of shape {tuple(scales.shape)} and strides {scales.stride()}, allowed: "
            f"shape {shape} and strides {strides}"
        )
