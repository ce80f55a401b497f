"""Health: what rounding does to a run, counted by the ops while the values are at hand.

An op that is given a vector of counts adds to it; without one it does nothing more than its work. Counts are
of single values, in float64, so that they add up over ops, shards and ranks.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ds_fp8.ops.formats import Format


@dataclass(frozen=True)
class GradientCounts:
    """What `ops.blocks.quantize` adds to a vector, in this order; a block that is not finite is only that."""

    underflows: float  # values that are not zero and whose code is
    saturated: float  # values at the largest code
    not_finite: float  # blocks that hold inf or NaN
    signal: float  # sum of the squares of the values
    noise: float  # sum of the squares of what rounding changed


@dataclass(frozen=True)
class StateCounts:
    """What `ops.adam.adam_step` adds to a vector, in this order."""

    clamped: float  # exp_avg beyond what exact Adam obeys
    underflows: float  # exp_avg that is not zero and whose code is
    zeros: float  # exp_avg_sq that nearest rounding takes to zero; a root, unlike v itself, is kept from it


GRADIENT_COUNTS, STATE_COUNTS = len(fields(GradientCounts)), len(fields(StateCounts))


def count_gradient(values: Tensor, codes: Tensor, decoded: Tensor, fmt: Format) -> Tensor:
    """`GradientCounts` of rows of values, their unscaled codes and what these decode to, all float32."""
    finite = values.isfinite().all(dim=1, keepdim=True)
    x = torch.where(finite, values, 0.0).to(torch.float64)
    error = torch.where(finite, x - decoded.to(torch.float64), 0.0)
    counts = (
        (x.bool() & ~codes.bool()).sum(),
        (finite & (codes.abs() == fmt.max)).sum(),
        (~finite).sum(),
        x.square().sum(),
        error.square().sum(),
    )
    return torch.stack([each.to(torch.float64) for each in counts])
