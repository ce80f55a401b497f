"""save_checkpoint and load_checkpoint of an engine with FP8.

DeepSpeed writes and reads its own files; around that, a tag appears as a whole or not at all
(`zero_fp8.tags`), and nothing of the engine is touched before every rank has found the checkpoint
whole and fitting.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from ds_fp8.seam.load_checks import Fitting, check, check_stock, check_universal, others_of
from ds_fp8.seam.model_file import Wanted, frozen, shapes
from ds_fp8.seam.status import is_active
from ds_fp8.zero_fp8.checkpoint import manifest, tags, writing
from ds_fp8.zero_fp8.checkpoint.foreign import Universal
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest
from ds_fp8.zero_fp8.comm.agreement import agreed, check_agreement, gather_objects
from ds_fp8.zero_fp8.handlers.stage12 import FP8ZeROOptimizer

logger = logging.getLogger("ds_fp8")

Method = Callable[..., Any]


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
        folder, tag = Path(save_dir), f"global_step{self.global_steps}" if tag is None else str(tag)
        group, writes = self.optimizer.dp_process_group, is_first(self)
        flags = {"save_latest": save_latest, "exclude_frozen_parameters": exclude_frozen_parameters}
        agree_on(self, "save_checkpoint", {"tag": tag, **{key: bool(each) for key, each in flags.items()}})
        check_same_folder(self, folder)
        agreed(lambda: tags.settle(folder, tag, latest=save_latest) if writes else None, group, folder)
        saving = folder / (tag + tags.SAVING)
        try:
            with agreed(self.optimizer.ready_for_files, group), _to_the_end(self) as failures:
                original(self, save_dir, saving.name, client_state or {}, False, exclude_frozen_parameters)
                agreed(failures.tell, group, saving)
                _publish(self, folder, tag, latest=save_latest, exclude_frozen=exclude_frozen_parameters)
        except ValueError:
            if writes:
                tags.give_up(folder, tag)
            raise
        return True

    return method


def _check_save(save_dir: Any, tag: Any, client_state: Any) -> None:
    check_place("save_checkpoint", "save_dir", save_dir, tag)
    check_client_state(client_state)


def _publish(engine: Any, folder: Path, tag: str, *, latest: bool, exclude_frozen: bool) -> None:
    """Give a written tag its manifest and its name."""
    files = _seal(engine, folder / (tag + tags.SAVING))

    def publish() -> None:
        if is_first(engine):
            tags.publish(folder, tag, _facts(engine, files, exclude_frozen), latest=latest)

    agreed(publish, engine.optimizer.dp_process_group, folder / tag)


class _Failures:
    """What a rank could not do of a save, while it went on for the others' sake."""

    def __init__(self) -> None:
        self._first: Exception | None = None

    def kept(self, act: Method) -> Method:
        """`act`, whose error is kept until it is told."""

        @functools.wraps(act)
        def method(*arguments: Any, **options: Any) -> Any:
            if self._first is None:
                try:
                    return act(*arguments, **options)
                except Exception as error:
                    self._first = error
            return None

        return method

    def tell(self) -> None:
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
    """DeepSpeed's checkpoint engine, which writes through `writing.save`."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, state_dict: Any, path: str) -> None:
        writing.save(state_dict, path)


def _share(engine: Any, names: Any) -> Any:
    """The files whose checksums this rank computes."""
    group = engine.optimizer.dp_process_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return manifest.share(names, rank, world_size, first=is_first(engine))


def _seal(engine: Any, folder: Path) -> dict[str, manifest.File]:
    """Size and checksum of every file in a folder, from the ranks that share it."""
    group = engine.optimizer.dp_process_group

    def seal() -> dict[str, manifest.File]:
        return manifest.seal(folder, _share(engine, manifest.files_of(folder)))

    node = first_of(engine)
    told = gather_objects((node, agreed(seal, group, folder)), group)
    found = {name: fact for other, files in told if other == node for name, fact in files.items()}
    return dict(sorted(found.items()))


def _facts(engine: Any, files: dict[str, manifest.File], exclude_frozen: bool) -> Manifest:
    facts = engine.optimizer.manifest_facts()
    saved = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    keeps_frozen = engine.zero_optimization_stage() == 2 and not exclude_frozen
    return Manifest(
        format_version=manifest.FORMAT_VERSION,
        ds_fp8_version=ds_fp8.__version__,
        deepspeed_version=version("deepspeed"),
        global_steps=engine.global_steps,
        scheduler=engine.lr_scheduler is not None,
        module={key: shape for key, shape in shapes(saved).items() if key not in facts["parameters"]},
        frozen=sorted(frozen(engine)) if keeps_frozen else None,
        files=files,
        **facts,
    )


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
        if not is_active(self):
            return original(self, load_dir, tag, **options)
        handler: FP8ZeROOptimizer = self.optimizer
        wanted = Wanted(
            module_strict=load_module_strict,
            states=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
            custom=bool(custom_load_fn),  # as DeepSpeed asks
        )
        agreed(lambda: check_place("load_checkpoint", "load_dir", load_dir, tag), handler.dp_process_group)
        given = {**options, "custom_load_fn": wanted.custom}
        agree_on(self, "load_checkpoint", {key: bool(each) for key, each in given.items()})
        found = _find(self, Path(load_dir), tag)
        if found is None:
            return original(self, load_dir, tag, **options)
        folder, group = Path(load_dir) / found, handler.dp_process_group
        with agreed(handler.ready_for_files, group):
            fitting = _open(self, folder, wanted)
            if fitting.conversion:
                logger.info("%s", fitting.conversion)

            def load() -> Any:
                with model_file.given_to(self, fitting.model):
                    loaded = self._load_checkpoint(load_dir, found, **options)
                if self.load_universal_checkpoint():
                    others = others_of(self, Universal(folder), fitting.model)
                    self.module.load_state_dict(others, strict=False)
                return loaded

            loaded = agreed(load, group, folder)
        if fitting.states is None:
            handler._restore_from_bit16_weights()
        else:
            handler.restore(fitting.states)
        return loaded

    return method


def _find(engine: Any, folder: Path, tag: Any) -> str | None:
    """The folder of the tag, the same on every rank; None where there is no `latest`."""
    group = engine.optimizer.dp_process_group
    latest = tags.LATEST_UNIVERSAL if engine.load_universal_checkpoint() else tags.LATEST
    found = agreed(lambda: tags.find(folder, None if tag is None else str(tag), latest), group, folder)
    check_agreement("the checkpoint", [str(found)], engine.device, group)
    return found


def _open(engine: Any, folder: Path, wanted: Wanted) -> Fitting:
    """A checkpoint that has been checked on every rank."""
    group = engine.optimizer.dp_process_group
    universal = engine.load_universal_checkpoint()
    facts = agreed(lambda: None if universal else manifest.read(folder), group, folder)
    check_same_checkpoint(engine, folder, facts)
    if universal:
        return agreed(lambda: check_universal(engine, folder, wanted), group, folder)
    if facts is None:
        return agreed(lambda: check_stock(engine, folder, wanted), group, folder)
    names = {manifest.MODEL_FILE, *(facts.files if wanted.states else ())}
    agreed(lambda: manifest.verify(folder, facts, _share(engine, names)), group, folder)
    return agreed(lambda: check(engine, folder, facts, wanted), group, folder)
