"""FP32 masters in the form that DeepSpeed's zero_to_fp32.py reads, beside our own states.

Under ZeRO 1 and 2 a bucket is saved as one group of its parameters, each rank's pieces without padding. Under
ZeRO 3 every rank saves slices of a bucket's parameters, and the script assumes that DeepSpeed cut them:
an all-to-all of FP32 per bucket brings each rank those slices.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_fp8.zero_fp8.checkpoint.writer import fp32_masters
from ds_fp8.zero_fp8.comm.collectives import exchange
from ds_fp8.zero_fp8.parts import Parts
from ds_fp8.zero_fp8.placement.even_slices import length_of, moves
from ds_fp8.zero_fp8.placement.partition import Bucket

MasterViews = Callable[[Parts], dict[str, Any]]  # collective


def as_groups(parts: Parts) -> dict[str, Any]:
    """Return the FP32 masters for ZeRO 1 and 2."""
    groups = [fp32_masters(shard, weights.room).cpu() for _, _, shard, weights in parts.by_bucket()]
    return {"single_partition_of_fp32_groups": groups}


def as_slices(parts: Parts) -> dict[str, Any]:
    """Return the FP32 masters for ZeRO 3."""
    slices = []
    for bucket, _, shard, weights in parts.by_bucket():
        nodes, masters = parts.nodes_of(bucket), fp32_masters(shard, weights.room)
        slices.append(cut_evenly(masters, bucket, nodes.rank, nodes.group).cpu())
    return {"fp32_flat_groups": slices}


def cut_evenly(values: Tensor, bucket: Bucket, rank: int, group: ProcessGroup) -> Tensor:
    """Convert each rank's part of a bucket to slices as DeepSpeed cuts them, zeros between. Collective.

    values: [elements of this rank's pieces] -> [elements of its slices].
    """
    ranks = range(bucket.world_size)
    sent = [
        torch.cat([values[:0], *(values[each.source :][: each.numel] for each in moves(bucket, rank, other))])
        for other in ranks
    ]
    expected = [list(moves(bucket, other, rank)) for other in ranks]
    received = exchange(sent, [sum(each.numel for each in part) for part in expected], group)
    out, first = values.new_zeros(length_of(bucket)), 0
    for move in (each for part in expected for each in part):
        out[move.target :][: move.numel] = received[first:][: move.numel]
        first += move.numel
    return out
