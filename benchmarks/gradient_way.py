"""The path of gradients and weights as `wiring` builds it, without engine, model or optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.config.parsing import parse
from ds_fp8.ops.backend import Backend
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import ParameterSpec
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.recipe import ZeroSettings, recipe_of
from ds_fp8.zero_fp8.wiring import build, cut_buckets


class Way:
    """The parts of a run over all ranks of the world."""

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
        fleet = Fleet("data", self.ranks)
        specs = [
            ParameterSpec(index, each.numel(), 0, each.dtype, fleet)
            for index, each in self.parameters.items()
        ]
        settings = ZeroSettings(
            stage=1,  # reduced when `reducer.finish` is called
            bucket_elements=bucket_elements,
            overlap=overlap,
            gradient_clipping=0.0,
            average=True,
            max_consecutive_skips=1,
            save_fp32_master=False,
            stats_interval=0,
        )
        self.nodes = Nodes(torch.distributed.group.WORLD, self.recipe.intra_node_size)
        buckets = cut_buckets(specs, self.recipe, settings)
        fleets = {fleet: self.nodes}
        self.parts = build(buckets, self.parameters, self.recipe, settings, fleets, backend, param_groups=1)

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients that a backward leaves, by parameter."""
        for index, gradient in enumerate(gradients):
            self.parameters[index].grad = gradient
