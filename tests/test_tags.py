"""Names of tags: whatever they are, no save removes or hides another whole tag."""

from pathlib import Path
from typing import Any

import pytest
from engines import ds_config
from foreign_files import MODEL, Small, attempt, build, on_first
from ranks import RankPools
from test_crash import write_tag

from ds_fp8.cli import main
from ds_fp8.zero_fp8.checkpoint import files, manifest, tags

REFUSED = (
    *("latest", "latest_universal", "latest.new", "ds_fp8_manifest.json", "zero_to_fp32.py"),
    *("..", ".", "a/b", "/tmp/a", "a/", " a", "a ", "a\n", "a\0", "x.saving", "x.replaced", "x" * 250),
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below, with the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("tag", REFUSED)
def test_a_name_that_cannot_be_kept_apart_is_refused_before_anything_is_written(
    tmp_path: Path, tag: str
) -> None:
    write_tag(tmp_path, "x", 1)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"^tag: received .*, allowed: "):
        write_tag(tmp_path, tag, 2)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("tag", ["x.new", "y", "latest.old", "x.savings", "X", "tag with spaces", "größe"])
def test_other_names_do_not_touch_each_other(tmp_path: Path, tag: str) -> None:
    write_tag(tmp_path, "x", 1)
    before = tree(tmp_path / "x")
    write_tag(tmp_path, tag, 2)
    assert tree(tmp_path / "x") == before
    assert tags.find(tmp_path, None) == tag
    facts = manifest.read(tmp_path / tag)
    assert facts is not None
    assert facts.steps == 2


@pytest.mark.parametrize("name", ["x.saving", "x.replaced"])
def test_a_tag_of_stock_deepspeed_stays_where_a_save_would_pass(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / MODEL).write_text("whole")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}: not what a save of x has left"):
        write_tag(tmp_path, "x", 1)
    assert tree(tmp_path) == before


def test_a_tag_that_latest_names_stays_whatever_it_is_called(tmp_path: Path) -> None:
    write_tag(tmp_path, "y", 1)
    (tmp_path / "y").rename(tmp_path / "x.saving")
    tags.write(tmp_path / "latest", "x.saving")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="not what a save of x has left"):
        write_tag(tmp_path, "x", 2)
    assert tree(tmp_path) == before


def test_what_others_have_put_into_a_tag_moves_on_into_its_successor(tmp_path: Path) -> None:
    """A whole tag, too, that somebody has saved into the folder of another."""
    write_tag(tmp_path, "x", 1)
    (tmp_path / "x" / "config.json").write_text("{}")
    write_tag(tmp_path / "x", "inner", 5)
    inner = tree(tmp_path / "x" / "inner")
    write_tag(tmp_path, "x", 2)
    assert (tmp_path / "x" / "config.json").read_text() == "{}"
    assert tree(tmp_path / "x" / "inner") == inner
    facts = manifest.read(tmp_path / "x")
    assert facts is not None
    assert facts.steps == 2
    assert {each.name for each in tmp_path.iterdir()} == {"x", "latest"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("latest", "latest: a folder, expected a file with the name of a tag"),
        ("file", "file: a file, expected a folder"),
    ],
)
def test_what_stands_in_the_way_of_a_save_is_said_first(tmp_path: Path, name: str, words: str) -> None:
    if name == "latest":
        (tmp_path / "latest").mkdir()
    else:
        (tmp_path / "file").write_text("")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=words):
        write_tag(tmp_path, "x" if name == "latest" else "file", 1)
    assert tree(tmp_path) == before


def test_only_files_that_the_manifest_lists_go_with_a_tag(tmp_path: Path) -> None:
    write_tag(tmp_path, "x", 1)
    (tmp_path / "x" / "my_model_states.pt").write_text("mine")
    write_tag(tmp_path, "x", 2)
    assert (tmp_path / "x" / "my_model_states.pt").read_text() == "mine"


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_a_link_under_the_name_of_a_tag_is_refused_first(tmp_path: Path, where: str) -> None:
    (tmp_path / "x").symlink_to(where)
    with pytest.raises(ValueError, match="x: a link, expected a folder or nothing"):
        write_tag(tmp_path, "x", 1)
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def latest_is(folder: Path, what: str) -> str:
    """Bring `latest` into a state; the words for it."""
    write_tag(folder, "kept", 1)
    latest = folder / "latest"
    latest.unlink()
    if what == "a folder":
        latest.mkdir()
        (latest / "x").write_text("")
        return "latest: a folder that holds x, expected a file with the name of a tag"
    if what == "a broken link":
        latest.symlink_to("nowhere")
        return "latest: a link that leads nowhere"
    if what == "an empty tag":
        (folder / "empty").mkdir()
        latest.write_text("empty")
        return "empty: an empty folder (named by"
    texts = {"empty": "", "lost": "elsewhere", "garbage": "a\0b", "a file": "latest"}
    words = {
        "empty": "latest: empty, expected the name of a tag; there are kept",
        "lost": "elsewhere: no such folder (named by",
        "garbage": "expected the name of a tag; there are kept",
        "a file": "latest: a file, not a folder (named by",
    }
    latest.write_text(texts[what])
    return words[what]


LATEST = ("a folder", "a broken link", "an empty tag", "empty", "lost", "garbage", "a file")


@pytest.mark.parametrize("what", LATEST)
def test_a_latest_that_names_no_tag_is_told_by_the_commands(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = latest_is(tmp_path, what)
    for command in (["inspect"], ["export", str(tmp_path / "out")], ["to-universal", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stopped:
            main([command[0], str(tmp_path), *command[1:]])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["latest", "latest_universal", "a.saving", " "])
def test_the_commands_write_no_folder_that_stands_in_the_way(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(ValueError, match=r"allowed: (any name but|a name)"),
        files.new_folder(tmp_path / name),
    ):
        pass
    assert not any(tmp_path.iterdir())


def in_an_engine(root: str) -> list[Any]:
    """What loads and saves of an engine say, on this rank."""
    engine = build(ds_config({"opt_level": "O1"}), Small())
    folder, told = Path(root, "saved"), []
    engine.save_checkpoint(str(folder), tag="good")
    before = tree(folder)
    for tag in ("latest", "../a", "good.saving"):
        with pytest.raises(ValueError, match="allowed: ") as caught:
            engine.save_checkpoint(str(folder), tag=tag)
        told.append(str(caught.value))
    assert tree(folder) == before
    for number, what in enumerate(LATEST):
        place = Path(root, str(number))
        on_first(
            lambda place=place, what=what: place.with_suffix(".words").write_text(latest_is(place, what))
        )
        error = attempt(engine, place)
        assert place.with_suffix(".words").read_text() in error
        told.append(error)
    engine.destroy()
    return told


def test_engines_tell_the_same_on_every_rank(ranks: RankPools, tmp_path: Path) -> None:
    first, second = ranks.run(2, in_an_engine, str(tmp_path), seconds=100)
    assert first == second
    assert all(each.startswith("rank 0: ") for each in first)
