"""Checks that a checkpoint fits an engine, made before anything is changed.

DeepSpeed writes the module, then the scheduler, then asks the optimizer; what it would stumble over
half-way is refused here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_fp8.seam import model_file
from ds_fp8.seam.model_file import Wanted, frozen, frozen_with_values
from ds_fp8.zero_fp8.checkpoint import convert
from ds_fp8.zero_fp8.checkpoint.contracts import Restorable, WeightSource, check_names
from ds_fp8.zero_fp8.checkpoint.convert import Converted
from ds_fp8.zero_fp8.checkpoint.files import Entry
from ds_fp8.zero_fp8.checkpoint.foreign import stock_files
from ds_fp8.zero_fp8.checkpoint.foreign.stock3 import Stock3
from ds_fp8.zero_fp8.checkpoint.foreign.stock12 import Stock12
from ds_fp8.zero_fp8.checkpoint.foreign.universal import OtherWeights, Universal
from ds_fp8.zero_fp8.checkpoint.manifest import NAME, Manifest, describe_difference
from ds_fp8.zero_fp8.checkpoint.model_files import ModelFile
from ds_fp8.zero_fp8.checkpoint.reader import Checkpoint, is_extra_state
from ds_fp8.zero_fp8.checkpoint.writer import describe_recipe
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer
from ds_fp8.zero_fp8.placement.parameters import part_of, shape_of

ALLOW = "fp8.checkpoint.allow_conversion: true converts them, through FP32"


@dataclass(frozen=True)
class Checked:
    """A checkpoint that has been checked: DeepSpeed's model file, and the states if they are wanted."""

    model: ModelFile
    states: Restorable | None
    weights: WeightSource | None = None  # None: DeepSpeed takes them from the model file
    conversion: str = ""  # what is rounded on the way, for the log


def check_places(engine: Any, folder: Path, manifest: Manifest) -> None:
    """Refuse, by a ValueError, a model that was split over another number of ranks, or not at all."""
    received, expected = len(manifest.places), engine.optimizer.ranks.parts
    if received != expected:
        raise ValueError(
            f"{folder / NAME}: model parallel size (tensor_parallel.autotp_size, or an mpu's): received "
            f"{received}, expected {expected} as in this run; `ds_fp8 export` and `ds_fp8 to-universal` "
            "write the whole model"
        )


def check(engine: Any, folder: Path, manifest: Manifest, wanted: Wanted) -> Checked:
    """A checkpoint of ours, whose files have been verified. Raises ValueError if it does not fit."""
    _check_module(engine, folder / NAME, manifest, wanted)
    model = model_file.read(engine, folder, manifest)
    model_file.check(engine, model, wanted)
    checkpoint = Checkpoint(folder, manifest, engine.optimizer.ranks.part, unpickle=True)
    weights = _check_weights(engine, model, checkpoint, wanted, coded=bool(manifest.coded))
    if not wanted.states:
        return Checked(model, None, weights)
    return Checked(model, *_check_ours(engine, folder / NAME, checkpoint, weights))


def _check_ours(
    engine: Any, path: Path, checkpoint: Checkpoint, weights: WeightSource | None
) -> tuple[Restorable, WeightSource | None, str]:
    manifest = checkpoint.manifest
    _check_parameters(engine, path, manifest)
    handler: FP8ZeROOptimizer = engine.optimizer
    recipe = describe_recipe(handler.recipe)
    checkpoint.check(handler.parts.shards, handler.parameter_names)
    if manifest.recipe == recipe:
        return checkpoint, weights, ""
    if not _may_convert(engine):
        differences = ", ".join(describe_difference(manifest.recipe, recipe))
        raise ValueError(f"{path}: of another recipe than this run ({differences}): {ALLOW}")
    return Converted(checkpoint), weights, convert.describe(manifest.recipe, recipe)


def _check_weights(
    engine: Any, model: ModelFile, source: WeightSource, wanted: Wanted, *, coded: bool = False
) -> WeightSource | None:
    """Where weights come from if ranks have slices of them, or the model file no weights; else None.

    Trained ones follow from the states if these are wanted. coded: the model file has no more than codes of
    some, which a `custom_load_fn` is given all the same.
    """
    from_masters = coded and not wanted.states and not wanted.custom
    if model.sliced is None and not engine.zero_optimization_partition_weights() and not from_masters:
        return None
    if wanted.custom and not wanted.states:
        raise ValueError(
            "load_checkpoint: received custom_load_fn without optimizer states, allowed if weights are in "
            "slices (ZeRO 3 in this run, or when it was saved): load_optimizer_states=True and "
            "load_module_only=False beside it"
        )
    names = frozen(engine)
    for name, parameter in engine.module.named_parameters():
        if name in source and (name in names or not wanted.states):
            source.check_weights(name, part_of(parameter))
    return source


def check_stock(engine: Any, folder: Path, wanted: Wanted) -> Checked:
    """A checkpoint that has no manifest."""
    files = stock_files.optimizer_files(folder)
    if files and stock_files.holds_our_states(next(iter(files.values()))):
        raise ValueError(f"{folder / NAME}: missing: the checkpoint was never finished, or lost it")
    if engine.optimizer.ranks.parts > 1:
        raise ValueError(
            f"{folder / NAME}: missing: received a checkpoint of stock DeepSpeed, allowed with tensor "
            "parallelism: those of ds_fp8"
        )
    model = model_file.read(engine, folder)
    if wanted.states and not _may_convert(engine):
        raise ValueError(
            f'{folder}: optimizer states that were not written with "fp8" enabled: {ALLOW}; or load only the '
            "weights (load_optimizer_states=False)"
        )
    source = _open_stock(folder, model) if wanted.states or model.sliced is not None else None
    if source is not None and wanted.states:
        source.check(engine.optimizer.saved.described_parameters())
    model_file.check(engine, model, wanted)
    assert model.files is not None
    weights = source if isinstance(source, Stock3) else model.files
    checked = _check_weights(engine, model, weights, wanted)
    if source is None or not wanted.states:
        return Checked(model, None, checked)
    return Checked(model, Converted(source), checked, _from_fp32(engine))


def _open_stock(folder: Path, model: ModelFile) -> Stock12 | Stock3:
    if model.sliced is None or model.files is None:
        return Stock12(folder)
    return Stock3(folder, model.files)


def check_universal(engine: Any, folder: Path, wanted: Wanted) -> Checked:
    """A universal checkpoint: the config has asked for it, so its states may be rounded."""
    if not wanted.states:
        raise ValueError(
            "load_checkpoint: received load_optimizer_states=False or load_module_only=True, allowed with "
            "checkpoint.load_universal: neither"
        )
    universal = Universal(folder)
    universal.check(engine.optimizer.saved.described_parameters())
    unknown = sorted(universal.trained - engine.module.state_dict(keep_vars=True).keys())
    if unknown:
        raise ValueError(f"{universal.folder}: of another model: with {unknown[:3]} (of {len(unknown)})")
    model = model_file.read(engine, folder)
    model_file.check(engine, model, wanted)
    _check_others(engine, universal, model, wanted)
    others = OtherWeights(universal, model.files if model.is_whole else None)
    weights = _check_weights(engine, model, others, wanted)
    return Checked(model, Converted(universal), weights, _from_fp32(engine))


def _from_fp32(engine: Any) -> str:
    return convert.describe(None, describe_recipe(engine.optimizer.recipe))


def _check_others(engine: Any, universal: Universal, model: ModelFile, wanted: Wanted) -> None:
    """Check that buffers and frozen parameters of a universal checkpoint have the right shape and kind."""
    saved, names = _saved(model), _untrained(engine)
    missing = sorted(names.keys() - model.at("module").of(dict).keys())
    if missing and wanted.module_strict and model.is_whole:
        raise ValueError(
            f"{model.path}: of another model: without {missing[:3]} (of {len(missing)}); "
            "load_module_strict=False takes what both have"
        )
    tensors = {name: each for name, each in names.items() if isinstance(each, Tensor)}
    for name in tensors.keys() & saved.value.keys():
        if not is_extra_state(name):
            model_file.check_tensor(saved.at(name), tensors[name])
    for name, ours in tensors.items():
        other = None if is_extra_state(name) else universal.other(name)
        shape, elsewhere = list(shape_of(ours)), (model.sliced or {}).get(name)
        if elsewhere not in (None, shape):
            raise ValueError(f"{model.path}: shape of {name}: received {elsewhere}, expected {shape}")
        if other is not None and list(other.value.shape) != shape:
            raise other.refusal(f"shape {shape}")


def others_of(engine: Any, universal: Universal, checked: Checked) -> dict[str, Any]:
    """Buffers, extra state and, if DeepSpeed takes them, frozen parameters, as far as there are any.

    From DeepSpeed's model file, where they are what they were; the converter's own files are all FP32.
    """
    saved = _saved(checked.model)
    apart = frozen(engine) if checked.weights is not None else ()
    state = {}
    for name in _untrained(engine).keys() - apart:
        other = universal.other(name) if name not in saved and not is_extra_state(name) else None
        if name in saved:
            state[name] = saved.value[name]
        elif other is not None:
            state[name] = other.value
    return state


def _saved(model: ModelFile) -> Entry:
    """The entry of the module in a model file."""
    module = model.at("module")
    if not model.is_whole:
        return Entry(model.path, {})
    return Entry(
        model.path,
        {name: each for name, each in module.of(dict).items() if name not in (model.sliced or {})},
        "module",
    )


def _untrained(engine: Any) -> dict[str, Any]:
    """Entries of the module's state_dict other than trained parameters."""
    trained = set(engine.optimizer.parameters.values())
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    saved = engine.module.state_dict(keep_vars=True)
    state = {name: parameters.get(name, value) for name, value in saved.items()}
    return {name: value for name, value in state.items() if parameters.get(name) not in trained}


def _may_convert(engine: Any) -> bool:
    return bool(engine._config.ds_fp8.checkpoint.allow_conversion)


def _check_module(engine: Any, path: Path, manifest: Manifest, wanted: Wanted) -> None:
    """Check the parts that DeepSpeed loads itself: it writes without checking."""
    place = manifest.places[engine.optimizer.ranks.part]
    if wanted.scheduler and engine.lr_scheduler is not None and not manifest.scheduler:
        raise ValueError(
            f"{path}: no scheduler was saved, and this run has one: load_lr_scheduler_states=False keeps it"
        )
    known = place.frozen
    missing_frozen = sorted(frozen_with_values(engine) - set(known)) if known is not None else []
    if missing_frozen:
        raise ValueError(f"{path}: {missing_frozen[:3]}: frozen in this run, trained in the checkpoint")
    if not wanted.custom:
        trained = {name: parameter.shape for name, parameter in place.parameters.items()}
        model_file.check_module(engine, path, {**place.module, **trained}, strict=wanted.module_strict)


def _check_parameters(engine: Any, path: Path, manifest: Manifest) -> None:
    """The trained parameters must be the same, in the same param groups."""
    saved, ours = (
        manifest.places[engine.optimizer.ranks.part].parameters,
        engine.optimizer.saved.described_parameters(),
    )
    check_names(path, saved, ours)
    for name, parameter in ours.items():
        for key in ("shape", "group"):
            received, expected = getattr(saved[name], key), getattr(parameter, key)
            if received != expected:
                raise ValueError(f"{path}: {key} of {name}: received {received}, expected {expected}")
    received, expected = len(manifest.clamp_squares), len(engine.optimizer.param_groups)
    if received != expected:
        raise ValueError(f"{path}: received {received} param groups, expected {expected}")
