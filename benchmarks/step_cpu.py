"""A whole training iteration on CPU ranks: ds_fp8 O2 beside stock DeepSpeed ZeRO 2 in BF16.

    python benchmarks/step_cpu.py --out step_cpu.json

What it shows: FP8 states and FP8 communication make an iteration no slower, with gloo between processes of
one machine, and engine.step faster. Both engines live in the same processes, with the model of
examples/train_lm.py, the same seeds and the same batches; their iterations alternate, and so does which
engine begins. All ranks meet before an iteration, before engine.step and after it; the iteration's time is
the sum of the parts between, each as long as the slowest rank takes. "ds_fp8 / stock" is the median of the
ratios, iteration by iteration.

backward includes the exchange of gradients, step the exchange of weights. Optimizers of stock: torch_adam
(torch's AdamW, a loop over tensors), torch_fused (the same with fused=True), cpu_adam and fused_adam
(DeepSpeed's own, which compile C++ for minutes on first use; fused_adam is its default).
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from ranks_cpu import in_turn, run_ranks
from rich.console import Console
from rich.table import Table
from timing import busy_seconds, checked_backend, facts, parser_of, round_count, title, write

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

PARTS = ("forward", "backward", "step")
STOCK = {
    "torch_adam": {"torch_adam": True},
    "torch_fused": {"torch_adam": True, "fused": True},
    "fused_adam": {},
    "cpu_adam": {},
}
WARM_UP = 3  # iterations of each engine


@dataclass(frozen=True)
class Job:
    """The work of every rank."""

    shape: dict[str, int]
    micro_batch: int
    iterations: int
    stock_optimizer: str
    ranks: int


def ds_config(job: Job, *, fp8: bool) -> dict[str, Any]:
    params = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }
    if fp8:
        config["fp8"] = {"enabled": True, "opt_level": "O2"}
    elif job.stock_optimizer == "cpu_adam":
        return config  # created here and handed over
    else:
        params |= STOCK[job.stock_optimizer]
    return {**config, "optimizer": {"type": "AdamW", "params": params}}


def build(job: Job, *, fp8: bool) -> Any:
    """Build an engine with the example's model, with the same weights each time."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from train_lm import ByteGPT, Shape

    torch.manual_seed(0)
    model = ByteGPT(Shape(**job.shape))
    optimizer = None
    if not fp8 and job.stock_optimizer == "cpu_adam":
        optimizer = DeepSpeedCPUAdam(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    return deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=optimizer,
        config=ds_config(job, fp8=fp8),
    )[0]


def iterate(engine: Any, batch: torch.Tensor) -> tuple[list[float], float]:
    """Run one iteration; return this rank's milliseconds of each of its PARTS, and the loss."""
    torch.distributed.barrier()
    times = [time.perf_counter()]
    loss = engine(batch)
    times.append(time.perf_counter())
    engine.backward(loss)
    torch.distributed.barrier()
    times.append(time.perf_counter())
    engine.step()
    torch.distributed.barrier()
    times.append(time.perf_counter())
    return [(after - before) * 1000 for before, after in pairwise(times)], loss.item()


def clocks() -> tuple[float, float, float]:
    """Return seconds of CPU time of all processes and of this process, and of the wall clock."""
    return busy_seconds(), time.process_time(), time.perf_counter()


def others_cores(per_rank: list[dict[str, Any]]) -> float:
    """Return the average number of cores busy with processes other than the ranks."""
    busy, _, wall = per_rank[0]["clocks"]
    return float(max(0.0, busy - sum(each["clocks"][1] for each in per_rank)) / wall)


def train(job: Job) -> dict[str, Any]:
    """Return this rank's times and losses of both engines."""
    from train_lm import Corpus, Shape, read_corpus

    import ds_fp8

    engines = {"ds_fp8": build(job, fp8=True), "stock": build(job, fp8=False)}
    context = Shape(**job.shape).context
    batches = Corpus(read_corpus("topics"), context).batches(job.micro_batch, torch.distributed.get_rank())
    rounds = in_turn(engines, batches, iterate)
    warm = list(islice(rounds, WARM_UP))
    before = clocks()
    measured = list(islice(rounds, job.iterations))
    spent = [now - then for now, then in zip(clocks(), before, strict=True)]
    stock = engines["stock"].optimizer.optimizer
    return {
        "clocks": spent,
        "times": {name: [each[name][0] for each in measured] for name in engines},
        "losses": {name: [each[name][1] for each in warm + measured] for name in engines},
        "parameters": sum(each.numel() for each in engines["stock"].module.parameters()),
        "stock_class": f"{type(stock).__module__.split('.')[0]} {type(stock).__name__}",
        "fp8": ds_fp8.describe(engines["ds_fp8"]),
    }


def slowest(per_rank: list[dict[str, Any]], engine: str) -> list[dict[str, float]]:
    """Return milliseconds of each part, and in total, by iteration."""
    found = []
    for ranks in zip(*(each["times"][engine] for each in per_rank), strict=True):
        parts = dict(zip(PARTS, map(max, zip(*ranks, strict=True)), strict=True))
        found.append({**parts, "iteration": sum(parts.values())})
    return found


def rows_of(per_rank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours, stock = slowest(per_rank, "ds_fp8"), slowest(per_rank, "stock")
    rows = []
    for part in (*PARTS, "iteration"):
        mine, other = [each[part] for each in ours], [each[part] for each in stock]
        rows.append(
            {
                "part": part,
                "milliseconds": statistics.median(mine),
                "stock_milliseconds": statistics.median(other),
                "ours_by_stock": statistics.median(a / b for a, b in zip(mine, other, strict=True)),
                "rounds": mine,
                "stock_rounds": other,
            }
        )
    return rows


def measure(job: Job) -> dict[str, Any]:
    per_rank = run_ranks(job.ranks, train, job)
    first = per_rank[0]
    losses = {
        name: [
            statistics.fmean(ranks)
            for ranks in zip(*(each["losses"][name] for each in per_rank), strict=True)
        ]
        for name in ("ds_fp8", "stock")
    }
    last = {name: each[-1] for name, each in losses.items()}
    if first["fp8"]["kernels"] != "cpu" or not all(map(math.isfinite, last.values())):
        raise SystemExit(f"not timed: kernels {first['fp8']['kernels']}, last losses {last}")
    return {
        "job": asdict(job),
        "parameters": first["parameters"],
        "stock_optimizer": first["stock_class"],
        "fp8": first["fp8"],
        "last_loss": last,
        "losses": losses,
        "rows": rows_of(per_rank),
        "others_cores": others_cores(per_rank),
    }


def print_result(result: dict[str, Any], machine: dict[str, Any]) -> None:
    job = result["job"]
    what = (
        f"{result['parameters']:,} parameters, {job['ranks']} ranks, {job['micro_batch']} x "
        f"{job['shape']['context']} bytes per rank and iteration"
    )
    table = Table(title=title(what, machine, result["others_cores"]))
    table.add_column("ms, medians")
    for column in ("ds_fp8 O2", f"stock BF16, {job['stock_optimizer']}", "ds_fp8 / stock"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        times = (
            f"{row['milliseconds']:.1f}",
            f"{row['stock_milliseconds']:.1f}",
            f"{row['ours_by_stock']:.2f}",
        )
        table.add_row(row["part"], *times)
    console = Console(width=132)
    console.print(table)
    console.print(f"optimizer of stock: {job['stock_optimizer']} ({result['stock_optimizer']})")
    iterations = WARM_UP + job["iterations"]
    losses = result["last_loss"]
    console.print(
        f"loss at iteration {iterations}: ds_fp8 {losses['ds_fp8']:.4f}, stock {losses['stock']:.4f}"
    )


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--stock-optimizer", choices=tuple(STOCK), default="torch_adam")
    parser.add_argument("--ranks", type=round_count, default=2)
    for name, default in {"layers": 6, "width": 512, "heads": 8, "context": 128, "micro-batch": 4}.items():
        parser.add_argument(f"--{name}", type=round_count, default=default)
    return parser


def main() -> None:
    parser = options()
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in ("layers", "width", "heads", "context")}
    if arguments.quick:
        shape = {"layers": 1, "width": 32, "heads": 2, "context": 16}
    if shape["width"] % shape["heads"]:
        parser.error(f"--width: received {shape['width']}, allowed: multiples of --heads, {shape['heads']}")
    rounds = arguments.rounds or (2 if arguments.quick else 21)
    machine = {**facts(), "threads": arguments.ranks}
    _, verified = checked_backend()
    job = Job(shape, arguments.micro_batch, rounds, arguments.stock_optimizer, arguments.ranks)
    result = measure(job)
    print_result(result, machine)
    write(arguments.out, {**result, "machine": machine, "verified": verified})


if __name__ == "__main__":
    main()
