"""Where a step of a Hugging Face Llama spends its time: in the host, which launches it, or in the GPU.

    for contestant in o3.json o2plus.json "o2plus.json --float8"; do
        torchrun --nproc_per_node 1 benchmarks/step_profile.py --out profile.json --size 1.3B \\
            --micro_batch 4 --compile layers --deepspeed_config benchmarks/gpu/$contestant
    done

Forward, backward and step are timed apart, between waits for the device: until the call returns (host), and
until the device has ended. If both are the same, the host is the limit. One profiled step gives the time in
which the GPU ran at least one kernel, and the kernels that took longest.
"""

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_train import CONSOLE, load
from llama import LAYERS, SIZES, Batch, batches, engine_of, micro_step, options, recorded
from ranks_gpu import facts, join_ranks, wait
from timing import write
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

PHASES = ("forward", "backward", "step")
WARM_UP, TIMED = 10, 6  # steps
TOP = 30  # kernels that are listed


def phases_of(engine: Any, batch: Batch, device: torch.device) -> Iterator[tuple[float, float]]:
    """Yield milliseconds of each phase of a step: of the host, and until the device has ended."""
    losses: list[Any] = []
    calls = (
        lambda: losses.append(engine(**batch).loss),
        lambda: engine.backward(losses[0]),
        engine.step,
    )
    for call in calls:
        wait(device)
        start = time.perf_counter()
        call()
        launched = time.perf_counter()
        wait(device)
        yield (launched - start) * 1000, (time.perf_counter() - start) * 1000


def kernels_of(events: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Return what a GPU did. events: microseconds of begin and end, and name."""
    busy, end, taken = 0.0, 0.0, defaultdict(float)
    for begin, finish, name in sorted(events):
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
        taken[name] += finish - begin
    longest = sorted(taken.items(), key=lambda each: -each[1])[:TOP]
    return {
        "launches": len(events),
        "busy_ms": busy / 1000,
        "kernels_ms": {name: microseconds / 1000 for name, microseconds in longest},
    }


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    engine = engine_of(arguments, device)
    batch, *others = itertools.islice(batches(arguments, device), WARM_UP)
    for each in (batch, *others):
        micro_step(engine, each)
    rounds = [list(phases_of(engine, batch, device)) for _ in range(TIMED)]
    found: dict[str, Any] = {
        phase: {
            key: statistics.median(each[place][kind] for each in rounds)
            for kind, key in enumerate(("host_ms", "whole_ms"))
        }
        for place, phase in enumerate(PHASES)
    }
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            micro_step(engine, batch)
            wait(device)
        events = [each for each in profiler.events() if each.device_type != DeviceType.CPU]
        found["gpu"] = kernels_of([(e.time_range.start, e.time_range.end, e.name) for e in events])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", required=True, help="file that collects runs")
    add("--deepspeed_config", type=Path, required=True)
    add("--size", choices=SIZES, default="tiny")
    add("--micro_batch", type=int, default=1)
    add("--context", type=int, default=2048)
    add("--compile", choices=("model", *LAYERS))
    add("--checkpointing", action="store_true")
    add("--float8", action="store_true", help="products by torchao's tensorwise float8; named +float8")
    arguments = options(**vars(parser.parse_args()))
    device = join_ranks()
    config = arguments.deepspeed_config.stem + ("+float8" if arguments.float8 else "")
    run = {"config": config, "model": arguments.size, "options": recorded(arguments)}
    run |= {**measure(arguments, device), **facts(device)}
    if torch.distributed.get_rank() == 0:
        write(arguments.out, {"runs": [*load(arguments.out), run]})
        for phase in PHASES:
            CONSOLE.print(f"{phase:9}", *(f"{key} {value:8.1f}" for key, value in run[phase].items()))
        CONSOLE.print({key: value for key, value in run.get("gpu", {}).items() if key != "kernels_ms"})
    from train_lm import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
