"""A run that may be killed at any moment: it goes on from `latest` and writes down what it sees."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import deepspeed
import split_models
import torch
from engines import batches, build_gpt, ds_config, train_losses, zero3
from ranks import FORKED, free_port, rank_environment, start_server

import ds_fp8

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
WORLD_SIZE = 2
SPLIT = ", split"  # after the level: a model that is split over the two ranks


def steps_of(engine: Any, *, split: bool) -> Callable[[], float]:
    """What takes the next step after those that the engine has, and returns its loss."""
    if split:
        return lambda: float(split_models.run(engine, engine.global_steps, 1)["losses"][0])
    source = batches(engine)
    for _ in range(engine.global_steps):
        next(source)
    return lambda: train_losses(engine, source, 1)[0]


def trace_file(folder: Path) -> Path:
    return folder / "trace"


def run(rank: int, port: int, folder: Path, level: str, stage: int, steps: int) -> None:
    """Train to `steps`; "step loss", "saved step" and "loaded step" go to the trace as they happen."""
    os.environ.update(rank_environment(rank, WORLD_SIZE, port))
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    ds_fp8.register()
    split, zero = level.endswith(SPLIT), zero3() if stage == 3 else {}
    config = ds_config(
        {"opt_level": level.removesuffix(SPLIT)}, stage=stage, zero=zero, bucket=10_000, scheduler=WARMUP
    )
    engine = split_models.engine_of("mpu", config) if split else build_gpt(config)
    with open(trace_file(folder), "a") as trace:

        def tell(text: str) -> None:
            if rank == 0:
                trace.write(text + "\n")
                trace.flush()

        engine.load_checkpoint(str(folder))
        tell(f"loaded {engine.global_steps}")
        step = steps_of(engine, split=split)
        while engine.global_steps < steps:
            loss = step()
            tell(f"{engine.global_steps} {loss.hex()}")
            # Every other tag is new, every other replaces the one that `latest` names, or the one before.
            engine.save_checkpoint(str(folder), tag=(None, "again", "again")[engine.global_steps % 3])
            tell(f"saved {engine.global_steps}")
    torch.distributed.destroy_process_group()
    time.sleep(0.1)


def start(folder: Path, level: str, stage: int, steps: int) -> list[BaseProcess]:
    start_server()
    port = free_port()
    ranks: list[BaseProcess] = []
    for rank in range(WORLD_SIZE):
        ranks.append(FORKED.Process(target=run, args=(rank, port, folder, level, stage, steps), daemon=True))
        ranks[-1].start()
    return ranks


def lines(folder: Path) -> list[str]:
    """The trace; a line that a kill has cut is dropped."""
    text = trace_file(folder).read_text() if trace_file(folder).exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def finish(folder: Path, level: str, stage: int, steps: int) -> None:
    """Run to the end."""
    ranks = start(folder, level, stage, steps)
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0] * WORLD_SIZE


def run_and_kill(folder: Path, level: str, stage: int, rng: random.Random, *, saving: bool) -> None:
    """Kill one rank or all, while a tag is being written or whenever it comes; then those that are left."""
    told = len(lines(folder))
    ranks = start(folder, level, stage, steps=10**6)
    enough = told + rng.randrange(3, 14)  # the first of its steps is saved by then
    wait_for(lambda: len(lines(folder)) >= enough)
    if saving:
        wait_for(lambda: any(folder.glob("*.saving")))
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.1))
    for each in rng.choice([ranks[:1], ranks[1:], ranks]):
        assert each.pid is not None
        os.kill(each.pid, signal.SIGKILL)
    time.sleep(rng.uniform(0, 0.2))  # who is left may go on for a while
    for each in ranks:
        each.kill()
        each.join()


def wait_for(happened: object, seconds: float = 60.0) -> None:
    assert callable(happened)
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)
