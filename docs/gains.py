"""Draws docs/pictures/gains.png from benchmarks/gpu/*.json: of what O3's speed is made, Llama 7B on two GPUs.

python docs/gains.py
"""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from overview import COLOURS, ROOT, measured, runs_of

BATCH, MEMORY = "equal_batch_7B_h200", "equal_memory_7B_h200"
STEPS = [  # one thing is switched at a time: its name, and the run that has it
    ("O3: what stock does", BATCH, "bf16_torch_overlap"),
    ("states,\nwire", BATCH, "o2plus_overlap"),
    ("products", BATCH, "o3_overlap"),
    ("micro-batch, no recomputation", MEMORY, "o3_overlap"),
]
PEERS = [  # each at its best in the same memory
    ("stock BF16", "bf16_torch_overlap"),
    ("FSDP2", "fsdp2"),
    ("stock, BF16 states", "bf16_states_torch_overlap"),
    ("O2+ with float8", "o2plus_overlap+float8"),
]
SHADES = [COLOURS["stock BF16"], COLOURS["O2+"], COLOURS["O3"], "#f2a6a0"]


def speed(file: str, config: str) -> float:
    """Thousands of tokens per second of all ranks, by the median step."""
    return float(runs_of(file, config)[0]["tokens"] / measured(file, config)[0])


def main() -> None:
    figure, axes = plt.subplots(figsize=(9, 2.6), constrained_layout=True)
    for place, (name, config) in enumerate(PEERS):
        axes.barh(place, speed(MEMORY, config), color=COLOURS["FSDP2"], height=0.7)
        axes.text(0.3, place, name, va="center", fontsize=8.5)
    ends = [0.0, *(speed(file, config) for _, file, config in STEPS)]
    for (name, *_), shade, (start, end) in zip(STEPS, SHADES, pairwise(ends), strict=True):
        axes.barh(len(PEERS), end - start, left=start, color=shade, height=0.7)
        text = f"{name}\n{end - start:+.1f}" if start else name
        axes.text((start + end) / 2, len(PEERS), text, ha="center", va="center", fontsize=6.5)
    axes.set(yticks=[], xlabel="thousand tokens per second", title="Llama 7B, two H200s")
    axes.title.set_fontsize(10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(ROOT / "docs" / "pictures" / "gains.png", dpi=120)


if __name__ == "__main__":
    main()
