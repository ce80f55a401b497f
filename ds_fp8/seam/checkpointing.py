"""save_checkpoint and load_checkpoint of an engine with FP8.

DeepSpeed writes and reads its own files; around that, a tag appears as a whole or not at all
(`zero_fp8.checkpoint.tags`), and nothing of the engine is touched before every rank has found the checkpoint
whole and fitting. When a tag is saved, DeepSpeed is asked which file is whose; later the manifest says it.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

import ds_fp8
from ds_fp8.seam import model_file
from ds_fp8.seam.arguments import (
    agree_on,
    check_client_state,
    check_place,
    check_same_checkpoint,
    check_same_folder,
    first_of,
    is_first,
)
from ds_fp8.seam.load_checks import Checked, check, check_stock, check_universal, others_of
from ds_fp8.seam.model_file import Wanted, frozen, shapes
from ds_fp8.seam.status import is_active
from ds_fp8.zero_fp8.checkpoint import files, manifest, tags, writer
from ds_fp8.zero_fp8.checkpoint.manifest import File, Manifest, Place
from ds_fp8.zero_fp8.checkpoint.universal import Universal
from ds_fp8.zero_fp8.comm.agreement import agreed, check_agreement, gather_objects
from ds_fp8.zero_fp8.handlers.stage12 import FP8ZeROOptimizer

logger = logging.getLogger("ds_fp8")

Method = Callable[..., Any]


# Saving


@dataclass(frozen=True)
class _Save:
    """The arguments of save_checkpoint, once they have been checked."""

    folder: Path
    tag: str
    latest: bool
    exclude_frozen: bool

    @property
    def saving(self) -> Path:
        """Where the tag is written."""
        return self.folder / (self.tag + tags.SAVING)


def save_checkpoint(original: Method) -> Method:
    """DeepSpeedEngine.save_checkpoint: the tag, its manifest and `latest` appear when all is written."""

    @functools.wraps(original)
    def method(
        self: Any,
        save_dir: Any,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        if not is_active(self):
            rest = (client_state or {}, save_latest, exclude_frozen_parameters)
            return original(self, save_dir, tag, *rest)
        agreed(lambda: _check_save(save_dir, tag, client_state), self.optimizer.dp_process_group)
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        save = _Save(Path(save_dir), name, save_latest, exclude_frozen_parameters)
        _prepare(self, save)
        _write(self, save, original, client_state or {})
        return True

    return method


def _check_save(save_dir: Any, tag: Any, client_state: Any) -> None:
    check_place("save_checkpoint", "save_dir", save_dir, tag)
    check_client_state(client_state)


def _prepare(engine: Any, save: _Save) -> None:
    """An empty folder to write into, once all ranks mean the same tag in the same folder."""
    flags = {"save_latest": bool(save.latest), "exclude_frozen_parameters": bool(save.exclude_frozen)}
    agree_on(engine, "save_checkpoint", {"tag": save.tag, **flags})
    check_same_folder(engine, save.folder)

    def settle() -> None:
        if is_first(engine):
            tags.settle(save.folder, save.tag, latest=save.latest)

    agreed(settle, engine.optimizer.dp_process_group, save.folder)


def _write(engine: Any, save: _Save, original: Method, client_state: Mapping[str, Any]) -> None:
    """Let DeepSpeed write the tag, and publish it; what a save that failed has written is removed."""
    handler: FP8ZeROOptimizer = engine.optimizer
    group = handler.dp_process_group
    try:
        with agreed(handler.ready_for_files, group), _to_the_end(engine) as failures:
            original(engine, str(save.folder), save.saving.name, client_state, False, save.exclude_frozen)
            agreed(failures.raise_first, group, save.saving)
            _publish(engine, save)
    except ValueError:
        if is_first(engine):
            tags.give_up(save.folder, save.tag)
        raise


def _publish(engine: Any, save: _Save) -> None:
    """Give a written tag its manifest and its name."""
    group = engine.optimizer.dp_process_group
    # DeepSpeed calls a rank's files as it likes.
    optimizer_file = Path(engine._get_zero_ckpt_name(save.folder, save.saving.name)).name
    optimizer_files = gather_objects(optimizer_file, group)
    sealed = _seal(engine, save.saving, optimizer_files)

    def publish() -> None:
        if is_first(engine):
            written = _manifest(engine, save, optimizer_files, sealed)
            tags.publish(save.folder, save.tag, written, latest=save.latest)

    agreed(publish, group, save.folder / save.tag)


class _Failures:
    """What a rank could not do of a save, while it went on for the others' sake."""

    def __init__(self) -> None:
        self._first: Exception | None = None

    def kept(self, act: Method) -> Method:
        """`act`, whose error is kept until it is raised."""

        @functools.wraps(act)
        def method(*arguments: Any, **options: Any) -> Any:
            if self._first is None:
                try:
                    return act(*arguments, **options)
                except Exception as error:
                    self._first = error
            return None

        return method

    def raise_first(self) -> None:
        if self._first is not None:
            raise self._first


# What may fail on one rank between DeepSpeed's barriers: it saves the module, then the states.
STEPS = ("_save_checkpoint", "_save_zero_checkpoint")


@contextmanager
def _to_the_end(engine: Any) -> Iterator[_Failures]:
    """DeepSpeed's saving, in which a rank that fails still comes to the last barrier."""
    failures, original = _Failures(), engine.checkpoint_engine
    engine.checkpoint_engine = _Writer(original)
    for name in STEPS:
        setattr(engine, name, failures.kept(getattr(engine, name)))
    try:
        yield failures
    finally:
        engine.checkpoint_engine = original
        for name in STEPS:
            delattr(engine, name)


class _Writer:
    """DeepSpeed's checkpoint engine, which writes through `files.save`."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, state_dict: Any, path: str) -> None:
        files.save(state_dict, path)


def _share(engine: Any, names: Iterable[str], optimizer_files: Sequence[str]) -> list[str]:
    """The files whose checksums this rank computes."""
    group = engine.optimizer.dp_process_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return manifest.share(names, optimizer_files, rank, world_size, first=is_first(engine))


def _seal(engine: Any, folder: Path, optimizer_files: Sequence[str]) -> dict[str, File]:
    """Size and checksum of every file in a folder, from the ranks that share it."""
    group = engine.optimizer.dp_process_group

    def seal() -> dict[str, File]:
        return manifest.seal(folder, _share(engine, manifest.files_of(folder), optimizer_files))

    node = first_of(engine)
    by_rank = gather_objects((node, agreed(seal, group, folder)), group)
    here = {name: file for other, sealed in by_rank if other == node for name, file in sealed.items()}
    return dict(sorted(here.items()))


def _manifest(engine: Any, save: _Save, optimizer_files: list[str], sealed: dict[str, File]) -> Manifest:
    handler: FP8ZeROOptimizer = engine.optimizer
    return Manifest(
        format_version=manifest.FORMAT_VERSION,
        ds_fp8_version=ds_fp8.__version__,
        deepspeed_version=version("deepspeed"),
        zero_stage=handler.settings.stage,
        world_size=len(optimizer_files),
        global_steps=engine.global_steps,
        recipe=writer.describe_recipe(handler.recipe),
        steps=handler.optimizer.steps,
        clamp_squares=writer.describe_clamp(handler.optimizer),
        loss_scaler=writer.describe_loss_scaler(handler.loss_scaler),
        autoscale=handler.wire.state(handler.parameter_names),
        scheduler=engine.lr_scheduler is not None,
        fp32_master=handler.settings.save_fp32_master,
        places=[_place(engine, save, optimizer_files)],
        files=sealed,
    )


def _place(engine: Any, save: _Save, optimizer_files: list[str]) -> Place:
    parameters = engine.optimizer.described_parameters()
    saved = shapes(engine.module_state_dict(exclude_frozen_parameters=save.exclude_frozen))
    keeps_frozen = engine.zero_optimization_stage() == 2 and not save.exclude_frozen
    return Place(
        model_file=Path(engine._get_ckpt_name(save.folder, save.saving.name)).name,
        optimizer_files=optimizer_files,
        parameters=parameters,
        module={key: shape for key, shape in saved.items() if key not in parameters},
        frozen=sorted(frozen(engine)) if keeps_frozen else None,
    )


# Loading


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
    group = engine.optimizer.dp_process_group
    agreed(lambda: check_place("load_checkpoint", "load_dir", load_dir, tag), group)
    agree_on(engine, "load_checkpoint", {key: bool(value) for key, value in options.items()})
    folder, latest = Path(load_dir), tags.LATEST
    if engine.load_universal_checkpoint():
        latest = tags.LATEST_UNIVERSAL
    name = agreed(lambda: tags.find(folder, None if tag is None else str(tag), latest), group, folder)
    check_agreement("the checkpoint", [str(name)], engine.device, group)
    return name


def _load(engine: Any, load_dir: Path, name: str, options: Mapping[str, Any]) -> Any:
    """Load a tag; what DeepSpeed's load_checkpoint returns."""
    handler: FP8ZeROOptimizer = engine.optimizer
    group, folder = handler.dp_process_group, load_dir / name
    with agreed(handler.ready_for_files, group):
        checked = _check(engine, folder, Wanted.by(options))
        if checked.conversion:
            logger.info("%s", checked.conversion)
        loaded = agreed(lambda: _load_model(engine, folder, checked, options), group, folder)
    if checked.states is None:
        handler._restore_from_bit16_weights()
    else:
        handler.restore(checked.states)
    return loaded


def _load_model(engine: Any, folder: Path, checked: Checked, options: Mapping[str, Any]) -> Any:
    """DeepSpeed's part: all but the states."""
    with model_file.given_to(engine, checked.model):
        loaded = engine._load_checkpoint(str(folder.parent), folder.name, **options)
    if engine.load_universal_checkpoint():
        others = others_of(engine, Universal(folder), checked.model)
        engine.module.load_state_dict(others, strict=False)
    return loaded


def _check(engine: Any, folder: Path, wanted: Wanted) -> Checked:
    """A checkpoint that has been checked on every rank."""
    group = engine.optimizer.dp_process_group
    universal = engine.load_universal_checkpoint()
    saved = agreed(lambda: None if universal else manifest.read(folder), group, folder)
    check_same_checkpoint(engine, folder, saved)
    if universal:
        return agreed(lambda: check_universal(engine, folder, wanted), group, folder)
    if saved is None:
        return agreed(lambda: check_stock(engine, folder, wanted), group, folder)
    names = {saved.place.model_file, *(saved.files if wanted.states else ())}
    shared = _share(engine, names, saved.place.optimizer_files)
    agreed(lambda: manifest.verify(folder, saved, shared), group, folder)
    return agreed(lambda: check(engine, folder, saved, wanted), group, folder)
