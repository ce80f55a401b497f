"""Cost of a step with states in host memory, beside states on the GPU and stock DeepSpeed's offload.

    for micro_steps in 1 8; do
        for where in stock resident stream host auto; do
            torchrun --nproc_per_node 1 benchmarks/gpu_offload.py --out offload.json --size 3B \\
                --checkpointing --level O2+ --micro_steps $micro_steps --where $where
        done
    done

One way per process; --out collects them, and the table shows all. The first run trains a small model with
states on the GPU, streamed and swept by the host: weights and states must be the same bytes, or nothing is
measured. Then medians over some steps:

    ms/step            a whole iteration: micro-steps, then the optimizer's step
    after backward     engine.step() alone, from when the device has ended backward to when it has ended
                       the step: the part that offload does not hide
    GB/s               of states each way, while nothing but sweeps runs (stream only)
    overlapped         share of a profiled sweep's time in which a copy up and a copy down ran at once

stock is DeepSpeed's ZeRO 2 with offload_optimizer and its own CPU Adam, which is compiled on first use;
stock_torch uses torch's AdamW on the CPU instead. Stock's offload of 7B needs more than 128 GB of host
memory. resident, beside stream at 8,192 and 16,384 tokens per step (--micro_batch 4 and --micro_steps 1 or 2,
at a context of 2,048), shows the speed relative to no offload; --ratio keeps a part of the states on the GPU.
--gpu_gb limits a run to the memory of another GPU.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from claims import Claim, print_claims
from gpu_train import CONSOLE, load
from llama import SIZES, batches, options, recorded
from offload_runs import WAYS, check_bits, engine_of
from ranks_gpu import facts, join_ranks, limit_memory, wait
from rich.table import Table
from timing import write
from torch import cuda
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

import ds_fp8
from ds_fp8.estimate import memory

WARM_UP = 2  # untimed steps
Run = dict[str, Any]


# Time and memory


def timed_step(engine: Any, source: Any, device: torch.device) -> tuple[float, float, float]:
    """Return milliseconds of an iteration and of its engine.step() after backward has ended, and the loss."""
    losses = []
    wait(device)
    start = time.perf_counter()
    for last in range(engine.gradient_accumulation_steps(), 0, -1):
        losses.append(engine(**next(source)).loss)
        engine.backward(losses[-1])
        if last > 1:
            engine.step()
    wait(device)
    ended = time.perf_counter()
    engine.step()
    wait(device)
    end = time.perf_counter()
    return (end - start) * 1000, (end - ended) * 1000, float(losses[-1].detach())


def sweep_all(engine: Any) -> Callable[[], None]:
    """Return a function that runs a step's sweeps alone, with zero gradients; weights decay."""
    parts, optimizer = engine.optimizer.parts, engine.optimizer.optimizer
    control = torch.ones(2, device=parts.residence.device)
    scalars = optimizer.scalars(clamp=True)

    def run() -> None:
        for bucket, reduced, shard, weights in parts.by_bucket():
            shard.sweep(reduced.blocks, weights, scalars[bucket.group], control)

    return run


def link_of(engine: Any, device: torch.device) -> Run:
    """Measure the ring: GB/s each way, and the share of the time in which copies ran both ways."""
    run, moved = sweep_all(engine), engine.optimizer.parts.host_nbytes
    run()
    taken = []
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        run()
        engine.optimizer.parts.residence.away.executor.settle()
        wait(device)
        taken.append(time.perf_counter() - start)
    found: Run = {"gb_per_second": moved / statistics.median(taken) / 1e9, "sweep_ms": min(taken) * 1000}
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            wait(device)
        found |= overlap_of(profiler)
    return found


def overlap_of(profiler: Any) -> Run:
    """Return shares of the device's busy span: copies up, copies down, both at once, kernels."""
    events = [each for each in profiler.events() if each.device_type != DeviceType.CPU]
    kinds = {"up": "Memcpy HtoD", "down": "Memcpy DtoH", "kernel": "adam_kernel"}
    edges: list[tuple[float, str, int]] = []
    for event in events:
        kind = next((name for name, prefix in kinds.items() if event.name.startswith(prefix)), None)
        if kind:
            edges += [(event.time_range.start, kind, 1), (event.time_range.end, kind, -1)]
    edges.sort()
    running, busy, before = dict.fromkeys(kinds, 0), dict.fromkeys((*kinds, "both"), 0.0), edges[0][0]
    for at, kind, change in edges:
        for name in kinds:
            busy[name] += (at - before) * (running[name] > 0)
        busy["both"] += (at - before) * (running["up"] > 0 and running["down"] > 0)
        running[kind] += change
        before = at
    span = edges[-1][0] - edges[0][0]
    return {"overlap": {name: each / span for name, each in busy.items()}}


def expected_between_steps(engine: Any) -> int:
    """Return the device bytes by the estimate: weights, reduced gradient, buffers, resident states."""
    handler, parts = engine.optimizer, engine.optimizer.parts
    several = engine.gradient_accumulation_steps() > 1
    gradient = memory.gradient_bytes(handler.recipe, parts.buckets, accumulating=several)
    about = ds_fp8.describe(engine)
    weights = int(about.get("weight_bytes", memory.weight_bytes(2, parts.buckets)))
    if handler.settings.offload is None:
        return weights + gradient + memory.state_bytes(handler.recipe, parts.buckets)
    resident = sum(each.nbytes - each.host_nbytes for each in parts.shards)
    return weights + (gradient if about["offload"] == "stream" else 0) + about["ring_bytes"] + resident


def checked_bits(runs: list[Run], device: torch.device) -> list[str]:
    """Return what was compared, now or by an earlier run on this kind of device with these versions."""
    here = facts(device)
    for run in runs:
        if all(run[key] == value for key, value in here.items()):
            return list(run["checked"])
    return check_bits(device)


def measure(arguments: argparse.Namespace, runs: list[Run], device: torch.device) -> Run:
    checked = checked_bits(runs, device)
    engine = engine_of(arguments, arguments.where, device)
    source = batches(arguments, device)
    steps = [timed_step(engine, source, device) for _ in range(arguments.steps)]
    whole, after, losses = zip(*steps, strict=True)
    found: Run = {
        "where": arguments.where,
        "model": arguments.size,
        "options": recorded(arguments),
        "parameters": sum(each.numel() for each in engine.module.parameters()),
        "tokens": arguments.micro_batch * arguments.micro_steps * arguments.context,
        "milliseconds": list(whole[WARM_UP:]),
        "after_backward": list(after[WARM_UP:]),
        "losses": list(losses),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "checked": checked,
        **facts(device),
    }
    if device.type == "cuda":
        found["peak_bytes"], found["between_steps"] = cuda.max_memory_allocated(), cuda.memory_allocated()
    if ds_fp8.is_active(engine):
        found["expected_between_steps"] = expected_between_steps(engine)
        keys = ("offload", "host_bytes", "landing_bytes", "pinned_bytes", "ring_bytes")
        found["about"] = {key: value for key, value in ds_fp8.describe(engine).items() if key in keys}
        if found["about"].get("offload") == "stream":
            found["link"] = link_of(engine, device)
    engine.destroy()
    return found


# Report


def like(run: Run, where: str, runs: list[Run]) -> Run | None:
    """Return the run of the same model, level and tokens with states elsewhere."""
    keys = ["size", "micro_batch", "micro_steps", "context", "stage"]
    keys += [] if where.startswith("stock") else ["level"]
    wanted = [run["options"][key] for key in keys]
    same = [each for each in runs if [each["options"][key] for key in keys] == wanted]
    return next((each for each in same if each["where"].startswith(where)), None)


def where_of(run: Run) -> str:
    """Return where states are, with the share that is offloaded if that is not all."""
    ratio = run["options"].get("ratio", "1.0")
    return str(run["where"]) + (f" {ratio}" if float(ratio) < 1 else "")


def claims_of(run: Run, runs: list[Run]) -> list[Claim]:
    options = run["options"]
    name = f"{run['model']} {options['level']} {where_of(run)}, {options['micro_steps']} micro-steps: "
    found, stock, resident = [], like(run, "stock", runs), like(run, "resident", runs)
    if stock and run["where"] == "auto":
        most = 0.5 if options["micro_steps"] == "1" else 0.35
        ratio = statistics.median(run["after_backward"]) / statistics.median(stock["after_backward"])
        found.append(Claim.at_most(name + "after backward / stock's", ratio, most))
    if resident and run["where"] in ("auto", "stream") and run["tokens"] >= 8192:
        kept = statistics.median(resident["milliseconds"]) / statistics.median(run["milliseconds"])
        least = 0.95 if run["tokens"] >= 16384 else 0.9
        found.append(Claim.at_least(name + "speed / that without offload", kept, least))
    if run.get("link") and run["device"] != "cpu":
        each_way = run["link"]["gb_per_second"]
        found.append(Claim.at_least(name + "GB/s each way", each_way, 42))
    if "expected_between_steps" in run and "between_steps" in run:
        off = abs(run["between_steps"] / run["expected_between_steps"] - 1)
        found.append(Claim.at_most(name + "bytes between steps, relative error of the estimate", off, 0.02))
    return found


def report(runs: list[Run]) -> None:
    table = Table(title=f"{runs[0]['ranks']} x {runs[0]['device']}, torch {runs[0]['versions']['torch']}")
    columns = ("", "micro-steps", "tokens/s", "ms/step", "after backward", "GB/s", "overlapped")
    columns += ("peak GB", "host GB")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for run in runs:
        about, link = run.get("about", {}), run.get("link", {})
        level = "" if "stock" in run["where"] else run["options"]["level"]
        milliseconds, overlap = statistics.median(run["milliseconds"]), link.get("overlap", {})
        executor = f" ({about['offload']})" if run["where"] == "auto" and "offload" in about else ""
        table.add_row(
            f"{run['model']} {where_of(run)}{executor} {level}",
            run["options"]["micro_steps"],
            f"{run['tokens'] * run['ranks'] / milliseconds * 1000:,.0f}",
            f"{milliseconds:,.1f}",
            f"{statistics.median(run['after_backward']):,.1f}",
            f"{link['gb_per_second']:.1f}" if link else "",
            f"{overlap['both']:.2f}" if overlap else "",
            f"{run.get('peak_bytes', 0) / 1e9:.2f}",
            f"{run['host_peak_bytes'] / 1e9:.2f}",
        )
    CONSOLE.print(table)
    print_claims([claim for run in runs for claim in claims_of(run, runs)], CONSOLE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", required=True, help="file that collects runs")
    add("--where", choices=WAYS, required=True)
    add("--size", choices=SIZES, default="tiny")
    add("--level", choices=("O1", "O2", "O2+", "O3"), default="O2+")
    add("--stage", type=int, choices=(1, 2, 3), default=2)
    add("--bucket", type=int, default=200_000_000, help="reduce_bucket_size")
    add("--micro_batch", type=int, default=1)
    add("--micro_steps", type=int, default=1)
    add("--clipping", type=float, default=1.0, help="gradient_clipping")
    add("--context", type=int, default=2048)
    add("--steps", type=int, default=8)
    add("--ratio", type=float, default=1.0, help="share of the states that is offloaded; stream and auto")
    add("--gpu_gb", type=float, help="GPU memory that may be used; default: all")
    add("--checkpointing", action="store_true", help="checkpoint every layer's activations")
    arguments = options(**vars(parser.parse_args()))
    device = join_ranks()
    if arguments.gpu_gb:
        limit_memory(arguments.gpu_gb, device)
    runs = load(arguments.out)
    runs.append(measure(arguments, runs, device))
    if torch.distributed.get_rank() == 0:
        write(arguments.out, {"runs": runs})
        report(runs)
    from train_lm import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
