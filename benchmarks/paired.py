"""Compare losses with FP8 and stock's over paired seeds, from files of gpu_train.py.

    for seed in 0 1 2; do
        for config in bf16_torch o3_every_linear; do
            torchrun --nproc_per_node 1 benchmarks/gpu_train.py --out $config.$seed.json --seed $seed \\
                --deepspeed_config benchmarks/gpu/$config.json --model 350M --micro_batch 16 --context 1024 \\
                --steps 1000 --warmup_steps 100 --log_interval 100 --seconds 3000
        done
    done
    python benchmarks/paired.py bf16_torch.*.json o3_every_linear.*.json --bound .02

Runs of a seed begin with the same weights and see the same batches. The compared figure is the mean loss of
the last steps: the mean over the seeds of the difference to stock BF16 of the same seed, and its standard
error.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from claims import Claim, print_claims
from gpu_train import CONSOLE, LAST, Run, baseline_of, load, seed_of
from rich.table import Table
from seeds import Paired, paired


def last_loss(run: Run, steps: int) -> float:
    """Return the mean loss of the last LAST of `steps` steps."""
    return statistics.fmean(run["losses"][:steps][-LAST:])


def pairs(runs: list[Run]) -> dict[str, Paired]:
    """Pair runs with FP8 and stock's of the same seed, by model and configuration."""
    ours: dict[str, dict[int, float]] = {}
    stock: dict[str, dict[int, float]] = {}
    for run in runs:
        beside = baseline_of(run, runs)
        if run["fp8"] is None or beside is None:
            continue
        name, seed = f"{run['model']} {run['config']}", seed_of(run)
        steps = min(len(run["losses"]), len(beside["losses"]))
        ours.setdefault(name, {})[seed] = last_loss(run, steps)
        stock.setdefault(name, {})[seed] = last_loss(beside, steps)
    return {name: paired(found, stock[name]) for name, found in ours.items()}


def print_pairs(found: Mapping[str, Paired]) -> None:
    table = Table(title="nats from stock BF16 of the same seed")
    for column in (
        "",
        "seeds",
        "mean",
        "standard error",
        "|mean| + 2 errors",
        "spread of stock's",
        "by seed",
    ):
        table.add_column(column)
    for name, each in found.items():
        figures = (each.standard_error, each.at_most, each.spread)
        by_seed = " ".join(f"{value:+.4f}" for value in each.differences.values())
        texts = (f"{each.mean:+.4f}", *(f"{value:.4f}" for value in figures), by_seed)
        table.add_row(name, str(len(each.differences)), *texts)
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what gpu_train.py wrote")
    parser.add_argument("--bound", type=float, default=0.02, help="of |mean| + 2 errors; default .02")
    arguments = parser.parse_args()
    found = pairs([run for file in arguments.files for run in load(file)])
    if not found:
        parser.error("received no run with FP8 that has stock BF16 of its model, ranks and seed beside it")
    print_pairs(found)
    text = "{}: |mean difference| + 2 standard errors, nats"
    print_claims(
        [Claim.at_most(text.format(name), each.at_most, arguments.bound) for name, each in found.items()],
        CONSOLE,
    )


if __name__ == "__main__":
    main()
