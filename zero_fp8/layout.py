"""What depends on who has a scale: a block, or a tensor as in FP8-LM, with or without a sum in FP8."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_fp8.ops.backend import Backend, choose, choose_for_tensors
from ds_fp8.zero_fp8.partition import Bucket, partition, partition_whole
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.shard import RingShard, Shard, TensorShard
from ds_fp8.zero_fp8.wire import BlockWire, RingWire, TensorWire


@dataclass(frozen=True)
class Layout:
    """The parts of a run that go together."""

    partition: Callable[..., tuple[Bucket, ...]]
    choose: Callable[[torch.device], Backend]
    shard: type[Shard]
    wire: type[BlockWire]


BLOCK = Layout(partition, choose, Shard, BlockWire)
TENSOR = Layout(partition_whole, choose_for_tensors, TensorShard, TensorWire)
RING = Layout(partition_whole, choose_for_tensors, RingShard, RingWire)


def layout_of(recipe: Recipe) -> Layout:
    """The layout of a run."""
    if recipe.autoscale is not None:
        return RING
    return TENSOR if recipe.by_tensor else BLOCK
