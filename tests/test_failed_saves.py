"""A save that fails on one rank fails on all, with the file and the cause; the last whole tag stays."""

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import build, ds_config
from foreign_files import MODEL, Small, attempt, make, same, snapshot
from grids import some_of
from ranks import RankPools

from ds_fp8.zero_fp8.checkpoint import manifest, tags

Fault = Callable[[Any, Path], Any]  # a context in which a save fails


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def small_files(engine: Any, folder: Path) -> Iterator[None]:
    """No file of this process grows beyond some bytes, as on a disk that fills up while it is written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_disk(engine: Any, folder: Path) -> Iterator[None]:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with replaced(torch, "save", no_space):
        yield


def failing(owner: Any, name: str, at: str = "") -> Fault:
    """A function of ours or of the system that fails for paths which end in `at`."""

    @contextmanager
    def fault(engine: Any, folder: Path) -> Iterator[None]:
        original = getattr(owner, name)

        def act(*arguments: Any, **options: Any) -> Any:
            if any(str(each).endswith(at) for each in arguments):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            return original(*arguments, **options)

        with replaced(owner, name, act):
            yield

    return fault


@contextmanager
def broken_state_dict(engine: Any, folder: Path) -> Iterator[None]:
    def state_dict() -> None:
        raise LookupError("lost")

    with replaced(engine.lr_scheduler, "state_dict", state_dict):
        yield


@contextmanager
def unpicklable(engine: Any, folder: Path) -> Iterator[None]:
    yield


FULL = "No space left on device"
FAULTS: dict[str, tuple[Fault, tuple[int, ...], tuple[str, ...]]] = {  # what, on which ranks, the words
    "small files": (small_files, (0, 1), ("File too large",)),
    "full disk": (full_disk, (0, 1), (FULL,)),
    "scheduler": (broken_state_dict, (0, 1), ("LookupError: lost",)),
    "unpicklable client_state": (unpicklable, (0,), (MODEL, "not written: ", "pickle")),
    "seal": (failing(manifest, "_digest_of", "states.pt"), (0, 1), (FULL,)),
    "manifest": (failing(tags.os, "replace", manifest.NAME), (0,), (FULL, manifest.NAME)),
    "rename": (failing(tags.os, "rename", "tag"), (0,), (FULL,)),
    "latest": (failing(tags.os, "replace", "latest"), (0,), (FULL, "latest")),
}


def fail_and_go_on(root: str, what: str, rank: int, stage: int) -> str:
    """The error; `latest` is whole, leftovers go, the next save works."""
    fault, _, _ = FAULTS[what]
    folder = Path(root)
    engine = make({"opt_level": "O1"}, steps=1, stage=stage)
    engine.save_checkpoint(root, tag="whole")
    engine.save_checkpoint(root, tag="tag", save_latest=False)
    client_state = {"epoch": (lambda: 0)} if what == "unpicklable client_state" else {}
    told = []
    for tag in ("tag", "new"):
        if what == "rename" and tag == "new":
            continue
        message = ""
        try:
            if dist.get_rank() == rank:
                with fault(engine, folder):
                    engine.save_checkpoint(root, tag=tag, client_state=client_state)
            else:
                engine.save_checkpoint(root, tag=tag, client_state=client_state)
        except ValueError as error:
            message = str(error)
        dist.barrier()
        told.append(message.replace(f"{folder / tag}", "TAG"))
        assert (folder / "latest").read_text() == "whole"
        found = {path.name for path in folder.iterdir()}
        assert not {each for each in found if each.endswith((tags.SAVING, tags.REPLACED, tags.NEW))}, found
        for each in ("whole", "tag"):
            facts = manifest.read(folder / each)
            assert facts is not None
            manifest.verify(folder / each, facts, facts.files)
        dist.barrier()
    before = snapshot(engine)
    engine.save_checkpoint(root, tag="new")
    fresh = make({"opt_level": "O1"}, seed=4, steps=2, stage=stage)
    assert not attempt(fresh, folder)
    assert same(snapshot(fresh), before)
    for each in (engine, fresh):
        each.destroy()
    return "\n".join(told)


PLACES = [(what, rank) for what, (_, places, _) in FAULTS.items() for rank in places]
WITH_SLICES = [("small files", 0), ("scheduler", 1), ("seal", 1)]  # before, at and after the views of masters
CASES = [(2, *place) for place in PLACES] + sorted(
    [(3, *place) for place in PLACES], key=lambda case: case[1:] not in WITH_SLICES
)


@some_of(["stage", "what", "rank"], CASES, len(PLACES) + len(WITH_SLICES))
def test_every_rank_tells_the_file_and_the_cause(
    ranks: RankPools, tmp_path: Path, stage: int, what: str, rank: int
) -> None:
    told = ranks.run(2, fail_and_go_on, str(tmp_path), what, rank, stage, seconds=100)
    assert told[0] == told[1]
    for message in told[0].splitlines():
        assert message.startswith(f"rank {rank}: ")
        words = [each.replace(MODEL, "states.pt") for each in FAULTS[what][2]]
        assert all(each in message for each in words), message
        if what in ("small files", "full disk", "seal"):
            assert (f"pp_rank_{rank}_" if rank else "_states.pt") in message, message


def into_a_file(root: str) -> str:
    engine = build(ds_config({"opt_level": "O1"}), Small())
    with pytest.raises(ValueError, match="file") as caught:
        engine.save_checkpoint(os.path.join(root, "file", "run"))
    engine.destroy()
    return str(caught.value)


def test_a_file_where_the_save_folder_should_be(ranks: RankPools, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = ranks.run(2, into_a_file, str(tmp_path), seconds=60)
    assert first == second
    assert first.startswith("rank 0: ")
    assert "Not a directory" in first


def other_tags(root: str) -> str:
    engine = build(ds_config({"opt_level": "O1"}), Small())
    with pytest.raises(ValueError, match="ranks disagree about the arguments of save_checkpoint") as caught:
        engine.save_checkpoint(root, tag=f"of rank {dist.get_rank()}")
    assert not os.listdir(root)
    engine.destroy()
    return str(caught.value)


def test_ranks_that_save_under_different_tags_are_told_so(ranks: RankPools, tmp_path: Path) -> None:
    """Or the files of one would be missing in the tag of the other."""
    first, second = ranks.run(2, other_tags, str(tmp_path), seconds=60)
    assert first == second
