"""FP8-LM's sum of gradients in FP8 (arXiv 2310.18313 section 2.1), as a ring of ranks makes it.

All ranks quantise a tensor with one scale, the largest that any of them needs, times a factor mu that trades
underflow for overflow (equations 3 to 5). A scale is then no power of two any more, and FP32. The sum is of
codes, rounded after every addition, and saturates where it leaves the range (equation 6): that is what a
reduce-scatter over float8 does, but for NCCL's intermediate sums in FP16, which round once more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, chunks, padded, power_of_two, scale_exponents, to_float32
from ds_fp8.ops.formats import Format
from ds_fp8.ops.health import count_gradient


def largest(values: Tensor) -> Tensor:
    """Largest magnitude of a tensor, 0-d float32; inf if one is not finite."""
    amax = values.abs().amax().to(torch.float32)
    return torch.where(amax.isnan(), torch.inf, amax)  # a maximum over ranks may pass over NaN


def inverse_scales(amax: Tensor, mu: Tensor, fmt: Format) -> Tensor:
    """The factors that bring tensors onto their codes, [n] float32, from their largest magnitudes and mu.

    mu times the power of two that `ops.blocks` scales with; 0 if the magnitude is not finite.
    """
    e = scale_exponents(amax[:, None], fmt)
    return mu * power_of_two(torch.where(amax.isfinite(), 254 - e, 0))


def quantize(values: Tensor, inverse: Tensor, out: Blocks, counts: Tensor | None = None) -> None:
    """Round a vector times `inverse`, 0-d float32, to nearest; values out of range, to the largest code.

    out: codes without scales. counts: as in `ops.blocks.quantize`.
    """
    size = out.block_size
    for part in chunks(len(out), size):
        piece = values[part.start * size : part.stop * size].to(torch.float32)
        rows = padded(piece, part.stop - part.start, size)
        out.codes[part].copy_(saturate((rows * inverse).nan_to_num(nan=0.0), out.format))
        if counts is not None:
            codes = to_float32(out.codes[part], out.format)
            counts += count_gradient(rows, codes, codes / inverse, out.format)


def ring_sum(pieces: Sequence[Blocks], out: Blocks) -> Tensor:
    """Add codes of one scale, in the order given, into `out`; return how many are at the largest code."""
    fmt = out.format
    saturated = torch.zeros((), dtype=torch.float64, device=out.codes.device)
    for part in chunks(len(out), out.block_size):
        total = pieces[0].codes[part]
        for piece in pieces[1:]:
            total = saturate(to_float32(total, fmt) + to_float32(piece.codes[part], fmt), fmt)
        out.codes[part].copy_(total)
        saturated += (to_float32(total, fmt).abs() == fmt.max).sum()
    return saturated


def saturate(values: Tensor, fmt: Format) -> Tensor:
    """float32 values rounded to codes, ties to even; values out of range, to the largest code."""
    return values.clamp(-fmt.max, fmt.max).to(fmt.dtype)
