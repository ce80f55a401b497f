"""The arguments of save_checkpoint and load_checkpoint, and who shares a folder: the same on every rank.

A rank that objects alone, or goes another way than the others, would leave them waiting, or part a
checkpoint in two. So all of this is asked before anything is written or loaded.
"""

import hashlib
import os
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from ds_fp8.zero_fp8.checkpoint.manifest import Manifest, render, share
from ds_fp8.zero_fp8.comm.agreement import agreed, check_agreement, gather_objects

RESERVED = (  # what DeepSpeed keeps in its model file; it writes client_state over it
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config"),
    "ds_version",
)
ONE_FOLDER = (
    "allowed: one folder that all ranks see, or with checkpoint.use_node_local_storage one that all ranks of "
    "a node see"
)


def is_first(engine: Any) -> bool:
    """Whether this is the first rank of those that share a folder: a node's, or all."""
    return bool(first_of(engine) == engine.global_rank)


def first_of(engine: Any) -> int:
    """The first rank of those that share this rank's folder."""
    return int(engine.global_rank - engine.local_rank) if engine.use_node_local_storage() else 0


def checksum_share(engine: Any, names: Iterable[str], of_ranks: Iterable[Sequence[str]]) -> list[str]:
    """The files whose checksums this rank computes."""
    ranks = engine.optimizer.ranks
    return share(names, of_ranks, ranks.rank, ranks.size, first=is_first(engine))


# Of one rank


def check_place(call: str, name: str, folder: Any, tag: Any) -> None:
    """Refuse, by a ValueError, what is neither a folder nor a tag."""
    path = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
    if not isinstance(path, str) or not path:
        raise ValueError(f"{call}: received {name} {folder!r}, allowed: the path of a folder")
    whole = isinstance(tag, Integral) and not isinstance(tag, bool)
    if tag == "" or not (tag is None or whole or isinstance(tag, str)):
        raise ValueError(
            f"{call}: received tag {str(tag)[:200]!r} ({type(tag).__name__}), allowed: a name, a whole "
            "number or None"
        )


def check_client_state(client_state: Any) -> None:
    """Refuse, by a ValueError, what DeepSpeed cannot keep, or would keep in place of its own."""
    if client_state is not None and not isinstance(client_state, Mapping):
        raise ValueError(
            f"save_checkpoint: received client_state of type {type(client_state).__name__}, allowed: a dict"
        )
    reserved = [key for key in client_state or () if key in RESERVED]
    if reserved:
        raise ValueError(
            f"save_checkpoint: received client_state with {', '.join(reserved)}, allowed: any keys but "
            f"those of DeepSpeed ({', '.join(RESERVED)})"
        )


# Of all ranks


def agree_on(engine: Any, call: str, options: Mapping[str, Any]) -> None:
    """Raises the same ValueError on every rank if an option differs."""
    facts = [f"{key} {value!r}" for key, value in options.items()]
    check_agreement(f"the arguments of {call}", facts, engine.device, engine.optimizer.ranks)


def check_same_folder(engine: Any, folder: Path) -> None:
    """Ranks that are to write one checkpoint write into one folder, whatever each calls it.

    The first of them puts a file there, or into the nearest folder above it that exists, and the others
    look for it. Raises the same ValueError on every rank.
    """
    ranks, first = engine.optimizer.ranks, first_of(engine)
    path = agreed(folder.resolve, ranks, folder)
    above = agreed(lambda: _existing(path), ranks, folder)
    mark = above / f".ds_fp8_{uuid.uuid4().hex}"
    try:
        agreed(lambda: mark.touch() if is_first(engine) else None, ranks, folder)
        below = path.relative_to(above).parts
        marks = dict(gather_objects((engine.global_rank, _Mark(below, mark.name, str(folder))), ranks))
        agreed(lambda: _look_for(marks[first], folder, path, first), ranks, folder)
    finally:
        if is_first(engine):
            with suppress(OSError):
                mark.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Mark:
    """A file above the folder to save into, and how a rank calls that folder."""

    below: tuple[str, ...]  # from the file's folder to the one to save into
    name: str
    folder: str


def _look_for(mark: _Mark, folder: Path, path: Path, first: int) -> None:
    """Raise ValueError if this rank does not see the marker file of rank `first` from its folder."""
    parts = path.parts[: len(path.parts) - len(mark.below)]
    if path.parts[len(parts) :] != mark.below or not _sees(Path(*parts), mark.name):
        raise ValueError(
            f"save_checkpoint: received save_dir {folder}, which is not the folder {mark.folder} of rank "
            f"{first}; {ONE_FOLDER}"
        )


def _existing(path: Path) -> Path:
    """The nearest folder at or above a path."""
    return next(above for above in (path, *path.parents) if above.is_dir())


def _sees(folder: Path, name: str) -> bool:
    # A listing asks a network file system anew.
    return (folder / name).exists() or (folder.is_dir() and name in os.listdir(folder))


@dataclass(frozen=True)
class _Found:
    """The checkpoint that a rank has found."""

    rank: int
    node: int  # its first rank
    folder: str
    common: str  # what nodes have in common
    files: str  # a digest of the checkpoint's files


def check_same_checkpoint(engine: Any, folder: Path, manifest: Manifest | None) -> None:
    """Ranks that load one tag load one checkpoint. Raises the same ValueError on every rank.

    manifest: None if it has none. On storage of a node, nodes have other files of the same checkpoint.
    """
    ranks, node = engine.optimizer.ranks, first_of(engine)
    common = agreed(lambda: "" if manifest is None else manifest.model_dump_json(exclude={"files"}), ranks)
    files = agreed(lambda: _digest(folder, manifest), ranks, folder)
    by_rank = gather_objects(_Found(engine.global_rank, node, str(folder), common, files), ranks)
    for found in by_rank:
        expected = next(other for other in by_rank if other.node == found.node)
        if found.common != by_rank[0].common:
            expected = by_rank[0]
        elif found.files == expected.files:
            continue
        raise ValueError(
            f"load_checkpoint: ranks would load different checkpoints: rank {expected.rank} that in "
            f"{expected.folder}, rank {found.rank} that in {found.folder}; {ONE_FOLDER}"
        )


def _digest(folder: Path, manifest: Manifest | None) -> str:
    """A digest of a checkpoint's files, without reading them."""
    if manifest is not None:
        return hashlib.sha256(render(manifest).encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0{_sums(path)}\n".encode())
    return digest.hexdigest()


def _sums(path: Path) -> list[int]:
    """The checksums that torch.save leaves of every part of a file; none in files of an old torch."""
    try:
        with zipfile.ZipFile(path) as file:
            return [part.CRC for part in file.infolist()]
    except (OSError, zipfile.BadZipFile):
        return []


@contextmanager
def as_data_parallel(engine: Any) -> Iterator[None]:
    """Let DeepSpeed name and read files without an mpu that is none of model parallelism.

    DeepSpeed before 0.19.8 takes the ranks of a sequence for those of a model.
    """
    mpu = engine.mpu
    if engine.optimizer.ranks.peers is None:
        engine.mpu = None
    try:
        yield
    finally:
        engine.mpu = mpu
