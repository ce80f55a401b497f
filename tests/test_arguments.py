"""Ranks that were given different arguments, or one something that is none, are all told so at once."""

import os
from pathlib import Path

from deepspeed import comm as dist
from engines import refusal
from foreign_files import attempt, make, on_first, same, snapshot
from ranks import RankPools
from test_tags import tree

from ds_fp8.zero_fp8.checkpoint import manifest

Told = list[tuple[str, str]]  # what was asked for, the error


def saves(root: str) -> Told:
    """Of saves that must not write anything."""
    rank, engine, told = dist.get_rank(), make({"opt_level": "O1"}, steps=1), []
    engine.save_checkpoint(os.path.join(root, "0"), tag="t")
    before = tree(Path(root))
    dist.barrier()
    for what, folder, options in (
        ("another folder", str(rank), {}),
        ("another new folder", os.path.join("new", str(rank)), {}),
        ("received client_state with module", "0", {"client_state": {"module": 1} if rank else {}}),
        ("client_state of type int", "0", {"client_state": 0 if rank else {}}),
        ("client_state of type list", "0", {"client_state": [1]}),
        ("client_state of type str", "0", {"client_state": "abc"}),
        ("received tag ''", "0", {"tag": "" if rank else "t"}),
        *((f"({type(tag).__name__})", "0", {"tag": tag}) for tag in (b"t", ["t"], {}, ("t",), 1.5, True)),
        ("save_latest", "0", {"save_latest": rank == 0}),
        ("exclude_frozen_parameters", "0", {"exclude_frozen_parameters": rank == 0}),
    ):
        arguments = {"tag": "t", **options}
        told.append(
            (what, refusal(lambda: engine.save_checkpoint(os.path.join(root, folder), **arguments)))  # noqa: B023
        )
        dist.barrier()
        assert tree(Path(root)) == before, what
        dist.barrier()
    for folder in (b"a", 5, None, ""):
        told.append((f"save_dir {folder!r}", refusal(lambda: engine.save_checkpoint(folder))))  # noqa: B023
        told.append((f"load_dir {folder!r}", refusal(lambda: engine.load_checkpoint(folder))))  # noqa: B023
    engine.destroy()
    return told


def assert_told(told: list[Told]) -> None:
    assert told[0] == told[1]
    for what, error in told[0]:
        assert error, what
        assert what in error or what.startswith("another"), error


def test_a_save_starts_only_if_all_ranks_mean_the_same(ranks: RankPools, tmp_path: Path) -> None:
    told = ranks.run(2, saves, str(tmp_path), seconds=60)
    assert_told(told)
    words = dict(told[0])
    for what, names in (("another folder", ("0", "1")), ("another new folder", ("new/0", "new/1"))):
        assert all(str(tmp_path / name) in words[what] for name in names), words[what]


def by_another_name(root: str) -> None:
    """Rank 1 through a link, from another place; there is no folder yet the first time."""
    rank, engine, here = dist.get_rank(), make({"opt_level": "O1"}), os.getcwd()
    on_first(lambda: (Path(root, "real").mkdir(), Path(root, "link").symlink_to("real")))
    if rank:
        os.chdir(os.path.join(root, "link"))
    try:
        for _ in range(2):
            engine.save_checkpoint("new/runs" if rank else os.path.join(root, "real/new/runs"), tag="t")
            dist.barrier()
    finally:
        os.chdir(here)
    found = Path(root, "real/new/runs")
    names = {each.name for each in found.iterdir()}
    assert {each for each in names if not each.endswith(".py")} == {"latest", "t"}, names
    facts = manifest.read(found / "t")
    assert facts is not None
    manifest.verify(found / "t", facts, facts.files)
    assert not attempt(engine, found)
    engine.destroy()


def test_one_folder_may_have_several_names(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, by_another_name, str(tmp_path), seconds=60)


OPTIONS = (
    *("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only"),
    "custom_load_fn",
)


def loads(root: str) -> Told:
    """Of loads that must not touch anything."""
    rank, told = dist.get_rank(), []
    for fp8, kind in (({"opt_level": "O1"}, "ours"), (None, "stock")):
        for seed in (1, 2):
            engine = make(fp8, seed, steps=1)
            engine.save_checkpoint(os.path.join(root, kind, str(seed)), tag="t")
            engine.destroy()
    engine = make({"opt_level": "O1", "checkpoint": {"allow_conversion": True}}, 5, steps=1)
    before = snapshot(engine)
    mine, other = ("ours/1", "ours/2"), ("stock/1", "stock/2")
    for pair in (mine, other, (mine[0], other[0])):
        error = attempt(engine, Path(root, pair[rank]), tag="t")
        assert all(os.path.join(root, each) in error for each in pair), error
        told.append(("load different checkpoints", error))
    for key in OPTIONS:
        value = (lambda src, dst: None) if key == "custom_load_fn" else True
        none = None if key == "custom_load_fn" else False
        told.append((key, attempt(engine, Path(root, mine[0]), tag="t", **{key: value if rank else none})))
    assert same(snapshot(engine), before)
    for kind in ("ours", "stock"):
        assert not attempt(engine, Path(root, kind, "1"), tag="t")
    engine.destroy()
    return told


def test_a_load_starts_only_if_all_ranks_mean_the_same(ranks: RankPools, tmp_path: Path) -> None:
    told = ranks.run(2, loads, str(tmp_path), seconds=60)
    assert_told(told)
