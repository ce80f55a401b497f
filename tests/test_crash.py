"""kill -9 at any moment leaves a whole tag under `latest`, from which the run goes on bit for bit."""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import finish, lines, run_and_kill
from foreign_files import MODEL, STATES

from ds_fp8.zero_fp8.checkpoint import manifest, tags
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest, Place, Recipe

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


@pytest.mark.parametrize(
    ("level", "stage", "kills"),
    [
        ("O2", 2, 2),
        ("O2+", 3, 1),
        ("O2, split", 2, 1),
        pytest.param("O2", 2, 20, marks=pytest.mark.slow),
        pytest.param("O2+", 2, 20, marks=pytest.mark.slow),
        pytest.param("O2+", 3, 10, marks=pytest.mark.slow),
        pytest.param("O2+, split", 1, 10, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on(tmp_path: Path, level: str, stage: int, kills: int) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    killed.mkdir()
    unbroken.mkdir()
    rng = random.Random(kills)
    for number in range(kills):
        run_and_kill(killed, level, stage, rng, saving=number % 2 == 0)
        assert_whole(killed)
    last = max(int(line.split()[0]) for line in lines(killed) if line[0].isdigit())
    finish(killed, level, stage, last + 5)
    finish(unbroken, level, stage, last + 5)

    expected = dict(line.split() for line in lines(unbroken) if line[0].isdigit())
    assert len(expected) == last + 5
    saved, loads = 0, 0
    for line in lines(killed):
        word, value = line.split()
        if word == "loaded":
            assert int(value) >= saved, "a tag that was finished is lost"
            loads += 1
        elif word == "saved":
            saved = int(value)
        else:
            assert value == expected[word], f"loss of step {word}"
    assert loads == kills + 1


def assert_whole(folder: Path) -> Manifest:
    """What `latest` names is there, and every byte of it; and no file of `latest` is half-written."""
    name = tags.find(folder, None)
    assert name is not None
    facts = manifest.read(folder / name)
    assert facts is not None
    manifest.verify(folder / name, facts, facts.files)
    return facts


def write_tag(folder: Path, tag: str, step: int) -> None:
    """What a save does in the file system."""
    saving = tags.clear_leftovers(folder, tag, latest=True)
    for name in (MODEL, STATES.format(0)):
        (saving / name).write_text(f"{name} at {step}" * 1000)
    facts = Manifest(
        format_version=manifest.FORMAT_VERSION,
        ds_fp8_version="",
        deepspeed_version="",
        zero_stage=2,
        world_size=1,
        global_steps=step,
        recipe=Recipe(block_size=128, master="fp16", exp_avg="e4m3", exp_avg_sq="fp16", seed=0),
        steps=step,
        clamp_squares=[None],
        loss_scaler={},
        scheduler=False,
        fp32_master=False,
        places=[
            Place(model_file=MODEL, optimizer_files=[STATES.format(0)], parameters={}, module={}, frozen=None)
        ],
        files=manifest.seal(saving, manifest.files_of(saving)),
    )
    tags.publish(folder, tag, facts, latest=True)


def killed_at(change: int, act: Callable[[], None]) -> bool:
    """Run `act` in a process that dies before its n-th change of the file system; whether it died."""
    process = os.fork()
    if process == 0:
        seen = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
            if event in CHANGES or writes:
                if seen == change:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(watch)
        act()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("tag", ["again", "new"])
def test_every_change_of_the_file_system_can_be_the_last(tmp_path: Path, tag: str) -> None:
    """Of a save of a new tag, and of one that `latest` names; after two crashes in a row, too."""
    change = 0
    while True:
        folder = tmp_path / str(change)
        write_tag(folder, "again", 1)
        if not killed_at(change, lambda folder=folder: write_tag(folder, tag, 2)):
            break
        assert assert_whole(folder).steps in (1, 2)
        again = shutil.copytree(folder, tmp_path / f"{change}, twice")
        killed_at(change // 2, lambda again=again: write_tag(again, tag, 3))
        assert assert_whole(again).steps in (1, 2, 3)
        for each in (folder, again):
            write_tag(each, tag, 4)
            assert assert_whole(each).steps == 4
            assert {path.name for path in each.iterdir()} == {"latest", tag, "again"}
        change += 1
    assert change > 8
    assert assert_whole(folder).steps == 2
