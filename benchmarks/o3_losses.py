"""Compare O3's losses with stock DeepSpeed BF16's, every linear layer in FP8, with emulated products.

    nice python benchmarks/o3_losses.py --out benchmarks/cpu/o3_losses.json

A byte-level GPT (examples/train_lm.py) of 3.4 M parameters is trained on the documentation of Python for 500
steps. Runs are paired: for a seed all begin with the same weights and see the same batches. The compared
figures are the mean of the last 50 training losses, and the validation loss over 65,536 bytes that no run
trains on: the mean over the seeds of the difference to stock BF16, its standard error, and beside them the
spread, the standard deviation of stock's own seeds. The claim is that the mean lies inside the spread.

DS_FP8_PRODUCTS=emulated casts x, dy and weights as for cuBLAS, and multiplies in FP32 (ops/products.py): the
casts are under test. The health of O3's products is kept, early and late. Each result is written as soon as
it exists, and a study that was killed continues.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from claims import Claim, print_claims
from precision import SIZES, Job, Size, resumed, run, start
from precision_report import Results, paired_by
from recipes import PEAK_RATE, Build, engine, fp8
from rich.console import Console
from rich.table import Table
from seeds import Paired
from timing import facts, parser_of, round_count, write
from torch import nn
from train_lm import Shape

STOCK, O3 = "stock BF16", "O3"
SIZE = replace(SIZES["1M"], shape=Shape(4, 256, 4, 128), steps=500, validation_windows=512)
SETTINGS = ("shape", "batch", "steps", "validation_windows")  # of a study that can continue
FIGURES = {"training": "last training losses", "validation": "validation"}
EVERY_LINEAR = {"min_elements": 1}


class Watched:
    """Builds O3's engine, and keeps the health of its products, early and late."""

    def __init__(self, interval: int) -> None:
        self._section = {"opt_level": "O3", "weights": EVERY_LINEAR, "stats": {"interval": interval}}
        self.health: list[Mapping[str, Any]] = []

    def __call__(self, model: nn.Module, batch: int) -> Any:
        built = engine(model, batch, bf16=True, fp8=self._section)
        built.optimizer.parts.health.listeners.append(self.health.append)
        return built

    @property
    def early_and_late(self) -> list[Mapping[str, Any]]:
        """Return the products' figures at the first and the last measured step."""
        return [{"step": each["step"], **each["products"]} for each in (self.health[0], self.health[-1])]


def study(out: Path, result: dict[str, Any], size: Size, seeds: int, console: Console) -> None:
    """Run all that `result` does not have yet, one seed after the other, and update the file."""
    runs: dict[str, Results] = result["runs"]["training"]
    for seed in range(seeds):
        watched = Watched(max(1, size.steps // 50))
        recipes: dict[str, Build] = {STOCK: partial(engine, bf16=True), "O2": fp8("O2"), O3: watched}
        for name, build in recipes.items():
            if str(seed) in runs.setdefault(name, {}):
                continue
            figures = runs[name][str(seed)] = run(Job("training", name, seed), size, out, build)
            if watched.health:
                result.setdefault("health", {})[str(seed)] = watched.early_and_late
            write(out, result)
            found = "training {training:.4f}, validation {validation:.4f}, {seconds:.0f} s".format(**figures)
            console.print(f"seed {seed}, {name}: {found}", markup=False, highlight=False)


def pairs(runs: Mapping[str, Results]) -> dict[tuple[str, str], Paired]:
    """Pair runs by recipe and figure."""
    return {
        (name, figure): paired_by(figure, results, runs[STOCK])
        for name, results in runs.items()
        for figure in FIGURES
        if name != STOCK
    }


def print_pairs(found: Mapping[tuple[str, str], Paired], console: Console) -> None:
    table = Table(title=f"nats per byte from {STOCK} of the same seed")
    for column in ("", "", "mean", "standard error", f"spread of {STOCK}", "by seed"):
        table.add_column(column)
    for (name, figure), each in found.items():
        by_seed = " ".join(f"{value:+.4f}" for value in each.differences.values())
        numbers = (f"{each.mean:+.4f}", f"{each.standard_error:.4f}", f"{each.spread:.4f}")
        table.add_row(name, FIGURES[figure], *numbers, by_seed)
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__, rounds=False)
    parser.add_argument("--seeds", type=round_count, help="default 5")
    parser.set_defaults(out=Path("o3_losses.json"))
    arguments = parser.parse_args()
    size = SIZES["tiny"] if arguments.quick else SIZE
    os.environ["DS_FP8_PRODUCTS"] = "emulated"
    try:
        settings = {name: asdict(size)[name] for name in SETTINGS}
        result = resumed(arguments.out, {**settings, "peak_rate": PEAK_RATE, "weights": EVERY_LINEAR})
    except ValueError as error:
        parser.error(str(error))
    result["machine"] = facts()
    start()
    console = Console(width=132)
    study(arguments.out, result, size, arguments.seeds or (2 if arguments.quick else 5), console)
    found = pairs(result["runs"]["training"])
    print_pairs(found, console)
    claims = [
        Claim.at_most(f"O3: |mean difference|, {text}", abs(found[O3, figure].mean), found[O3, figure].spread)
        for figure, text in FIGURES.items()
    ]
    print_claims(claims, console)
    rows = [
        {
            "recipe": name,
            "figure": figure,
            "mean": each.mean,
            "error": each.standard_error,
            "spread": each.spread,
        }
        for (name, figure), each in found.items()
    ]
    write(arguments.out, {**result, "rows": rows, "claims": [asdict(each) for each in claims]})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
