"""Draws docs/pictures/overview.png from benchmarks/gpu/*.json: step time, memory and loss beside stock BF16.

python docs/overview.py
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "gpu"
# Each comparison: its title, its file, and config -> label, stock first.
COMPARISONS = [
    ("GPT 1.3B\n2 H100, ZeRO 2", "train_h100", {"bf16": "stock BF16", "o2": "O2", "o2plus": "O2+"}),
    (
        "Llama 7B\n2 H200, ZeRO 3",
        "zero3_o3_h200",
        {"zero3_bf16_torch": "stock BF16", "zero3_o3": "O3"},
    ),
    (
        "Llama 7B, compiled\n2 H200, ZeRO 2",
        "equal_batch_7B_h200",
        {"bf16_torch_overlap": "stock BF16", "fsdp2": "FSDP2", "o2plus_overlap": "O2+", "o3_overlap": "O3"},
    ),
]
LOSSES = {  # GPT 125M
    "stock BF16": "125M_bf16_beta2_999_h100",
    "O2": "125M_o2_beta2_999_h100",
    "O2+": "125M_o2plus_beta2_999_h100",
}
SEEDS = ("o3_350M_batch_h200", {"bf16_torch": "stock BF16", "o3_every_linear": "O3"})  # GPT 350M
COLOURS = {
    "stock BF16": "#8c8c8c",
    "FSDP2": "#c7c7c7",
    "O2": "#4c78a8",
    "O2+": "#54a24b",
    "O3": "#e45756",
}
WINDOW = 50  # steps that are averaged for the loss curve


def runs_of(file: str, config: str) -> list[dict[str, Any]]:
    runs = json.loads((RESULTS / f"{file}.json").read_text())["runs"]
    return [each for each in runs if each["config"] == config]


def measured(file: str, config: str) -> tuple[float, float]:
    """Median milliseconds per step and peak GB of one config, over all its runs."""
    found = runs_of(file, config)
    times = [ms for each in found for ms in each.get("milliseconds") or [each["milliseconds_a_step"]]]
    return statistics.median(times), max(each["peak_bytes_allocated"] for each in found) / 1e9


def draw_bars(axes: Axes, of: int, title: str, unit: str) -> None:
    """One group of bars per comparison, as shares of stock. of: 0 for time, 1 for memory."""
    ticks, labels, start = [], [], 0.0
    for name, file, configs in COMPARISONS:
        figures = {label: measured(file, config)[of] for config, label in configs.items()}
        for place, (label, figure) in enumerate(figures.items()):
            share = figure / figures["stock BF16"]
            axes.bar(start + place, share, color=COLOURS[label], width=0.85)
            axes.text(start + place, share + 0.02, f"{figure:,.{of}f}", ha="center", fontsize=7.5)
        ticks.append(start + 1)
        labels.append(name)
        start += len(figures) + 0.8
    axes.set(xticks=ticks, ylim=(0, 1.15), title=f"{title} (share of stock; labels in {unit})")
    axes.set_xticklabels(labels, fontsize=7.5)


def draw_losses(axes: Axes) -> None:
    for label, file in LOSSES.items():
        draw_loss(axes, json.loads((RESULTS / f"{file}.json").read_text())["losses"], label)
    file, configs = SEEDS
    for config, label in configs.items():
        seeds = [each["losses"] for each in runs_of(file, config)]
        draw_loss(axes, np.mean(seeds, axis=0), label, "--")
    axes.set(ylim=(0.4, 3), xlabel="step", title="Training loss: GPT 125M; 350M, three seeds (dashed)")


def draw_loss(axes: Axes, losses: Sequence[float], label: str, style: str = "-") -> None:
    smooth = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
    axes.plot(
        np.arange(WINDOW, len(losses) + 1), smooth, style, color=COLOURS[label], linewidth=1.2, label=label
    )


def main() -> None:
    figure, (time, memory, loss) = plt.subplots(1, 3, figsize=(13, 3.4), constrained_layout=True)
    draw_bars(time, 0, "Time per step", "ms")
    draw_bars(memory, 1, "Peak memory per GPU", "GB")
    draw_losses(loss)
    for axes in (time, memory, loss):
        axes.title.set_fontsize(10)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    loss.legend(handles, list(COLOURS), fontsize=8)
    figure.savefig(ROOT / "docs" / "pictures" / "overview.png", dpi=120)


if __name__ == "__main__":
    main()
