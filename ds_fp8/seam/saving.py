"""save_checkpoint of an engine with FP8.

DeepSpeed writes its own files, and is asked which is whose. A tag appears as a whole or not at all (`tags`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

import ds_fp8
from ds_fp8.seam.arguments import (
    agree_on,
    as_data_parallel,
    check_client_state,
    check_place,
    check_same_folder,
    checksum_share,
    first_of,
    is_first,
)
from ds_fp8.seam.model_file import frozen, shapes_of
from ds_fp8.seam.status import is_active
from ds_fp8.zero_fp8.checkpoint import files, manifest, tags, writer
from ds_fp8.zero_fp8.checkpoint.manifest import File, Manifest, Place
from ds_fp8.zero_fp8.comm.agreement import agreed, gather_objects
from ds_fp8.zero_fp8.comm.replicas import warn_if_parted
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer

Method = Callable[..., Any]


@dataclass(frozen=True)
class _Save:
    """The arguments of save_checkpoint, once they have been checked."""

    folder: Path
    tag: str
    latest: bool
    exclude_frozen: bool

    @property
    def saving(self) -> Path:
        """The folder in which the tag is written."""
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
        agreed(lambda: _check_save(save_dir, tag, client_state), self.optimizer.ranks)
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
            tags.clear_leftovers(save.folder, save.tag, latest=save.latest)

    agreed(settle, engine.optimizer.ranks, save.folder)


def _write(engine: Any, save: _Save, original: Method, client_state: Mapping[str, Any]) -> None:
    """Let DeepSpeed write the tag, and publish it; what a save that failed has written is removed."""
    handler: FP8ZeROOptimizer = engine.optimizer
    ranks = handler.ranks
    warn_if_parted(engine.param_names, ranks)
    try:
        with (
            agreed(handler.ready_for_files, ranks),
            as_data_parallel(engine),
            handler.saved.ready_to_save(writes=engine.save_non_zero_checkpoint),
            _to_the_end(engine) as failures,
        ):
            original(engine, str(save.folder), save.saving.name, client_state, False, save.exclude_frozen)
            agreed(failures.raise_first, ranks, save.saving)
            _publish(engine, save)
    except ValueError:
        if is_first(engine):
            tags.give_up(save.folder, save.tag)
        raise


def _publish(engine: Any, save: _Save) -> None:
    """Give a written tag its manifest and its name."""
    ranks = engine.optimizer.ranks
    names = agreed(lambda: _names(engine, save), ranks)
    written = _Written.of(gather_objects(names, ranks))
    places = _places(engine, save, _Written.of(gather_objects(names, ranks.group)))
    sealed = _seal(engine, save.saving, written.of_ranks(engine))

    def publish() -> None:
        if is_first(engine):
            about = _manifest(engine, len(written.states), places, sealed)
            tags.publish(save.folder, save.tag, about, latest=save.latest)

    agreed(publish, ranks, save.folder / save.tag)


@dataclass(frozen=True)
class _Names:
    """DeepSpeed calls a rank's files as it likes."""

    states: str
    model: str


def _names(engine: Any, save: _Save) -> _Names:
    names = engine._get_zero_ckpt_name, engine._get_ckpt_name
    return _Names(*(Path(name(save.folder, save.saving.name)).name for name in names))


@dataclass(frozen=True)
class _Written:
    """The files of a tag, in the order of the ranks that wrote them."""

    states: list[str]
    models: list[str]  # one name per place, over and over, but under ZeRO 3

    @staticmethod
    def of(by_rank: Sequence[_Names]) -> "_Written":
        return _Written([each.states for each in by_rank], [each.model for each in by_rank])

    def of_ranks(self, engine: Any) -> list[list[str]]:
        """Names of the files of which every rank writes one, in rank order."""
        return [self.states, *([self.models] if engine.zero_optimization_partition_weights() else [])]


class _Failures:
    """Keeps a rank's first error in a save, so that the rank continues and others do not wait for it."""

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
    engine._get_shared_params = _by_address(engine._get_shared_params)
    try:
        yield failures
    finally:
        engine.checkpoint_engine = original
        for name in (*STEPS, "_get_shared_params"):
            delattr(engine, name)


def _by_address(find: Method) -> Method:
    """DeepSpeed's search for tied parameters, in which FP8 parameters have addresses: none is tied."""

    @functools.wraps(find)
    def method() -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return find()

    return method


class _Writer:
    """DeepSpeed's checkpoint engine, which writes through `files.save`."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, state_dict: Any, path: str) -> None:
        files.save(state_dict, path)


def _seal(engine: Any, folder: Path, of_ranks: Sequence[Sequence[str]]) -> dict[str, File]:
    """Size and checksum of every file in a folder, from the ranks that share it."""
    ranks = engine.optimizer.ranks

    def seal() -> dict[str, File]:
        return manifest.seal(folder, checksum_share(engine, manifest.files_of(folder), of_ranks))

    node = first_of(engine)
    by_rank = gather_objects((node, agreed(seal, ranks, folder)), ranks)
    here = {name: file for other, sealed in by_rank if other == node for name, file in sealed.items()}
    return dict(sorted(here.items()))


def _manifest(engine: Any, world_size: int, places: list[Place], sealed: dict[str, File]) -> Manifest:
    handler: FP8ZeROOptimizer = engine.optimizer
    return Manifest(
        format_version=manifest.FORMAT_VERSION,
        ds_fp8_version=ds_fp8.__version__,
        deepspeed_version=version("deepspeed"),
        zero_stage=handler.settings.stage,
        world_size=world_size,
        global_steps=engine.global_steps,
        recipe=writer.describe_recipe(handler.recipe),
        steps=handler.optimizer.steps,
        clamp_squares=writer.describe_clamp(handler.optimizer),
        loss_scaler=writer.describe_loss_scaler(handler.loss_scaler),
        autoscale=handler.parts.gradient_scales.state(handler.parameter_names),
        scheduler=engine.lr_scheduler is not None,
        fp32_master=handler.settings.save_fp32_master,
        weights="masters" if handler.settings.masters_in_model_files else "codes",
        places=places,
        files=sealed,
    )


def _places(engine: Any, save: _Save, written: _Written) -> list[Place]:
    """Every place, on the ranks that write manifests. written: the files of this rank's place."""
    ranks = engine.optimizer.ranks
    describes = dist.get_rank(ranks.group) == 0 or is_first(engine)
    place = agreed(lambda: _place(engine, save, written) if describes else None, ranks)
    places = [place] if ranks.peers is None else gather_objects(place, ranks.peers)
    return [each for each in places if each is not None]


def _place(engine: Any, save: _Save, written: _Written) -> Place:
    states = engine.optimizer.saved
    parameters = writer.with_users(engine.module, states.described_parameters(), states.encoded)
    saved = engine.module_state_dict(keep_vars=True, exclude_frozen_parameters=save.exclude_frozen)
    shapes = shapes_of(engine.module, saved)
    keeps_frozen = engine.zero_optimization_partition_gradients() and not save.exclude_frozen
    in_slices = engine.zero_optimization_partition_weights()
    return Place(
        model_file=written.models[0],
        model_files=written.models if in_slices else None,
        optimizer_files=written.states,
        parameters=parameters,
        module={key: shape for key, shape in shapes.items() if key not in parameters},
        frozen=sorted(frozen(engine)) if keeps_frozen else None,
        sliced=writer.describe_slices(engine.module, frozen(engine), len(written.models))
        if keeps_frozen and in_slices
        else {},
        cuts=writer.describe_cuts(engine.module) if engine.optimizer.ranks.peers is not None else {},
    )
