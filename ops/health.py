"""Health: what rounding does to a run, counted by the ops while the values are at hand.

An op that is given a vector of counts adds to it; without one it counts nothing. Counts are numbers of single
values, in float64, so that they add up over ops, shards and ranks.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ds_fp8.ops.formats import Format


@dataclass(frozen=True)
class GradientCounts:
    """The counts that `ops.blocks.quantize` adds to a vector, in this order.

    A block with inf or NaN counts in `not_finite` only.
    """

    underflows: float  # non-zero values whose code is zero
    saturated: float  # values at the largest code
    not_finite: float  # blocks that hold inf or NaN
    signal: float  # sum of the squares of the values
    noise: float  # sum of the squares of what rounding changed


@dataclass(frozen=True)
class StateCounts:
    """The counts that `ops.adam.adam_step` adds to a vector, in this order."""

    clamped: float  # exp_avg beyond exact Adam's bound
    underflows: float  # non-zero exp_avg whose code is zero
    # Non-zero exp_avg_sq whose rounding gives zero: of a root the stochastic draw, before it is kept from 0
    # (`ops.rounding.round_up_from_zero`); of v itself, if that is stored, nearest rounding.
    zeros: float


GRADIENT_COUNTS, STATE_COUNTS = len(fields(GradientCounts)), len(fields(StateCounts))


def count_gradient(values: Tensor, codes: Tensor, decoded: Tensor, fmt: Format) -> Tensor:
    """`GradientCounts` of rows; values, their codes without scale and the decoded values are float32."""
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
    return torch.stack([count.to(torch.float64) for count in counts])
