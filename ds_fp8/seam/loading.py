"""load_checkpoint of an engine with FP8.

DeepSpeed reads its own files; nothing of the engine is touched before every rank has found the checkpoint
whole and fitting.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ds_fp8.ops.masters import put
from ds_fp8.seam import model_file
from ds_fp8.seam.arguments import (
    agree_on,
    as_data_parallel,
    check_place,
    check_same_checkpoint,
    checksum_share,
)
from ds_fp8.seam.load_checks import Checked, check, check_places, check_stock, check_universal, others_of
from ds_fp8.seam.model_file import Wanted, frozen
from ds_fp8.seam.status import is_active
from ds_fp8.zero_fp8.checkpoint import manifest, tags
from ds_fp8.zero_fp8.checkpoint.contracts import WeightSource
from ds_fp8.zero_fp8.checkpoint.foreign.universal import Universal
from ds_fp8.zero_fp8.comm.agreement import agreed, check_agreement
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer
from ds_fp8.zero_fp8.handlers.saved_states import SavedStates
from ds_fp8.zero_fp8.placement.parameters import held_of, part_of
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter

logger = logging.getLogger("ds_fp8")

Method = Callable[..., Any]


def load_checkpoint(original: Method) -> Method:
    """DeepSpeedEngine.load_checkpoint: everything is checked, on every rank, before anything is touched."""

    @functools.wraps(original)
    def method(
        self: Any,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        options = {
            "load_module_strict": load_module_strict,
            "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states,
            "load_module_only": load_module_only,
            "custom_load_fn": custom_load_fn,
        }
        name = _find(self, load_dir, tag, options) if is_active(self) else None
        if name is None:
            return original(self, load_dir, tag, **options)
        return _load(self, Path(load_dir), name, options)

    return method


def _find(engine: Any, load_dir: Any, tag: Any, options: Mapping[str, Any]) -> str | None:
    """The folder of the tag, the same on every rank; None where there is no `latest`."""
    ranks = engine.optimizer.ranks
    agreed(lambda: check_place("load_checkpoint", "load_dir", load_dir, tag), ranks)
    agree_on(engine, "load_checkpoint", {key: bool(value) for key, value in options.items()})
    folder, latest = Path(load_dir), tags.LATEST
    if engine.load_universal_checkpoint():
        latest = tags.LATEST_UNIVERSAL
    name = agreed(lambda: tags.find(folder, None if tag is None else str(tag), latest), ranks, folder)
    check_agreement("the checkpoint", [str(name)], engine.device, ranks)
    return name


def _load(engine: Any, load_dir: Path, name: str, options: Mapping[str, Any]) -> Any:
    """Load a tag; what DeepSpeed's load_checkpoint returns."""
    handler: FP8ZeROOptimizer = engine.optimizer
    ranks, folder = handler.ranks, load_dir / name
    with agreed(handler.ready_for_files, ranks), as_data_parallel(engine):
        checked = _check(engine, folder, Wanted.by(options))
        if checked.conversion:
            logger.info("%s", checked.conversion)
        loaded = agreed(lambda: _load_model(engine, folder, checked, options), ranks, folder)
    if checked.states is None:
        handler._restore_from_bit16_weights()
    else:
        handler.restore(checked.states)
    return loaded


def _load_model(engine: Any, folder: Path, checked: Checked, options: Mapping[str, Any]) -> Any:
    """DeepSpeed's part: all but the states; and weights that it cannot take from its model file."""
    if engine.zero_optimization_partition_weights():
        # Or DeepSpeed would put the whole model together in FP32.
        options = {**options, "load_optimizer_states": True}
    saved: SavedStates = engine.optimizer.saved
    from_file = checked.weights is None
    written = saved.open_to_weights(keeps=from_file and checked.states is None)
    with written, model_file.given_to(engine, checked.model, weights=from_file):
        loaded = engine._load_checkpoint(str(folder.parent), folder.name, **options)
    with saved.open_to_weights(keeps=False):
        if engine.load_universal_checkpoint():
            others = others_of(engine, Universal(folder), checked)
            engine.module.load_state_dict(others, strict=False)
        if checked.weights is not None:
            _take_weights(engine, checked.weights, states=checked.states is not None)
    return loaded


def _take_weights(engine: Any, source: WeightSource, *, states: bool) -> None:
    """This rank's values of frozen parameters, and of trained ones unless they follow from states."""
    if not states:
        engine.optimizer.saved.take_weights(source)
    names = frozen(engine)
    for name, parameter in engine.module.named_parameters():
        if name in names and name in source:
            values, held = source.weights(name, part_of(parameter)), held_of(parameter).data
            if len(values) < held.numel():  # the last slices, which are filled up
                held = held[: len(values)]
            if isinstance(parameter, FP8Parameter):
                held.copy_(values.view(held.shape))
            else:
                put(values.view(held.shape), held)


def _check(engine: Any, folder: Path, wanted: Wanted) -> Checked:
    """A checkpoint that has been checked on every rank."""
    ranks = engine.optimizer.ranks
    universal = engine.load_universal_checkpoint()
    saved = agreed(lambda: None if universal else manifest.read(folder), ranks, folder)
    check_same_checkpoint(engine, folder, saved)
    if universal:
        return agreed(lambda: check_universal(engine, folder, wanted), ranks, folder)
    if saved is None:
        return agreed(lambda: check_stock(engine, folder, wanted), ranks, folder)
    agreed(lambda: check_places(engine, folder, saved), ranks, folder)
    with_weights = wanted.states or not saved.places[0].has_whole_weights or saved.coded
    names = {place.model_file for place in saved.places} if not with_weights else set(saved.files)
    shared = checksum_share(engine, names, saved.of_ranks)
    agreed(lambda: manifest.verify(folder, saved, shared), ranks, folder)
    return agreed(lambda: check(engine, folder, saved, wanted), ranks, folder)
