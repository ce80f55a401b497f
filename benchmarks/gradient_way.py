"""The way of gradients and weights as the handler builds it, without engine, model or optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.config.section import parse
from ds_fp8.ops.backend import Backend
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.gradients.packing import BlockWire
from ds_fp8.zero_fp8.gradients.reducer import GradientReducer
from ds_fp8.zero_fp8.placement.partition import ParameterSpec, partition
from ds_fp8.zero_fp8.recipe import recipe_of
from ds_fp8.zero_fp8.states.shard import Shard


class Way:
    """Buckets, this rank's shards, and the reducer that brings every rank's gradients to them."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        backend: Backend,
        *,
        bucket_elements: int,
        overlap: bool = False,
        gradients: dict[str, Any] | None = None,
    ) -> None:
        """gradients: "fp8.gradients" of a ds_config."""
        config = parse({"fp8": {"enabled": True, "gradients": gradients or {}}})
        assert config is not None
        self.ranks, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.recipe = recipe_of(config, ranks=self.ranks)
        self.parameters = dict(enumerate(parameters))
        self.buckets = partition(
            [ParameterSpec(index, each.numel(), 0, each.dtype) for index, each in self.parameters.items()],
            bucket_elements=bucket_elements,
            block_size=self.recipe.block_size,
            world_size=self.ranks,
        )
        device = parameters[0].device
        self.shards = [Shard(each, self.rank, self.recipe, device, backend) for each in self.buckets]
        self.nodes = Nodes(torch.distributed.group.WORLD, self.recipe.intra_node_size)
        wire = BlockWire(self.recipe, self.nodes, backend, self.parameters)
        self.reducer = GradientReducer(
            self.buckets, self.parameters, self.shards, wire, self.nodes, overlap=overlap
        )

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """What a backward leaves, by parameter."""
        for index, gradient in enumerate(gradients):
            self.parameters[index].grad = gradient
