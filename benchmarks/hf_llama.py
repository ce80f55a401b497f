"""Train a Hugging Face Llama with random weights on real text, beside stock DeepSpeed.

    for config in zero3_bf16_torch zero3_o2 zero3_o2plus zero3_o3; do
        torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out llama.json --size 7B --checkpointing \\
            --micro_batch 8 --deepspeed_config benchmarks/gpu/$config.json
    done
    torchrun --nproc_per_node 2 benchmarks/hf_llama.py --probe 4 8 12 16 --size 7B --checkpointing \\
        --deepspeed_config benchmarks/gpu/zero3_bf16_torch.json

The second prints the peak by micro-batch, until memory runs out. With

    torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out alst.json --size 350M --context 8192 \\
        --sequence_parallel 2 --steps 200 --sleeps 20 --deepspeed_config benchmarks/gpu/zero3_o2.json

two ranks share each sequence (DeepSpeed's ALST), attention is flash attention, and every rank sleeps up
to 20 ms before each forward; step times then mean nothing, and sent bytes are not counted. With

    for config in bf16_torch o2_overlap; do
        torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out autotp.json --size 350M --micro_batch 4 \\
            --tensor_parallel 2 --steps 200 --sleeps 20 --deepspeed_config benchmarks/gpu/$config.json
    done

AutoTP splits the model over two ranks, its all-reduces overlap (tp_overlap_comm), and every rank also sleeps
before one in 20 collectives.

One configuration per process group, in any order and number: --out collects them (`--again` repeats a run
that it has), and the table shows the medians of all steps of all runs of a configuration. "States GB" is what
a rank should keep of states and reduced gradient. The text is the standard library's sources, as bytes.
"""

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from claims import Claim, print_claims
from engine_facts import predicted_bytes, sent
from gpu_train import CONSOLE, claims_of_memory_and_time, load
from llama import SIZES, batches, engine_of, same_everywhere, sleepy_collectives, step
from meters import elements
from ranks_gpu import facts, join_ranks
from rich.table import Table
from timing import write
from torch import cuda

WARM_UP = 4  # untimed steps: DeepSpeed's trace and the allocator settle
Run = dict[str, Any]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        cuda.empty_cache()
        cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    return cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def train(arguments: argparse.Namespace, device: torch.device) -> Run:
    """Return times, losses and bytes of some steps, the same on every rank."""
    engine = engine_of(arguments, device)
    source = batches(arguments, device)
    forget_peak(device)
    milliseconds, losses, norms = [], [], []
    draw = random.Random(torch.distributed.get_rank())
    for _ in range(arguments.steps):
        batch = next(source)
        wait(device)
        time.sleep(draw.uniform(0, arguments.sleeps) / 1000)
        start = time.perf_counter()
        with sleepy_collectives(draw, arguments.sleeps if arguments.tensor_parallel > 1 else 0):
            losses.append(step(engine, batch))
        norms.append(engine.get_global_grad_norm())
        wait(device)
        milliseconds.append((time.perf_counter() - start) * 1000)
    mean = torch.stack(losses).float()
    torch.distributed.all_reduce(mean)
    return {
        "config": name_of(arguments),
        "model": arguments.size,
        "world_size": torch.distributed.get_world_size(),
        "options": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "parameters": elements(engine.module),
        "milliseconds": milliseconds[WARM_UP:],
        "losses": (mean / torch.distributed.get_world_size()).tolist(),
        "norms": [float(each) for each in norms],
        "same_everywhere": same_everywhere(engine),
        "peak_bytes_allocated": peak(device),
        "predicted_bytes": predicted_bytes(engine),
        "sent": {} if _is_split(arguments) else sent(lambda: step(engine, next(source))),
        **facts(device),
    }


def name_of(arguments: argparse.Namespace) -> str:
    return arguments.deepspeed_config.stem + ("+float8" if arguments.float8 else "")


def _is_split(arguments: argparse.Namespace) -> bool:
    return max(arguments.sequence_parallel, arguments.tensor_parallel) > 1


def probe(arguments: argparse.Namespace, device: torch.device) -> None:
    """Print the peak of two steps with each micro-batch, until memory runs out."""
    engine = engine_of(arguments, device)
    for micro_batch in arguments.probe:
        arguments.micro_batch = micro_batch
        source = batches(arguments, device)
        forget_peak(device)
        try:
            for _ in range(2):
                step(engine, next(source))
        except torch.OutOfMemoryError:
            CONSOLE.print(f"micro-batch {micro_batch}: out of memory")
            return
        CONSOLE.print(f"micro-batch {micro_batch}: peak {peak(device) / 1e9:.2f} GB")


def gathered(runs: list[Run]) -> list[Run]:
    """Merge runs into one per configuration: medians of the steps of all its runs."""
    found = []
    for name in dict.fromkeys(run["config"] for run in runs):
        same = [run for run in runs if run["config"] == name]
        times = [each for run in same for each in run["milliseconds"]]
        found.append({**same[0], "milliseconds_per_step": statistics.median(times), "runs": len(same)})
    return found


def report(runs: list[Run]) -> None:
    compared = gathered(runs)
    stock = next((run for run in compared if "bf16" in run["config"]), None)
    table = Table(title=f"Llama {runs[0]['model']}, {runs[0]['ranks']} x {runs[0]['device']}")
    for name in ("", "runs", "ms/step", "/ stock", "peak GB", "states GB", "sent B/param", "loss"):
        table.add_column(name, justify="right" if name else "left")
    for run in compared:
        ratio = run["milliseconds_per_step"] / stock["milliseconds_per_step"] if stock else 1.0
        table.add_row(
            run["config"],
            str(run["runs"]),
            f"{run['milliseconds_per_step']:,.1f}",
            f"{ratio:.3f}",
            *(f"{run[key] / 1e9:.2f}" for key in ("peak_bytes_allocated", "predicted_bytes")),
            f"{sum(run['sent'].values()) / run['parameters']:.3f}",
            f"{run['losses'][-1]:.4f}",
        )
    CONSOLE.print(table)
    ours = [run for run in compared if run is not stock] if stock else []
    options = runs[0]["options"]
    shared = any(int(options.get(key, 1)) > 1 for key in ("sequence_parallel", "tensor_parallel"))
    claims = claims_of_a_training if shared else partial(claims_of_memory_and_time, most=0.92)
    print_claims([claim for run in ours for claim in claims(run, stock)], CONSOLE)


def claims_of_a_training(run: Run, stock: Run) -> list[Claim]:
    """Claim that it trains as stock does, until rounding makes them diverge: there is no warm-up."""
    name = f"{run['model']} {run['config']}, {run['world_size']} ranks: "
    off = abs(run["norms"][0] / stock["norms"][0] - 1)
    apart = max(
        abs(ours - theirs) for ours, theirs in zip(run["losses"][:10], stock["losses"][:10], strict=True)
    )
    return [
        Claim.at_most(name + "losses of the first 10 steps, from stock's", apart, 0.02),
        Claim.at_most(name + "first norm, relative difference to stock's", off, 0.02),
        Claim.at_most(name + "ranks with different weights", float(not run["same_everywhere"]), 0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--deepspeed_config", type=Path, required=True)
    add("--out", type=Path, metavar="FILE", help="file that collects runs")
    add("--again", action="store_true", help="repeat runs that --out has")
    add("--size", choices=SIZES, default="tiny")
    add("--micro_batch", type=int, default=1)
    add("--context", type=int, default=2048)
    add("--steps", type=int, default=16)
    add("--compile", action="store_true", help="engine.compile()")
    add("--float8", action="store_true", help="products by torchao's tensorwise float8; named +float8")
    add("--sequence_parallel", type=int, default=1, metavar="N", help="ranks that share a sequence")
    add(
        "--tensor_parallel", type=int, default=1, metavar="N", help="ranks over which AutoTP splits the model"
    )
    add("--sleeps", type=float, default=0.0, metavar="MS", help="a rank's longest sleep before a forward")
    add("--zero_init", action="store_true", help="no rank makes the whole model (ZeRO 3)")
    add("--checkpointing", action="store_true", help="checkpoint every layer's activations")
    add("--probe", type=int, nargs="+", metavar="N", help="micro-batches to try")
    arguments = parser.parse_args()
    device = join_ranks()
    CONSOLE.quiet = torch.distributed.get_rank() > 0
    if arguments.probe:
        probe(arguments, device)
        return
    runs = load(arguments.out)
    if arguments.again or name_of(arguments) not in [run["config"] for run in runs]:
        runs.append(train(arguments, device))
        write(arguments.out if torch.distributed.get_rank() == 0 else None, {"runs": runs})
    report(runs)
    from train_lm import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
