"""Checkpoints of stock DeepSpeed are checked like our own: one error on every rank, and nothing touched."""

from pathlib import Path

import foreign_files as files
import pytest
from grids import some_of
from ranks import RankPools

KINDS = ("stock", "stock 3", "universal", "universal 3")


@pytest.fixture(scope="module")
def root(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with and without a scheduler's state."""
    folder = tmp_path_factory.mktemp("foreign")
    for stage, of in ((2, ""), (3, " 3")):
        ranks.run(2, files.save, str(folder / f"stock{of}"), None, stage)
        files.convert(folder / f"stock{of}" / "tag", folder / f"universal{of}" / "tag")
    for kind in KINDS:
        files.without_scheduler(folder / kind, folder / f"unscheduled {kind}")
    return folder


@some_of(["step", "kind"], [*((15, kind) for kind in KINDS), *zip((1, 3, 1, 7), KINDS, strict=True)], 4)
def test_an_entry_that_is_not_what_it_should_be_is_refused(
    ranks: RankPools, root: Path, step: int, kind: str
) -> None:
    """Every entry: left out, of another type, cut short, out of range. Else it loads as if it were whole."""
    first, second = ranks.run(2, files.load_spoiled, str(root), kind, slice(0, None, step))
    assert first == second
    refused = 0
    for what, error, unchanged, as_whole in first:
        refused += bool(error)
        if error:
            assert unchanged, f"{what}: {error}"
            assert f"spoiled {kind}/tag" in error, f"{what}: {error}"
            named = what.split()[0].split("/")[-1]
            assert named in error or "other parameters" in error or "elements and" in error, (
                f"{what}: {error}"
            )
        else:
            assert as_whole or "'last_batch_iteration') below" in what, what
    assert refused > len(first) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_none_is_refused(ranks: RankPools, root: Path, kind: str) -> None:
    """Missing, empty, cut in half, text, a folder."""
    first, second = ranks.run(2, files.load_harmed, str(root), kind)
    assert first == second
    for name, error, unchanged in first:
        assert error.startswith("rank "), name
        named = (name, "expected 2 files", "expected those of all", "zero/first.weight")
        assert any(each in error for each in named), f"{name}: {error}"
        assert unchanged, f"{name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_scheduler_wants_its_state(ranks: RankPools, root: Path, kind: str) -> None:
    for error, unchanged, loaded in ranks.run(
        2, files.load_without_scheduler, str(root), f"unscheduled {kind}"
    ):
        assert f"{files.MODEL}: no scheduler was saved, and this run has one" in error
        assert unchanged
        assert loaded


def test_a_refusal_on_one_rank_is_told_on_all(ranks: RankPools, root: Path) -> None:
    """Of a client's scheduler before anything is touched; of its custom_load_fn without a hang."""
    told = ranks.run(2, files.load_into_stubborn, str(root), seconds=60)
    assert told[0] == told[1]
    error, unchanged, custom = told[0]
    assert error.startswith("rank 1: ")
    assert "expected what Stubborn.load_state_dict takes (LookupError: not from here)" in error
    assert unchanged
    assert custom.startswith("rank 0: ")
    assert custom.endswith("LookupError: nor this")


@pytest.mark.parametrize("bf16", [True, False])
def test_masters_that_were_saved_as_trained_bring_no_graph(ranks: RankPools, root: Path, bf16: bool) -> None:
    """Stock DeepSpeed saves them with requires_grad; FP32 states take them bit for bit."""
    assert ranks.run(2, files.load_as_trained, str(root), "stock", bf16) == [[], []]
