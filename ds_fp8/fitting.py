"""Whether a checkpoint fits an engine: asked before anything is touched.

DeepSpeed writes the module, then the scheduler, then asks the optimizer; what it would stumble over
half-way is refused here.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_fp8.zero_fp8 import convert, foreign, manifest
from ds_fp8.zero_fp8.checkpoint import Restorable, recipe_facts
from ds_fp8.zero_fp8.convert import Converted
from ds_fp8.zero_fp8.handler import FP8ZeROOptimizer
from ds_fp8.zero_fp8.manifest import Manifest
from ds_fp8.zero_fp8.native import Native

logger = logging.getLogger("ds_fp8")

ALLOW = "fp8.checkpoint.allow_conversion: true converts them, through FP32"


@dataclass(frozen=True)
class Wanted:
    """The arguments of load_checkpoint that decide what must fit."""

    module_strict: bool
    states: bool
    scheduler: bool
    custom: bool  # the caller loads the module


def check(engine: Any, folder: Path, facts: Manifest, wanted: Wanted) -> Restorable | None:
    """The states of a checkpoint of ours, where they are wanted. Raises ValueError where it does not fit."""
    path = folder / manifest.NAME
    _check_module(engine, path, facts, wanted)
    if not wanted.states:
        return None
    _check_parameters(engine, path, facts)
    handler: FP8ZeROOptimizer = engine.optimizer
    native, recipe = Native(folder, facts, unpickle=True), recipe_facts(handler.recipe)
    native.check(handler.shards, handler.parameter_names)
    if facts.recipe == recipe:
        return native
    if not _may_convert(engine):
        differences = ", ".join(manifest.describe_difference(facts.recipe, recipe))
        raise ValueError(f"{path}: of another recipe than this run ({differences}): {ALLOW}")
    logger.info("%s", convert.describe(facts.recipe, recipe))
    return Converted(native)


def check_stock(engine: Any, folder: Path, wanted: Wanted) -> Restorable | None:
    """The states of a checkpoint that has no manifest, where they are wanted."""
    files = foreign.optimizer_files(folder)
    if files and foreign.is_native(next(iter(files.values()))):
        raise ValueError(f"{folder / manifest.NAME}: missing: the checkpoint was never finished, or lost it")
    if not wanted.states:
        return None
    if not _may_convert(engine):
        raise ValueError(
            f'{folder}: optimizer states that were not written with "fp8" enabled: {ALLOW}; or load only the '
            "weights (load_optimizer_states=False)"
        )
    stock = foreign.Stock(folder)
    stock.check(engine.optimizer.manifest_facts()["parameters"])
    logger.info("%s", convert.describe(None, recipe_facts(engine.optimizer.recipe)))
    return Converted(stock)


def check_universal(engine: Any, folder: Path, wanted: Wanted) -> Restorable:
    """The states of a universal checkpoint: the config has asked for it, so they may be rounded."""
    if not wanted.states:
        raise ValueError(
            "load_checkpoint: received load_optimizer_states=False or load_module_only=True, allowed with "
            "checkpoint.load_universal: neither"
        )
    universal = foreign.Universal(folder)
    universal.check(engine.optimizer.manifest_facts()["parameters"])
    ours = shapes(engine.module.state_dict())
    for name, tensor in others_of(engine, universal).items():
        if list(tensor.shape) != ours[name]:
            raise ValueError(
                f"{folder}: shape of {name}: received {list(tensor.shape)}, expected {ours[name]}"
            )
    logger.info("%s", convert.describe(None, recipe_facts(engine.optimizer.recipe)))
    return Converted(universal)


def others_of(engine: Any, universal: foreign.Universal) -> dict[str, Tensor]:
    """Buffers and frozen parameters, as far as a universal checkpoint has them."""
    trained = set(engine.optimizer.parameters.values())
    parameters = engine.module.named_parameters(remove_duplicate=False)
    known = {name for name, each in parameters if each in trained}
    found = {name: universal.other(name) for name in engine.module.state_dict() if name not in known}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _may_convert(engine: Any) -> bool:
    return bool(engine._config.ds_fp8.checkpoint.allow_conversion)


def _check_module(engine: Any, path: Path, facts: Manifest, wanted: Wanted) -> None:
    """What DeepSpeed loads itself must fit: it does not look before it writes."""
    if wanted.scheduler and engine.lr_scheduler is not None and not facts.scheduler:
        raise ValueError(
            f"{path}: no scheduler was saved, and this run has one: load_lr_scheduler_states=False keeps it"
        )
    missing_frozen = sorted(frozen(engine) - set(facts.frozen)) if facts.frozen is not None else []
    if missing_frozen:
        raise ValueError(f"{path}: {missing_frozen[:3]}: frozen in this run, trained in the checkpoint")
    if wanted.custom:
        return
    saved = {**facts.module, **{name: each.shape for name, each in facts.parameters.items()}}
    ours = shapes(engine.module.state_dict())
    missing, extra = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
    if wanted.module_strict and (missing or extra):
        raise ValueError(
            f"{path}: of another model: without {missing[:3]}, with {extra[:3]} (of {len(missing)} and "
            f"{len(extra)}); load_module_strict=False takes what both have"
        )
    for name in ours.keys() & saved.keys():
        if ours[name] != saved[name]:
            raise ValueError(f"{path}: shape of {name}: received {saved[name]}, expected {ours[name]}")


def _check_parameters(engine: Any, path: Path, facts: Manifest) -> None:
    """The trained parameters must be the same, in the same param groups."""
    ours = engine.optimizer.manifest_facts()["parameters"]
    foreign.check_names(path, facts.parameters, ours)
    for name, mine in ours.items():
        for key in ("shape", "group"):
            received, expected = getattr(facts.parameters[name], key), getattr(mine, key)
            if received != expected:
                raise ValueError(f"{path}: {key} of {name}: received {received}, expected {expected}")
    if len(facts.clamp_squares) != len(engine.optimizer.param_groups):
        raise ValueError(
            f"{path}: received {len(facts.clamp_squares)} param groups, expected "
            f"{len(engine.optimizer.param_groups)}"
        )


def shapes(state: Mapping[str, Any]) -> dict[str, list[int] | None]:
    return {key: list(each.shape) if isinstance(each, Tensor) else None for key, each in state.items()}


def frozen(engine: Any) -> set[str]:
    """Names of the parameters that the optimizer does not train."""
    trained = set(engine.optimizer.parameter_names.values())
    return {name for name, _ in engine.module.named_parameters()} - trained
