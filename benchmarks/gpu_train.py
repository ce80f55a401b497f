"""Train examples/gpt_pretrain.py beside stock DeepSpeed: time, memory, bytes sent, loss, waits.

    for config in bf16 bf16_states o1 o2 o2plus; do
        torchrun --nproc_per_node 2 benchmarks/gpu_train.py --out train.json --seconds 60 \\
            --model 1.3B --micro_batch 4 --deepspeed_config benchmarks/gpu/$config.json
    done

One configuration per process group. A run that --out already has is skipped, so that an interrupted loop can
continue; each run adds itself to --out and prints the table of all (process groups that run at the same time
need separate --out files). Options other than these two are the example's; paired.py compares the losses of
several seeds. Runs are compared with stock BF16 (bf16.json, or bf16_torch.json with torch's fused AdamW) of
the same model and seed on as many ranks; batch and steps must be the same.

"GB held" are a rank's states and reduced gradient, found among live tensors, beside the prediction. Peaks are
torch's allocator's; the difference of stock's and ours should equal that of the predictions. Losses are
compared over the last 50 steps that both have done. Waits are calls within one engine.step, as torch's
profiler records them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from claims import Claim, print_claims
from ranks_gpu import facts, join_ranks
from rich.console import Console
from rich.table import Table
from timing import write

import ds_fp8
from ds_fp8.estimate import dry_run

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

CONSOLE = Console(width=160)
COLUMNS = (
    *("", "ranks", "ms/step", "/ stock", "peak GB", "GB held", "predicted", "sent B/param"),
    *("steps", "loss, last 50", "from stock's", "validation"),
)
LAST = 100  # steps whose mean loss is kept
Run = dict[str, Any]


def inspect(engine: Any, batches: Iterator[torch.Tensor]) -> Run:
    """Return what the engine holds, sends and waits for, after the training."""
    from engine_facts import predicted_bytes, sent, waits
    from gpt_pretrain import train_step

    engine.backward(engine(next(batches).to(engine.device)))
    found = {
        "waits": waits(engine.step),
        "predicted_bytes": predicted_bytes(engine),
        "health": health_of(engine),
        "fp8_weights": fp8_weights(engine),
    }
    try:
        return found | {"sent": sent(partial(train_step, engine, batches))}
    except KeyError as unknown:  # raised after minutes of training; the table shows it
        return found | {"sent": {}, "not_counted": str(unknown)}


def health_of(engine: Any) -> Run | None:
    """Return the health of the last measured step, if the ds_config has fp8.stats.interval."""
    if not ds_fp8.is_active(engine) or not engine.optimizer.parts.health.interval:
        return None
    return ds_fp8.stats(engine)


def fp8_weights(engine: Any) -> dict[str, int]:
    """Return the number and bytes of the elements that are FP8 codes, in a model that is otherwise BF16."""
    from meters import elements

    about = ds_fp8.describe(engine) if ds_fp8.is_active(engine) else {}
    if "fp8_elements" not in about:
        return {"elements": 0, "bytes": 0}
    others = elements(engine.module) - about["fp8_elements"]
    return {"elements": about["fp8_elements"], "bytes": int(about["weight_bytes"]) - 2 * others}


def identity(run: Run) -> tuple[Any, ...]:
    return (*(run[key] for key in ("config", "model", "world_size")), seed_of(run))


def seed_of(run: Run) -> int:
    """Return the seed; 0, the example's default, if the run does not have it."""
    seed: int = run.get("seed", 0)
    return seed


def load(out: Path) -> list[Run]:
    """Load runs of earlier calls; older files have "milliseconds_a_step" for "milliseconds_per_step"."""
    runs: list[Run] = json.loads(out.read_text())["runs"] if out.exists() else []
    return [{key.replace("_a_", "_per_"): value for key, value in run.items()} for run in runs]


def baseline_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Find stock DeepSpeed BF16 with the same model and seed on as many ranks."""
    names = ("bf16", "bf16_torch")
    same = [each for each in runs if identity(each)[1:] == identity(run)[1:] and each["config"] in names]
    return min(same, key=lambda each: names.index(each["config"]), default=None)


def loss_apart(run: Run, stock: Run) -> float:
    """Return nats above stock's over the last 50 steps of both."""
    steps = min(len(run["losses"]), len(stock["losses"]))
    ours, theirs = (statistics.fmean(each["losses"][:steps][-50:]) for each in (run, stock))
    return ours - theirs


def held_bytes(run: Run) -> float:
    """Return bytes of states and reduced gradient: live tensors other than parameters and their FP8 codes."""
    found: float = run["state_bytes_per_parameter"] * run["parameters"] / run["world_size"]
    return found - run.get("fp8_weights", {}).get("bytes", 0)


def saved_bytes(run: Run) -> float:
    """Return the bytes that FP8 weights save, compared with BF16 ones."""
    weights = run.get("fp8_weights", {"elements": 0, "bytes": 0})
    return float(2 * weights["elements"] - weights["bytes"])


def claims_of(run: Run, stock: Run | None) -> list[Claim]:
    """Return the claims about a run with FP8, beside stock's if there is one."""
    name = f"{run['model']} {run['config']}, {run['world_size']} ranks: "
    off = abs(held_bytes(run) / run["predicted_bytes"] - 1)
    found = [Claim.at_most(name + "bytes held, relative error of the prediction", off, 0.02)]
    if stock is None:
        return found
    found += claims_of_memory_and_time(run, stock, 1.0)
    found.append(Claim.at_most(name + "loss, from stock's", abs(loss_apart(run, stock)), 0.01))
    ours, theirs = (sum(each["waits"].values()) for each in (run, stock))
    return [*found, Claim.at_most(name + "waits and copies per step", ours, theirs)]


def claims_of_memory_and_time(
    run: Run, stock: Run, most: float, *, same_activations: bool = True
) -> list[Claim]:
    """Return claims beside stock's; most: of an iteration's time. Predictions are without activations."""
    name, found = f"{run['model']} {run['config']}, {run['world_size']} ranks: ", []
    if run["peak_bytes_allocated"] and same_activations:
        expected = stock["predicted_bytes"] - run["predicted_bytes"]
        expected += run.get("weights_saved", saved_bytes(run))
        saved = stock["peak_bytes_allocated"] - run["peak_bytes_allocated"]
        text = name + "saved at the peak, relative error of the prediction"
        found.append(Claim.at_most(text, abs(saved / expected - 1), 0.02))
    ratio = run["milliseconds_per_step"] / stock["milliseconds_per_step"]
    return [*found, Claim.at_most(name + "time of an iteration / stock's", ratio, most)]


def print_runs(runs: Sequence[Run]) -> None:
    table = Table(title=f"{runs[0]['device']}, torch {runs[0]['versions']['torch']}")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for run in runs:
        stock = baseline_of(run, runs)
        compared = ("", "")
        if stock is not None:
            ratio = run["milliseconds_per_step"] / stock["milliseconds_per_step"]
            compared = (f"{ratio:.3f}", f"{loss_apart(run, stock):+.4f}")
        table.add_row(
            f"{run['model']} {run['config']}" + (f", seed {seed_of(run)}" if seed_of(run) else ""),
            str(run["world_size"]),
            f"{run['milliseconds_per_step']:,.1f}",
            compared[0],
            f"{run['peak_bytes_allocated'] / 1e9:.2f}",
            f"{held_bytes(run) / 1e9:.3f}",
            f"{run['predicted_bytes'] / 1e9:.3f}",
            f"{sum(run['sent'].values()) / run['parameters']:.3f}" if run["sent"] else run["not_counted"],
            str(len(run["losses"])),
            f"{run['final_loss']:.4f}",
            compared[1],
            f"{run['validation_loss']:.4f}",
        )
    CONSOLE.print(table)
    for run in runs:
        waits = ", ".join(f"{count} {name}" for name, count in run["waits"].items()) or "none"
        CONSOLE.print(f"waits in engine.step, {run['model']} {run['config']}: {waits}")


def report(runs: Sequence[Run]) -> None:
    print_runs(runs)
    fp8 = [run for run in runs if run["fp8"] is not None]
    print_claims([claim for run in fp8 for claim in claims_of(run, baseline_of(run, runs))], CONSOLE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the training")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="file that collects runs")
    arguments, others = parser.parse_known_args()
    device = join_ranks()
    import gpt_pretrain
    from train_lm import leave_ranks

    example = gpt_pretrain.parse_arguments(["--time_limit", str(arguments.seconds), *others])
    path, runs = example.deepspeed_config, load(arguments.out)
    about: Run = {"config": path.stem, "model": example.model, "seed": example.seed, "options": others}
    about |= {"fp8": dry_run.read(str(path)).get("fp8"), "world_size": torch.distributed.get_world_size()}
    if identity(about) not in map(identity, runs):
        run = {**about, **gpt_pretrain.run(example, device, inspect), **facts(device)}
        runs.append({**run, "loss_last_100": statistics.fmean(run["losses"][-LAST:])})
    if torch.distributed.get_rank() == 0:
        report(runs)
        write(arguments.out, {"runs": runs})
    leave_ranks()


if __name__ == "__main__":
    main()
