"""The arguments of save_checkpoint and load_checkpoint: checked, and the same on every rank.

A rank that objects alone, or goes another way than the others, would leave them waiting, or part a
checkpoint in two. So all of this is asked before anything is written or loaded.
"""

import hashlib
import os
import uuid
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest
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
    taken = [key for key in client_state or () if key in RESERVED]
    if taken:
        raise ValueError(
            f"save_checkpoint: received client_state with {', '.join(taken)}, allowed: any keys but those of "
            f"DeepSpeed ({', '.join(RESERVED)})"
        )


# Of all ranks


def agree_on(engine: Any, call: str, options: Mapping[str, Any]) -> None:
    """Raises the same ValueError on every rank if an option differs."""
    facts = [f"{key} {each!r}" for key, each in options.items()]
    check_agreement(f"the arguments of {call}", facts, engine.device, engine.optimizer.dp_process_group)


def check_same_folder(engine: Any, folder: Path) -> None:
    """Ranks that are to write one checkpoint write into one folder, whatever each calls it.

    The first of them puts a file there, or into the nearest folder above it that exists, and the others
    look for it. Raises the same ValueError on every rank.
    """
    group, first = engine.optimizer.dp_process_group, first_of(engine)
    token = f".ds_fp8_{uuid.uuid4().hex}"
    path = agreed(folder.resolve, group, folder)
    above = agreed(lambda: _existing(path), group, folder)

    def put() -> None:
        if is_first(engine):
            (above / token).touch()

    def look() -> None:
        below, there, said = places[first]
        parts = len(below)
        same = path.parts[len(path.parts) - parts :] == below
        if not same or not _sees(Path(*path.parts[: len(path.parts) - parts]), there):
            raise ValueError(
                f"save_checkpoint: received save_dir {folder}, which is not the folder {said} of rank "
                f"{first}; {ONE_FOLDER}"
            )

    try:
        agreed(put, group, folder)
        places = dict(
            gather_objects((engine.global_rank, (path.relative_to(above).parts, token, str(folder))), group)
        )
        agreed(look, group, folder)
    finally:
        if is_first(engine):
            with suppress(OSError):
                (above / token).unlink(missing_ok=True)


def _existing(path: Path) -> Path:
    """The nearest folder at or above a path."""
    return next(each for each in (path, *path.parents) if each.is_dir())


def _sees(folder: Path, name: str) -> bool:
    # A listing asks a network file system anew.
    return (folder / name).exists() or (folder.is_dir() and name in os.listdir(folder))


def check_same_checkpoint(engine: Any, folder: Path, facts: Manifest | None) -> None:
    """Ranks that load one tag load one checkpoint. Raises the same ValueError on every rank.

    facts: its manifest, if it has one. On storage of a node, nodes have other files of the same checkpoint.
    """
    group, node = engine.optimizer.dp_process_group, first_of(engine)
    own = agreed(lambda: _of_all(facts), group), agreed(lambda: _of_files(folder, facts), group, folder)
    told = gather_objects((engine.global_rank, node, str(folder), *own), group)
    lead = told[0]
    for rank, other_node, theirs, common, files in told:
        peer = next(each for each in told if each[0] == other_node)
        if common != lead[3]:
            peer = lead
        elif files == peer[4]:
            continue
        raise ValueError(
            f"load_checkpoint: ranks would load different checkpoints: rank {peer[0]} that in {peer[2]}, "
            f"rank {rank} that in {theirs}; {ONE_FOLDER}"
        )


def _of_all(facts: Manifest | None) -> str:
    """What all nodes have in common."""
    return "" if facts is None else facts.model_dump_json(exclude={"files"})


def _of_files(folder: Path, facts: Manifest | None) -> str:
    """A digest of a checkpoint's files, without reading them."""
    if facts is not None:
        return hashlib.sha256(manifest.render(facts).encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0{_sums(path)}\n".encode())
    return digest.hexdigest()


def _sums(path: Path) -> list[int]:
    """The checksums that torch.save leaves of every part of a file; none in files of an old torch."""
    try:
        with zipfile.ZipFile(path) as file:
            return [each.CRC for each in file.infolist()]
    except (OSError, zipfile.BadZipFile):
        return []
