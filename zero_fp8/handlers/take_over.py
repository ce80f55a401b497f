"""The first steps of a handler: the ranks agree on what is trained, then the parts of the run are built."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepspeed import comm as dist
from torch.nn import Parameter

from ds_fp8.config.refusals import naming
from ds_fp8.ops.formats import E4M3
from ds_fp8.zero_fp8.comm.agreement import agreed, check_agreement
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.comm.replicas import check_replicated
from ds_fp8.zero_fp8.parts import Parts
from ds_fp8.zero_fp8.placement.parameters import check_finite, held_of, trained_parameters
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings
from ds_fp8.zero_fp8.weights.model_weights import StateDictNotice
from ds_fp8.zero_fp8.weights.tiled import Products, Room
from ds_fp8.zero_fp8.wiring import backend_for, build, cut_buckets, nodes_of_run

logger = logging.getLogger("ds_fp8")


def take_over(
    names: Mapping[Parameter, str],
    param_groups: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    settings: ZeroSettings,
    ranks: Ranks,
    prepare: Callable[[], None],
    choice: Choice | None = None,
) -> tuple[dict[int, Parameter], Parts]:
    """Take over the trained parameters; return them by global index, with the parts of the run.

    names: of every parameter of the model, in the model's order. choice: of matrices that become codes.
    Raises ValueError if the ranks' parameters or settings differ, RuntimeError on a GPU without a usable
    kernel.
    """
    group, peers = ranks.group, ranks.peers
    fleet = Fleet("data", dist.get_world_size(group))
    encoded = choice.parameters if choice else ()
    parameters, specs = trained_parameters(param_groups, names, fleet, encoded, peers=peers is not None)
    device = next(iter(parameters.values())).device
    facts = [str(recipe), str(settings), *_of_choice(choice, names), *map(str, specs)]
    check_agreement("what is trained", facts, device, group)
    if peers is not None:
        check_replicated(names, specs, ranks)
    prepare()
    if recipe.master.scaled:
        own = {index: held_of(each) for index, each in parameters.items()}
        agreed(lambda: check_finite(own, {index: names[each] for index, each in parameters.items()}), group)
    backend = backend_for(recipe, device)
    if backend.instead and ranks.rank == 0:
        logger.warning("plain PyTorch instead of kernels, with the same numbers: %s", backend.instead)
    buckets = cut_buckets(specs, recipe, settings)
    fleets = {fleet: nodes_of_run(ranks, recipe, settings)}
    products = None
    if choice:
        by_index = {index: names[each] for index, each in parameters.items()}
        chosen = frozenset(spec.index for spec in specs if spec.dtype is E4M3)
        if choice.parameters and not chosen:
            eligible = naming([names[each] for each in choice.parameters])
            raise ValueError(
                f"optimizer: received no FP8 weight to train, allowed: at least one of {eligible}"
            )
        products = Products(by_index, chosen, choice, Room(device), StateDictNotice())
    parts = build(buckets, parameters, recipe, settings, fleets, backend, len(param_groups), products)
    if choice:
        parts.frozen.take_over(choice, names)
    return parameters, parts


def _of_choice(choice: Choice | None, names: Mapping[Parameter, str]) -> list[str]:
    """Return what ranks must agree on about matrices that become codes; errors name the first difference."""
    if choice is None:
        return []
    weights = [f"FP8 weight: {names[each]}" for each in choice.parameters]
    frozen = [f"frozen FP8 weight: {names[each]}" for each in choice.frozen]
    return [f"products: {choice.way.name}", *weights, *frozen]
