"""What depends on who has a scale: a block, or a tensor as in FP8-LM, with or without a sum in FP8."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ds_fp8.ops.backend import Backend, choose, choose_for_tensors
from ds_fp8.zero_fp8.gradients.packing import BlockWire, RingWire, TensorWire
from ds_fp8.zero_fp8.placement.partition import Bucket, partition, partition_whole
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.states.shard import RingShard, Shard, TensorShard


@dataclass(frozen=True)
class Layout:
    """The parts of a run that go together."""

    partition: Callable[..., tuple[Bucket, ...]]
    choose: Callable[[torch.device], Backend]
    shard: type[Shard]
    wire: type[BlockWire]


def choose_for_ring(device: torch.device) -> Backend:
    """Kernels for all but the FP8 sum. Raises as `choose`."""
    backend = choose_for_tensors(device)
    lacking = "those of fp8.gradients.reduction fp8, which quantise and add, are not built"
    return replace(backend, instead=backend.instead or lacking)


BLOCK = Layout(partition, choose, Shard, BlockWire)
TENSOR = Layout(partition_whole, choose_for_tensors, TensorShard, TensorWire)
RING = Layout(partition_whole, choose_for_ring, RingShard, RingWire)


def layout_of(recipe: Recipe) -> Layout:
    """The layout of a run."""
    if recipe.autoscale is not None:
        return RING
    return TENSOR if recipe.by_tensor else BLOCK
