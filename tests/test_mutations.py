"""A damaged or foreign checkpoint is refused by name, and the engine is as it was."""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import (
    SMALL,
    assert_same_bits,
    batches,
    build_gpt,
    ds_config,
    state_bits,
    train_losses,
    weight_bits,
)
from foreign_files import MODEL, STATES
from ranks import RankPools
from train_lm import Shape

from ds_fp8.zero_fp8.checkpoint import manifest

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
CONFIG = ds_config({}, bucket=10_000, scheduler=WARMUP)
OTHER_MODEL = Shape(layers=1, width=32, heads=2, context=32)
FILES = [MODEL, STATES.format(0), STATES.format(1), manifest.NAME]

Mutation = Callable[[Path, random.Random], str]  # changes a tag's folder, returns the name it must be told by


def save(folder: str, shape: Shape, steps: int) -> None:
    torch.manual_seed(0)
    engine = build_gpt(CONFIG, shape)
    train_losses(engine, batches(engine, shape=shape), steps)
    engine.save_checkpoint(folder, tag="tag")
    engine.destroy()


def flip(tag: Path, rng: random.Random) -> str:
    """One bit of one file."""
    path = tag / rng.choice(FILES)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path.name


def cut(tag: Path, rng: random.Random) -> str:
    path = tag / rng.choice(FILES)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return path.name


def remove(tag: Path, rng: random.Random) -> str:
    path = tag / rng.choice(FILES)
    path.unlink()
    return path.name


def swap(tag: Path, rng: random.Random) -> str:
    """Two of the tag's files with each other."""
    first, second = (tag / name for name in rng.sample(FILES[:3], 2))
    first.rename(tag / "aside")
    second.rename(first)
    (tag / "aside").rename(second)
    return "states.pt"


def borrow(tag: Path, rng: random.Random) -> str:
    """A file of a later tag of the same run."""
    name = rng.choice(FILES)
    shutil.copy(tag.parent.parent / "later" / "tag" / name, tag / name)
    return name if name != manifest.NAME else "states.pt"


def poison(tag: Path, rng: random.Random) -> str:
    """A model file of the same size that leaves a mark when it is unpickled."""
    path = tag / MODEL
    path.write_bytes(pickle.dumps(Mark(str(tag.parent / "unpickled"))).ljust(path.stat().st_size, b"."))
    return MODEL


class Mark:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def empty_latest(tag: Path, rng: random.Random) -> str:
    (tag.parent / "latest").write_text(rng.choice(["", "\n", " "]))
    return "latest"


def lost_latest(tag: Path, rng: random.Random) -> str:
    (tag.parent / "latest").write_text("elsewhere")
    return "elsewhere"


def another_model(tag: Path, rng: random.Random) -> str:
    shutil.rmtree(tag)
    shutil.copytree(tag.parent.parent / "other" / "tag", tag)
    return manifest.NAME


def reseal(tag: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that is whole and says something else; checksums follow the files."""
    path = tag / manifest.NAME
    told = json.loads(path.read_text())
    del told["sha256"]
    change(told)
    told["files"] = {
        name: each.model_dump() for name, each in manifest.seal(tag, sorted(told["files"])).items()
    }
    path.write_text(sealed(told))


def sealed(told: dict[str, Any]) -> str:
    """The text of a manifest that says this, whether it makes sense or not."""
    body = json.dumps(told, indent=1)
    return f'{body[:-2]},\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def any_parameter(told: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """What a manifest says of one of the parameters."""
    parameters = told["places"][0]["parameters"]
    parameter: dict[str, Any] = parameters[rng.choice(sorted(parameters))]
    return parameter


def shape_in_manifest(tag: Path, rng: random.Random) -> str:
    def change(told: dict[str, Any]) -> None:
        parameter = any_parameter(told, rng)
        parameter["shape"][0] += rng.choice([-1, 1, 128])

    reseal(tag, change)
    return manifest.NAME


def block_in_manifest(tag: Path, rng: random.Random) -> str:
    def change(told: dict[str, Any]) -> None:
        parameter = any_parameter(told, rng)
        file, first, end = parameter["blocks"][-1]
        parameter["blocks"][-1] = (file, first, end - 1)

    reseal(tag, change)
    return "tag/"


def files_of_a_place(tag: Path, rng: random.Random) -> str:
    """The ranks' files are named for each other's blocks."""
    reseal(tag, lambda told: told["places"][0]["optimizer_files"].reverse())
    return "states.pt"


def model_file_of_a_place(tag: Path, rng: random.Random) -> str:
    name = STATES.format(rng.randrange(2))
    reseal(tag, lambda told: told["places"][0].update(model_file=name))
    return name


def file_that_a_place_lacks(tag: Path, rng: random.Random) -> str:
    """Blocks are in a third file of two."""
    reseal(tag, lambda told: any_parameter(told, rng)["blocks"][-1].__setitem__(0, rng.choice([2, -1])))
    return manifest.NAME


def file_that_is_not_listed(tag: Path, rng: random.Random) -> str:
    reseal(tag, lambda told: told["places"][0]["optimizer_files"].__setitem__(rng.randrange(2), "lost.pt"))
    return "lost.pt"


def two_places(tag: Path, rng: random.Random) -> str:
    reseal(tag, lambda told: told["places"].append(told["places"][0]))
    return manifest.NAME


def version_3(tag: Path, rng: random.Random) -> str:
    reseal(tag, lambda told: told.update(format_version=3))
    return manifest.NAME


def shape_in_file(tag: Path, rng: random.Random) -> str:
    """A state with a row less, in a file whose checksum is right."""
    name = STATES.format(rng.randrange(2))
    file = torch.load(tag / name, weights_only=True)
    parameters = file["optimizer_state_dict"]["base_optimizer_state"]["fp8"]["parameters"]
    entry = parameters[rng.choice(sorted(parameters))]
    key = rng.choice([key for key in entry if key != "blocks"])
    entry[key] = rng.choice([entry[key][:-1], entry[key].to(torch.int32), None])
    torch.save(file, tag / name)
    reseal(tag, lambda told: None)
    return name


def not_ours(tag: Path, rng: random.Random) -> str:
    """An optimizer file that would have to be unpickled, with the right checksum."""
    name = STATES.format(rng.randrange(2))
    torch.save({"optimizer_state_dict": Mark(str(tag.parent / "unpickled"))}, tag / name)
    reseal(tag, lambda told: None)
    return name


def param_groups(tag: Path, rng: random.Random) -> str:
    reseal(tag, lambda told: told["clamp_squares"].append(None))
    return manifest.NAME


def no_scheduler(tag: Path, rng: random.Random) -> str:
    reseal(tag, lambda told: told.update(scheduler=False))
    return manifest.NAME


MUTATIONS: list[Mutation] = [
    *[flip] * 6,
    *[cut] * 3,
    *[remove] * 2,
    *[borrow] * 2,
    swap,
    poison,
    empty_latest,
    lost_latest,
    another_model,
    shape_in_manifest,
    block_in_manifest,
    files_of_a_place,
    model_file_of_a_place,
    file_that_a_place_lacks,
    file_that_is_not_listed,
    two_places,
    version_3,
    shape_in_file,
    not_ours,
    param_groups,
    no_scheduler,
]


def snapshot(engine: Any) -> dict[str, Any]:
    optimizer = engine.optimizer.optimizer
    return {
        "weights": weight_bits(engine),
        "buffers": {name: each.clone() for name, each in engine.module.named_buffers()},
        "states": state_bits(engine.optimizer),
        "counters": (
            engine.global_steps,
            engine.global_samples,
            engine.skipped_steps,
            optimizer.steps,
            list(optimizer.clamp_squares),
            repr([{**group, "params": None} for group in optimizer.param_groups]),
            repr(engine.lr_scheduler.state_dict()),
            dict(vars(engine.optimizer.loss_scaler)),
        ),
    }


def assert_unchanged(engine: Any, before: dict[str, Any]) -> None:
    now = snapshot(engine)
    assert now["counters"] == before["counters"]
    for key in ("weights", "buffers", "states"):
        assert_same_bits(now[key], before[key])


def mutate_and_load(root: str, count: int) -> list[tuple[str, str, str]]:
    """What was done, the name that the error must have, and the error."""
    engine = build_gpt(CONFIG, seed=5)
    train_losses(engine, batches(engine, seed=3), 2)
    before, told = snapshot(engine), []
    for number in range(count):
        mutation = MUTATIONS[number % len(MUTATIONS)]
        folder = Path(root, f"mutated{number}")
        expected = [""]
        if dist.get_rank() == 0:
            shutil.copytree(Path(root, "good"), folder)
            expected = [mutation(folder / "tag", random.Random(number))]
        torch.distributed.broadcast_object_list(expected)
        try:
            engine.load_checkpoint(str(folder))
            message = "loaded"
        except ValueError as error:
            message = str(error)
        told.append((f"{mutation.__name__} {number}", expected[0], message))
        assert_unchanged(engine, before)
        assert not os.path.exists(folder / "unpickled")
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    engine.load_checkpoint(os.path.join(root, "good"))
    with pytest.raises(AssertionError):
        assert_unchanged(engine, before)
    engine.destroy()
    return told


@pytest.mark.parametrize("count", [len(MUTATIONS), pytest.param(200, marks=pytest.mark.slow)])
def test_mutated_checkpoints_are_refused(ranks: RankPools, tmp_path: Path, count: int) -> None:
    ranks.run(2, save, str(tmp_path / "good"), SMALL, 3)
    ranks.run(2, save, str(tmp_path / "later"), SMALL, 4)
    ranks.run(2, save, str(tmp_path / "other"), OTHER_MODEL, 3)
    for told in ranks.run(2, mutate_and_load, str(tmp_path), count):
        assert len(told) == count
        for what, name, message in told:
            assert name in message, f"{what}: {message}"
            assert message.startswith("rank "), f"{what}: {message}"
