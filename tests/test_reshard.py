"""A checkpoint moves between world sizes, ZeRO stages and bucket sizes without losing a bit."""

import os
from pathlib import Path
from typing import Any

import foreign_files as files
import torch
from engines import (
    assert_same_bits,
    batches,
    build_gpt,
    ds_config,
    packed,
    train_losses,
    weight_bits,
    whole_states,
)
from grids import some_of
from ranks import RankPools
from torch import Tensor

from ds_fp8.zero_fp8.checkpoint import manifest

FORMATS = {
    "O1": {"opt_level": "O1"},
    "O2": {"opt_level": "O2"},
    "O2+": {"opt_level": "O2+"},
    "split8": {"block_size": 32, "optimizer": {"master_dtype": "split8", "exp_avg_dtype": "e5m2"}},
}


def config(fp8: dict[str, Any], **options: Any) -> dict[str, Any]:
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    return ds_config(fp8, scheduler=warmup, **options)


def facts(engine: Any) -> dict[str, Any]:
    """This rank's packed states, and what every rank has alike."""
    optimizer = engine.optimizer.optimizer
    return {
        "packed": packed(engine.optimizer),
        "weights": weight_bits(engine),
        "steps": optimizer.steps,
        "clamp": list(optimizer.clamp_squares),
        "groups": [
            {key: each for key, each in group.items() if key != "params"} for group in optimizer.param_groups
        ],
        "global_steps": engine.global_steps,
        "scheduler": engine.lr_scheduler.state_dict(),
    }


def train_and_save(folder: str, ds_config: dict[str, Any]) -> dict[str, Any]:
    engine = build_gpt(ds_config)
    train_losses(engine, batches(engine), 3)
    engine.save_checkpoint(folder, tag="start")
    found = facts(engine)
    engine.destroy()
    return found


def move(source: str, target: str, ds_config: dict[str, Any]) -> dict[str, Any]:
    """Load and save, without training between."""
    engine = build_gpt(ds_config, seed=7)
    path, _ = engine.load_checkpoint(source)
    assert path is not None
    engine.save_checkpoint(target, tag="moved")
    found = facts(engine)
    engine.destroy()
    return found


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    a, b = (
        {key: each for key, each in run[0].items() if key not in ("packed", "weights")}
        for run in (first, second)
    )
    assert a == b
    assert_same_bits(*(whole_states([each["packed"] for each in run]) for run in (first, second)))
    for mine, other in zip(first, second, strict=False):
        assert_same_bits(mine["weights"], other["weights"])


@some_of(["level"], [["O2"], ["split8"], ["O1"], ["O2+"]], 2)
def test_4_to_2_to_1_to_3_to_4_ranks(ranks: RankPools, tmp_path: Path, level: str) -> None:
    fp8 = FORMATS[level]
    start = ranks.run(4, train_and_save, str(tmp_path / "0"), config(fp8, bucket=10_000))
    for hop, world_size in enumerate((2, 1, 3, 4)):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        assert_same(start, ranks.run(world_size, move, *folders, config(fp8, bucket=10_000)))


@some_of(["level"], [["O2+"], ["O2"]], 1)
def test_other_stages_and_bucket_sizes(ranks: RankPools, tmp_path: Path, level: str) -> None:
    fp8 = FORMATS[level]
    start = ranks.run(2, train_and_save, str(tmp_path / "0"), config(fp8, stage=1, bucket=10_000))
    for hop, (stage, bucket) in enumerate([(2, 500), (1, 10**6), (2, 3_000), (1, 10_000)]):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        assert_same(start, ranks.run(2, move, *folders, config(fp8, stage=stage, bucket=bucket)))


def files_opened(folder: str) -> list[str]:
    """Optimizer files that this rank opens to load."""
    engine = build_gpt(ds_config({}, bucket=10**6), seed=7)
    opened: list[str] = []
    original = torch.load

    def load(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(os.path.basename(path))
        return original(path, *arguments, **options)

    torch.load = load
    try:
        engine.load_checkpoint(folder)
    finally:
        torch.load = original
        engine.destroy()
    return sorted({each for each in opened if "optim_states" in each})


def test_a_rank_opens_only_what_it_needs(ranks: RankPools, tmp_path: Path) -> None:
    """Of one bucket in four files, half a rank each needs two, and one more where blocks do not divide."""
    ranks.run(4, train_and_save, str(tmp_path), config({}, bucket=10**6))
    opened = ranks.run(2, files_opened, str(tmp_path))
    names = [files.STATES.format(rank) for rank in range(4)]
    assert opened[0] == names[:2]
    assert opened[1] == names[1:]


def test_the_manifest_says_where_every_block_lies(ranks: RankPools, tmp_path: Path) -> None:
    saved = ranks.run(3, train_and_save, str(tmp_path), config({}, bucket=10_000))
    written = manifest.read(tmp_path / "start")
    assert written is not None
    assert written.world_size == 3
    place = written.places[0]
    assert place.optimizer_files == [files.STATES.format(rank) for rank in range(3)]
    assert set(written.files) == {place.model_file, *place.optimizer_files}
    for name, parameter in place.parameters.items():
        blocks = -(-torch.Size(parameter.shape).numel() // 128)
        ends = [0, *(end for _, _, end in parameter.blocks)]
        assert [first for _, first, _ in parameter.blocks] == ends[:-1]
        assert ends[-1] == blocks
        for file, first, end in parameter.blocks:
            entry: dict[str, Tensor] = saved[file]["packed"][name]  # a rank's file
            assert entry["blocks"] == [first, end]
