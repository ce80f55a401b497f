"""Draws docs/pictures/ways.png: a gradient's way and a weight's way.

python docs/ways.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

GRADIENT = [
    ("hook", "autograd is done\nwith a parameter;\nBF16 in .grad"),
    ("bucket", "quantised: E4M3 codes,\na scale byte (E8M0)\nfor 128 of them"),
    ("exchange", "one all-to-all\nof bytes: 1.0078\nan element"),
    ("shard", "decoded, added in FP32\nin rank order, rounded\nonce: E4M3"),
]
WEIGHT = [
    ("shard", "gradient, master,\nexp_avg, exp_avg_sq\nof this rank's blocks"),
    ("sweep", "norm and skip agreed;\none pass of Adam,\nread and written once"),
    ("gather", "BF16 weights of\nevery rank, bucket\nby bucket"),
    ("parameter", "the model's tensors:\nviews of the\nbucket's buffer"),
]
COLOURS = {"gradient": "#fde9d0", "weight": "#d8e8f8"}
WIDTH, HEIGHT, GAP = 2.3, 1.25, 0.55


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "#333333", "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def lane(axes: Axes, y: float, title: str, colour: str, stations: list[tuple[str, str]]) -> None:
    axes.text(0, y + HEIGHT + 0.12, title, fontsize=12, fontweight="bold", va="bottom")
    for place, (name, text) in enumerate(stations):
        x = place * (WIDTH + GAP)
        axes.add_patch(plt.Rectangle((x, y), WIDTH, HEIGHT, facecolor=colour, edgecolor="#555555"))
        middle = x + WIDTH / 2
        bold = {"fontsize": 11, "fontweight": "bold"}
        axes.text(middle, y + HEIGHT - 0.1, name, **bold, ha="center", va="top")
        axes.text(middle, y + HEIGHT / 2 - 0.14, text, fontsize=9.5, ha="center", va="center")
        if place:
            arrow(axes, (x - GAP, y + HEIGHT / 2), (x, y + HEIGHT / 2))


def main() -> None:
    figure, axes = plt.subplots(figsize=(10.6, 4.2), constrained_layout=True)
    lane(axes, 2.2, "a gradient's way", COLOURS["gradient"], GRADIENT)
    lane(axes, 0.0, "a weight's way", COLOURS["weight"], WEIGHT)
    start, end = 3 * (WIDTH + GAP) + WIDTH / 2, 0.9 * WIDTH  # beside the title
    axes.plot([start, start, end, end], [2.2, 1.9, 1.9, 1.4], color="#333333", linewidth=1.6)
    arrow(axes, (end, 1.5), (end, HEIGHT))
    axes.set_xlim(-0.1, 4 * WIDTH + 3 * GAP + 0.1)
    axes.set_ylim(-0.15, 3.95)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(Path(__file__).parent / "pictures" / "ways.png", dpi=130)


if __name__ == "__main__":
    main()
