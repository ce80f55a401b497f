"""Bytes on disk and memory while loading."""

import ctypes
import os
import re
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from engines import batches, build_gpt, ds_config, train_losses, zero3
from grids import some_of
from ranks import FORKED, RankPools, free_port, rank_environment, start_server
from train_lm import ByteGPT, Shape

import ds_fp8

MILLION = Shape(layers=2, width=192, heads=2, context=32)  # 1.0 M parameters
LARGE = Shape(layers=4, width=512, heads=2, context=32)  # 12.9 M
BUCKET = 4_000_000
M_MMAP_THRESHOLD = -3  # of malloc.h


def save(folder: str, fp8: dict[str, Any] | None, shape: Shape, stage: int = 2) -> None:
    zero = zero3() if stage == 3 else {}
    engine = build_gpt(ds_config(fp8, stage=stage, zero=zero, bucket=BUCKET), shape)
    train_losses(engine, batches(engine, shape=shape), 1)
    engine.save_checkpoint(folder)
    engine.destroy()


@pytest.mark.parametrize(
    ("fp8", "at_most"),
    [
        ({"opt_level": "O2"}, 9.1),
        ({"opt_level": "O2", "checkpoint": {"fp32_master": False}}, 5.1),
        ({"opt_level": "O2+", "checkpoint": {"fp32_master": False}}, 4.1),
        (None, 12.1),
    ],
    ids=["O2", "O2 without the view", "O2+ without the view", "stock"],
)
def test_bytes_of_the_optimizer_files(
    ranks: RankPools, tmp_path: Path, fp8: dict[str, Any] | None, at_most: float
) -> None:
    ranks.run(2, save, str(tmp_path), fp8, MILLION)
    parameters = sum(each.numel() for each in ByteGPT(MILLION).parameters())
    written = sum(path.stat().st_size for path in tmp_path.rglob("*_optim_states.pt"))
    assert at_most - 0.15 < written / parameters <= at_most


def load(pipe: Connection, folder: str, port: int, level: str, stage: int, options: dict[str, Any]) -> None:
    """Everything that a run has is there and touched; then load when told to."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # memory that is freed goes back at once
    os.environ.update(rank_environment(0, 1, port))
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    ds_fp8.register()
    zero = zero3() if stage == 3 else {}
    config = ds_config({"opt_level": level}, stage=stage, zero=zero, bucket=BUCKET, micro_batch=1)
    engine = build_gpt(config, LARGE, seed=1)
    train_losses(engine, batches(engine, shape=LARGE), 1)
    pipe.send("ready")
    pipe.recv()
    engine.load_checkpoint(folder, **options)
    pipe.send("loaded")
    pipe.recv()


def anonymous_bytes(process: int | None) -> int:
    """Memory that is not a file's: what a mapped checkpoint takes can be dropped at any time."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@some_of(
    ["saved", "stage", "options", "level"],
    [
        [2, 2, {}, "O2"],
        [2, 2, {}, "O2+"],
        [3, 3, {}, "O2+"],
        [3, 3, {"load_module_only": True}, "O2"],
        [2, 3, {"load_optimizer_states": False}, "O2+"],
        [3, 2, {"load_module_only": True}, "O2+"],
    ],
    4,
)
def test_loading_takes_a_bucket_beside_the_state(
    ranks: RankPools, tmp_path: Path, saved: int, stage: int, options: dict[str, Any], level: str
) -> None:
    ranks.run(1, save, str(tmp_path), {"opt_level": level}, LARGE, saved)
    start_server()
    ours, theirs = FORKED.Pipe()
    arguments = (theirs, str(tmp_path), free_port(), level, stage, options)
    process = FORKED.Process(target=load, args=arguments, daemon=True)
    process.start()
    assert ours.recv() == "ready"
    before = peak = anonymous_bytes(process.pid)
    ours.send("go")
    while not ours.poll(0.0005):
        peak = max(peak, anonymous_bytes(process.pid))
    assert ours.recv() == "loaded"
    process.kill()
    process.join()
    assert peak - before <= 4 * BUCKET
