"""The verdict on a step, the same on every rank from one all-reduce: norm, clip factor, take it or not.

The sweep reads the answer where it is computed, on the device. The host reads it when everything
that the step launches has been launched, so a GPU never waits for the host.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fp8.config.refusals import naming
from ds_fp8.ops.reduction import NORM_PARTS, first_non_finite_block, norm_of
from ds_fp8.zero_fp8.comm.agreement import gather_objects
from ds_fp8.zero_fp8.comm.collectives import max_over_ranks, sum_over_ranks
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.gradients.reduced import ReducedGradient
from ds_fp8.zero_fp8.placement.partition import Piece

LARGEST = 2.0**40  # norm that a step takes, after clipping; beyond it sqrt(v) saturates


class Counted(NamedTuple):
    """A rank's report before a step: numbers that are added over ranks."""

    received: int = 0  # gradients that are in what was reduced
    late: int = 0  # parameters with a gradient that has not travelled; the step is tried again
    objections: int = 0  # the step is not taken
    edited: int = 0  # parameters with edits that the log has not named
    changed: int = 0  # 1 if a bucket was not full at its place in the schedule


class Verdict:
    """The norm and the counts of a step over all ranks, and what follows from them.

    control: [2] float32 on the device, as `ops.adam.adam_step` takes it. The same bits on every rank and
    backend, however many ranks share the gradient: what they add are integers (`ops.exact`).
    """

    def __init__(
        self,
        reduced: Sequence[ReducedGradient],
        counted: Sequence[bool],
        *,
        own: Counted,
        gradient_scale: float,  # from the reduced gradient as stored to the mean
        clip: float,  # largest norm of the mean; 0 = any
        ranks: Ranks,
    ) -> None:
        """counted: whether this rank's norm of each bucket is part of the norm, and not a peer's."""
        sums = _summed(list(_norm_parts(reduced, counted)), own, ranks)
        agreed = sums[NORM_PARTS:]
        non_finite, all_received, against = sums[NORM_PARTS - 1], agreed[0], agreed[1:3]
        norm = norm_of(sums[:NORM_PARTS]) * gradient_scale
        factor = clip_factor(norm, clip)
        go = (norm * factor <= LARGEST) & (non_finite == 0) & (all_received > 0) & (against == 0).all()
        self.control = torch.stack([factor * gradient_scale, go]).to(torch.float32)
        self._largest = math.inf if clip > 0 else LARGEST
        self._copy = torch.cat([norm[None], sums[NORM_PARTS - 1 :]]).to("cpu", non_blocking=True)
        self._arrived = None
        if sums.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> "Verdict":
        """Wait for the norm and the counts, over all ranks; before this only `control` is known."""
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, non_finite, *counts = self._copy.tolist()
        self.received, self.late, self.objections, self.edited, self.changed = Counted(*counts)
        self.norm = norm if non_finite == 0 and norm <= self._largest else math.inf
        return self


def _norm_parts(reduced: Sequence[ReducedGradient], counted: Sequence[bool]) -> Iterator[Tensor]:
    """Norm parts of every bucket; of a bucket that is counted on a peer only its non-finite counts."""
    for gradient, mine in zip(reduced, counted, strict=True):
        parts = gradient.norm_parts
        if parts is not None and mine:
            yield parts
        elif parts is not None:
            yield torch.cat([torch.zeros_like(parts[:-1]), parts[-1:]])


def _summed(norm_parts: Sequence[Tensor], counts: Sequence[int], ranks: Ranks) -> Tensor:
    """The norm's parts of all buckets and then the counts, [NORM_PARTS + counts] int64, over all ranks."""
    sums = torch.zeros(NORM_PARTS + len(counts), dtype=torch.int64, device=norm_parts[0].device)
    sums[:NORM_PARTS] = torch.stack(list(norm_parts)).sum(dim=0)
    for place, count in enumerate(counts, start=NORM_PARTS):
        sums[place].fill_(count)
    sum_over_ranks(sums, ranks)
    return sums


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """The factor that brings the norm, a 0-d float64, under the limit (0: none), in FP32 as in DeepSpeed."""
    if limit <= 0:
        return torch.ones_like(norm)
    factor = (limit / (norm + 1e-6)).to(torch.float32).to(torch.float64)
    return torch.where(norm + 1e-6 <= limit, 1.0, factor)


def non_finite_parameters(
    reduced: Sequence[tuple[ReducedGradient, Sequence[Piece]]],
    names: Mapping[int, str],
    ranks: Ranks,
    device: torch.device,
) -> str:
    """Names of the first parameters, in the model's order, whose gradient on any rank is not finite."""
    order = {index: place for place, index in enumerate(names)}
    flags = torch.zeros(len(order), dtype=torch.uint8, device=device)
    for gradient, pieces in reduced:
        for piece in pieces:
            if first_non_finite_block(gradient.blocks[piece.rows]) is not None:
                flags[order[piece.slot.parameter]] = 1
    max_over_ranks(flags, ranks.group)
    bad = [name for name, flag in zip(names.values(), flags.tolist(), strict=True) if flag]
    if ranks.peers is not None:  # whose parameters may be others
        bad = list(dict.fromkeys(name for found in gather_objects(bad, ranks.peers) for name in found))
    if not bad:
        return "no single parameter (their norm is beyond 2^40)"
    return naming(bad)
