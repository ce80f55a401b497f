"""What one all-reduce tells every rank about a step: norm, clip factor, take it or not.

The sweep reads the answer where it is computed, on the device. The host reads it when everything
that the step launches has been launched, so a GPU never waits for the host.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_fp8.config.refusals import naming
from ds_fp8.ops.reduction import NORM_PARTS, first_non_finite_block, norm_square
from ds_fp8.zero_fp8.comm.collectives import max_over_ranks, sum_over_ranks
from ds_fp8.zero_fp8.states.shard import Shard

LARGEST = 2.0**40  # norm that a step takes, after clipping; beyond it sqrt(v) saturates


class Verdict:
    """The figures of a step over all ranks, and what follows from them.

    control: [2] float32 on the device, as `ops.adam.adam_step` takes it. The same bits on every rank and
    backend, however many ranks share the gradient: what they add are integers (`ops.exact`).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        taken: int,  # gradients that this rank put into the shards
        late: int,  # gradients of this rank that have not travelled yet; the step waits for them
        objections: Sequence[str | None],  # of this rank; the step is not taken
        edited: int,  # parameters of this rank whose values are not their masters'
        gradient_scale: float,  # from the reduced gradient as stored to the mean
        clip: float,  # largest norm of the mean; 0 = any
        group: ProcessGroup,
    ) -> None:
        reduced = [shard.figures for shard in shards if shard.figures is not None]
        counts = [taken, late, sum(each is not None for each in objections), edited]
        told = torch.zeros(NORM_PARTS + len(counts), dtype=torch.int64, device=reduced[0].device)
        told[:NORM_PARTS] = torch.stack(reduced).sum(dim=0)
        for place, count in enumerate(counts, start=NORM_PARTS):
            told[place].fill_(count)
        sum_over_ranks(told, group)
        sums = told[NORM_PARTS:]
        non_finite, all_taken, waiting = told[NORM_PARTS - 1], sums[0], sums[1:3]
        norm = norm_square(told[:NORM_PARTS]).sqrt() * gradient_scale
        factor = clip_factor(norm, clip)
        go = (norm * factor <= LARGEST) & (non_finite == 0) & (all_taken > 0) & (waiting == 0).all()
        self.control = torch.stack([factor * gradient_scale, go]).to(torch.float32)
        self._largest = math.inf if clip > 0 else LARGEST
        self._figures = torch.cat([norm[None], told[NORM_PARTS - 1 :]]).to("cpu", non_blocking=True)
        self._arrived = None
        if told.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> "Verdict":
        """Wait for the figures; before this only `control` is known."""
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, non_finite, self.taken, self.late, self.objections, self.edited = self._figures.tolist()
        self.norm = norm if non_finite == 0 and norm <= self._largest else math.inf
        return self


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What brings the norm, a 0-d float64, under the limit (0: none), as DeepSpeed computes it: in FP32."""
    if limit <= 0:
        return torch.ones_like(norm)
    factor = (limit / (norm + 1e-6)).to(torch.float32).to(torch.float64)
    return torch.where(norm + 1e-6 <= limit, 1.0, factor)


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
        return "no single parameter (their norm is beyond 2^40)"
    return naming(bad)
