"""save_checkpoint and load_checkpoint of an engine with FP8.

DeepSpeed writes and reads its own files; around that, a tag appears as a whole or not at all
(`zero_fp8.tags`), and nothing of the engine is touched before every rank has found the checkpoint
whole and fitting.
"""

import functools
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

import ds_fp8
from ds_fp8.fitting import Wanted, check, check_stock, check_universal, frozen, others_of, shapes
from ds_fp8.status import is_active
from ds_fp8.zero_fp8 import manifest, tags, universal
from ds_fp8.zero_fp8.agreement import agreed, check_agreement, everybody
from ds_fp8.zero_fp8.checkpoint import Restorable
from ds_fp8.zero_fp8.foreign import Universal
from ds_fp8.zero_fp8.handler import FP8ZeROOptimizer
from ds_fp8.zero_fp8.manifest import Manifest

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
        rest = (client_state or {}, save_latest, exclude_frozen_parameters)
        if not is_active(self):
            return original(self, save_dir, tag, *rest)
        if not save_dir or tag == "":
            raise ValueError(f"save_checkpoint: received {save_dir!r}, tag {tag!r}, allowed: names")
        folder, tag = Path(save_dir), f"global_step{self.global_steps}" if tag is None else str(tag)
        group, writes = self.optimizer.dp_process_group, _is_first(self)
        agreed(lambda: tags.settle(folder, tag) if writes else None, group)
        original(self, save_dir, tag + tags.SAVING, rest[0], False, exclude_frozen_parameters)
        files = _seal(self, folder / (tag + tags.SAVING))

        def publish() -> None:
            if writes:
                facts = _facts(self, files, exclude_frozen_parameters)
                tags.publish(folder, tag, facts, latest=save_latest)

        agreed(publish, group)
        return True

    return method


def _is_first(engine: Any) -> bool:
    """Whether this is the first rank of those that share a folder: a node's, or all."""
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    return bool(rank == 0)


def _share(engine: Any, names: Any) -> Any:
    """The files whose checksums this rank computes."""
    group = engine.optimizer.dp_process_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return manifest.share(names, rank, world_size, first=_is_first(engine))


def _seal(engine: Any, folder: Path) -> dict[str, manifest.File]:
    """Size and checksum of every file in a folder, from the ranks that share it."""
    group = engine.optimizer.dp_process_group

    def seal() -> dict[str, manifest.File]:
        return manifest.seal(folder, _share(engine, [each.name for each in folder.iterdir()]))

    node = engine.global_rank - engine.local_rank if engine.use_node_local_storage() else 0
    told = everybody((node, agreed(seal, group)), group)
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
            custom=custom_load_fn is not None,
        )
        found = _find(self, Path(load_dir), tag)
        if found is None:
            return original(self, load_dir, tag, **options)
        folder = Path(load_dir) / found
        source = _open(self, folder, wanted)
        with _mapped(self):
            loaded = self._load_checkpoint(load_dir, found, **options)
        if self.load_universal_checkpoint():
            self.module.load_state_dict(others_of(self, Universal(folder)), strict=False)
        if source is None:
            handler._restore_from_bit16_weights()
        else:
            handler.restore(source)
        return loaded

    return method


class _Mapped:
    """What DeepSpeed loads its model file with: mapped, so that it is not in memory beside the model."""

    @staticmethod
    def load(path: str, map_location: Any = None) -> Any:
        mapped = zipfile.is_zipfile(path)  # files of an old torch are not
        return torch.load(path, map_location=map_location, mmap=mapped, weights_only=False)


@contextmanager
def _mapped(engine: Any) -> Iterator[None]:
    """DeepSpeed's reading, through `_Mapped`."""
    original, engine.checkpoint_engine = engine.checkpoint_engine, _Mapped
    try:
        yield
    finally:
        engine.checkpoint_engine = original


def _find(engine: Any, folder: Path, tag: Any) -> str | None:
    """The folder of the tag, the same on every rank; None where there is no `latest`."""
    group = engine.optimizer.dp_process_group
    latest = universal.LATEST if engine.load_universal_checkpoint() else tags.LATEST
    found = agreed(lambda: tags.find(folder, None if tag is None else str(tag), latest), group)
    check_agreement("the checkpoint", [str(found)], engine.device, group)
    return found


def _open(engine: Any, folder: Path, wanted: Wanted) -> Restorable | None:
    """The checked states of a checkpoint; None where only weights are wanted."""
    group = engine.optimizer.dp_process_group
    if engine.load_universal_checkpoint():
        return agreed(lambda: check_universal(engine, folder, wanted), group)
    facts = agreed(lambda: manifest.read(folder), group)
    if facts is None:
        return agreed(lambda: check_stock(engine, folder, wanted), group)
    names = {manifest.MODEL_FILE, *(facts.files if wanted.states else ())}
    agreed(lambda: manifest.verify(folder, facts, _share(engine, names)), group)
    return agreed(lambda: check(engine, folder, facts, wanted), group)
