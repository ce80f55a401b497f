"""Training losses of every level beside stock DeepSpeed BF16, over several seeds: is the difference noise?

    python benchmarks/parity.py --out benchmarks/cpu/parity.json --picture docs/pictures/parity.png

The example (examples/train_lm.py) on two CPU ranks, ZeRO 2. A seed chooses weights and batches, so two runs
of a seed differ by numerics alone, and two seeds of a config by everything else. Upper picture: smoothed
losses, the mean of the seeds with their range. Lower picture: the difference to stock BF16 of the same seed,
beside the spread of stock's own seeds.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from timing import facts

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from compare import plt, run

ROOT = Path(__file__).resolve().parent.parent
STOCK = "stock BF16"
CONFIGS = {STOCK: "zero2_bf16", "O1": "zero2_o1", "O2": "zero2_o2", "O2+": "zero2_o2plus"}
WINDOW = 20  # steps averaged for the picture
LAST = 50  # steps whose mean is the final loss


def train(steps: int, seeds: int) -> dict[str, list[list[float]]]:
    """Return losses by config and seed."""
    losses: dict[str, list[list[float]]] = {name: [] for name in CONFIGS}
    with TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name, config in CONFIGS.items():
                figures = run(ROOT / "configs" / f"{config}.json", Path(folder), steps, seed)
                losses[name].append(figures["losses"])
    return losses


def final(losses: list[float]) -> float:
    return statistics.fmean(losses[-LAST:])


def summarise(losses: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    stock = [final(each) for each in losses[STOCK]]
    rows = []
    for name, by_seed in losses.items():
        finals = [final(each) for each in by_seed]
        differences = [ours - theirs for ours, theirs in zip(finals, stock, strict=True)]
        rows.append({"name": name, "loss": statistics.fmean(finals), "differences": differences})
    return rows


def smoothed(losses: list[list[float]]) -> Any:
    """Moving average, [seeds, steps - WINDOW + 1]."""
    kernel = np.ones(WINDOW) / WINDOW
    return np.stack([np.convolve(each, kernel, mode="valid") for each in losses])


def draw(losses: dict[str, list[list[float]]], picture: Path) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 6.2), sharex=True, constrained_layout=True)
    stock = smoothed(losses[STOCK])
    steps = np.arange(WINDOW, WINDOW + stock.shape[1])
    spread = stock - stock.mean(axis=0)
    below.fill_between(
        steps,
        spread.min(axis=0),
        spread.max(axis=0),
        color="0.85",
        label=f"{STOCK}: its seeds about their mean",
    )
    for (name, by_seed), style in zip(losses.items(), ("-", "--", "-.", ":"), strict=True):
        curves = smoothed(by_seed)
        line = above.plot(steps, curves.mean(axis=0), style, label=name, linewidth=1.4)[0]
        above.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.12)
        if name != STOCK:
            difference = (curves - stock).mean(axis=0)
            below.plot(
                steps, difference, style, color=line.get_color(), label=f"{name} less {STOCK}, same seeds"
            )
    seeds = len(losses[STOCK])
    above.set(ylabel="training loss (nats per byte)", title=f"Byte-level GPT, 2 ranks, ZeRO 2, {seeds} seeds")
    below.set(xlabel="step", ylabel="difference (nats per byte)")
    above.legend(fontsize=8)
    below.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("parity.json"))
    parser.add_argument("--picture", type=Path, default=Path("parity.png"))
    arguments = parser.parse_args()
    machine = facts()
    losses = train(arguments.steps, arguments.seeds)
    rows = summarise(losses)
    table = Table(title=f"mean loss of the last {LAST} of {arguments.steps} steps, nats per byte")
    for column in ("", "loss", f"less {STOCK}, by seed"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], f"{row['loss']:.4f}", " ".join(f"{x:+.4f}" for x in row["differences"]))
    Console().print(table)
    draw(losses, arguments.picture)
    rounded = {name: [[round(x, 5) for x in each] for each in found] for name, found in losses.items()}
    arguments.out.write_text(json.dumps({"machine": machine, "rows": rows, "losses": rounded}))


if __name__ == "__main__":
    main()
