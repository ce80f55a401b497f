"""Train the example once a ds_config, on two CPU ranks, and show the runs side by side.

    python examples/compare.py configs/zero2_o2.json configs/zero2_bf16.json --out demo

A config with an enabled "fp8" section is launched through `--module ds_fp8`, another one plainly.
Writes OUT/NAME.json for each run and OUT/loss.png.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from ds_fp8.estimate import dry_run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RANKS = 2


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def run(config: Path, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """One training run through the deepspeed launcher; its figures."""
    section = dry_run.read(str(config)).get("fp8")
    fp8 = isinstance(section, dict) and section.get("enabled", False)
    result = out / f"{config.stem}.json"
    launcher = Path(sys.executable).with_name("deepspeed")
    script = Path(__file__).with_name("train_lm.py")
    command = [str(launcher), "--num_gpus", str(RANKS), "--master_port", str(free_port())]
    command += ["--module", "ds_fp8"] if fp8 else []
    command += [str(script), "--deepspeed_config", str(config), "--json", str(result)]
    command += ["--steps", str(steps), "--seed", str(seed)]
    print(f"\n$ {' '.join(command)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(launcher.parent), os.environ.get("PATH", "")])
    subprocess.run(command, check=True, env=environment)
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def show(runs: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{RANKS} CPU ranks, {next(iter(runs.values()))['parameters']:,} parameters")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    rows = {
        "loss, mean of the last 50 steps": ("final_loss", "{:.4f}", 1),
        "validation loss": ("validation_loss", "{:.4f}", 1),
        "state bytes per parameter, all ranks": ("state_bytes_per_parameter", "{:.2f}", 1),
        "KB sent per rank and step": ("wire_bytes_per_step", "{:,.0f}", 1000),
        "ms per step, median": ("milliseconds_per_step", "{:.0f}", 1),
    }
    for title, (key, form, unit) in rows.items():
        table.add_row(title, *(form.format(run[key] / unit) for run in runs.values()))
    Console().print(table)


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for (name, each), style in zip(runs.items(), ("-", "--", ":", "-."), strict=False):
        axes.plot(range(1, len(each["losses"]) + 1), each["losses"], style, label=name, linewidth=1.3)
    axes.set(xlabel="step", ylabel="training loss (nats per byte)", title="Byte-level GPT, 2 ranks")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, help="ds_config files, at most four")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = {
        config.stem: run(config, arguments.out, arguments.steps, arguments.seed)
        for config in arguments.configs
    }
    show(runs)
    draw(runs, arguments.out / "loss.png")
    print(f"loss curves: {arguments.out / 'loss.png'}")


if __name__ == "__main__":
    main()
