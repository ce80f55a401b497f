"""What a handler begins with: the ranks agree on what is trained, then the parts of the run are built."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed import comm as dist
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.zero_fp8.comm.agreement import check_agreement
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.parameters import check_finite, trained_parameters
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings
from ds_fp8.zero_fp8.wiring import Parts, backend_for, build, cut_buckets

logger = logging.getLogger("ds_fp8")


def take_over(
    names: Mapping[Parameter, str],
    param_groups: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    settings: ZeroSettings,
    group: ProcessGroup,
) -> tuple[dict[int, Parameter], Parts]:
    """The trained parameters by global index, now views of buffers, and the parts of the run.

    names: of every parameter of the model, in the model's order. group: the ranks that hold the same copy.
    Raises ValueError if the ranks' parameters or settings differ, RuntimeError on a GPU without a usable
    kernel.
    """
    fleet = Fleet("data", dist.get_world_size(group))
    parameters, specs = trained_parameters(param_groups, names, fleet)
    device = next(iter(parameters.values())).device
    check_agreement("what is trained", [str(recipe), str(settings), *map(str, specs)], device, group)
    if recipe.master.scaled:
        check_finite(parameters, {index: names[each] for index, each in parameters.items()})
    backend = backend_for(recipe, device)
    if backend.instead and dist.get_rank(group) == 0:
        logger.warning("plain PyTorch instead of kernels, with the same numbers: %s", backend.instead)
    buckets = cut_buckets(specs, recipe, settings)
    fleets = {fleet: Nodes(group, recipe.intra_node_size)}
    return parameters, build(buckets, parameters, recipe, settings, fleets, backend, len(param_groups))
