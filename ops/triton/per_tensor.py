"""One scale per tensor on a GPU: `ops.per_tensor` as two sweeps, one that measures and one that writes.

Between them torch takes the largest magnitude of each tensor's rows, on the device: nothing waits for the
host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_fp8.ops.adam import Segment, Sweep
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.guards import check_accumulate, check_quantize
from ds_fp8.ops.health import GRADIENT_COUNTS
from ds_fp8.ops.triton import adam as adam_triton
from ds_fp8.ops.triton import tiles
from ds_fp8.ops.triton.adam import launch_sweep
from ds_fp8.ops.triton.blocks import largest_magnitude, launch_quantize
from ds_fp8.ops.triton.reduction import largest_sums, launch_sum, norm_parts_of_blocks

INFINITE = 0x7F800000  # bits of inf; those of NaN are more


def quantize(values: Tensor, out: Blocks, counts: Tensor | None = None) -> None:
    """`ops.per_tensor.quantize`."""
    check_quantize(values, out, counts)
    amax = largest_magnitude(values, len(out), out.block_size)
    by_program = launch_quantize(values, out, amax, counts)
    if counts is not None:
        bad = torch.zeros(GRADIENT_COUNTS, dtype=torch.float64, device=counts.device)
        bad[2] = 1  # the tensor is one block
        counts += torch.where(amax < INFINITE, by_program.sum(dim=0), bad)


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, overwrite: bool) -> Tensor:
    """`ops.per_tensor.accumulate`; the pieces lie at equal distances in one buffer."""
    check_accumulate(pieces, shard)
    amax = largest_sums(shard)
    launch_sum(pieces, shard, amax, "measure", overwrite=overwrite)
    return norm_parts_of_blocks(launch_sum(pieces, shard, amax.max(), "write", overwrite=overwrite))


@dataclass(frozen=True)
class Plan(tiles.Plan):
    """The segments of a shard, and which of them each row belongs to."""

    segment_of_row: Tensor  # [3, blocks] int64: one row for each of p, m and v, all alike


def plan(segments: Sequence[Segment], blocks: int, block_size: int, device: torch.device) -> Plan:
    """`ops.adam.plan`; the segments cover the shard."""
    looked_up = adam_triton.plan(segments, blocks, block_size, device)
    lengths = torch.tensor(
        [segment.blocks.stop - segment.blocks.start for segment in segments], dtype=torch.int64
    )
    rows = torch.arange(len(segments)).repeat_interleave(lengths).to(device).expand(3, blocks)
    return Plan(looked_up.table, looked_up.tile_segments, blocks, rows)


def adam_step(sweep: Sweep) -> None:
    """`ops.per_tensor.adam_step`."""
    if not len(sweep.gradient):
        return
    plan, device = sweep.plan, sweep.weights.device
    amax = torch.zeros(3, len(sweep.gradient), dtype=torch.int32, device=device)
    launch_sweep(replace(sweep, counts=None), "measure", amax)
    largest = torch.zeros(3, plan.table.shape[1], dtype=torch.int32, device=device)
    largest.scatter_reduce_(1, plan.segment_of_row, amax, "amax")
    launch_sweep(sweep, "write", largest.gather(1, plan.segment_of_row))
