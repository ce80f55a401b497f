"""What one all-reduce tells every rank about the reduced gradient: norm, clip factor, skip or not."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch.distributed import ProcessGroup

from ds_fp8.ops.reduction import first_non_finite_block, sum_of_squares
from ds_fp8.zero_fp8.comm import max_over_ranks, sum_over_ranks
from ds_fp8.zero_fp8.optimizer import Shard

NAMED = 3  # parameters that a message names


def reduced_norm(shards: Sequence[Shard], taken: int, group: ProcessGroup) -> float:
    """2-norm of the gradients as stored, over all ranks; inf where a value is not finite.

    taken: how many gradients this rank put into them. Raises RuntimeError where no rank had any.
    """
    figures = torch.stack([sum_of_squares(shard.gradient) for shard in shards]).sum(dim=0)
    figures = torch.cat([figures, figures.new_tensor([taken])])
    sum_over_ranks(figures, group)
    squares, non_finite, gradients = figures.tolist()
    if not gradients:
        raise RuntimeError(
            "step() without a gradient: no parameter that the optimizer trains received one on any rank. "
            "Were the model's parameters replaced after deepspeed.initialize, say by "
            "load_state_dict(assign=True)?"
        )
    if non_finite or not math.isfinite(squares):
        return math.inf
    return math.sqrt(squares)


def clip_factor(norm: float, limit: float) -> float:
    """What brings the norm under the limit (0: none), as DeepSpeed computes it.

    Rounded to FP32, so that the order of summation at a world size does not show.
    """
    if limit <= 0 or norm + 1e-6 <= limit:
        return 1.0
    return float(torch.tensor(limit / (norm + 1e-6), dtype=torch.float32))


def non_finite_parameters(shards: Sequence[Shard], names: Mapping[int, str], group: ProcessGroup) -> str:
    """Names of the first parameters, in the model's order, whose gradient on any rank is not finite."""
    order = {index: place for place, index in enumerate(names)}
    found = torch.zeros(len(order), dtype=torch.uint8, device=shards[0].gradient.codes.device)
    for shard in shards:
        for piece in shard.pieces:
            if first_non_finite_block(shard.gradient[piece.rows]) is not None:
                found[order[piece.slot.parameter]] = 1
    max_over_ranks(found, group)
    bad = [name for name, flag in zip(names.values(), found.tolist(), strict=True) if flag]
    if not bad:
        return "no single parameter (the sum of squares overflows)"
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return ", ".join(bad[:NAMED]) + more
