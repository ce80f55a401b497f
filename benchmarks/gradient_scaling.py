"""FP8-LM's three ways to scale a sum of gradients in FP8, beside blocks that are added in FP32.

    python benchmarks/gradient_scaling.py --out benchmarks/cpu/gradient_scaling.json \
        --picture docs/pictures/gradient_scaling.png

The paper's Figure 7, on gradients of the example (examples/train_lm.py) after some training: each of N ranks
has its own batch and so its own real gradient, in BF16. One process plays all ranks, with the ops that ranks
run: tests check that ranks give the same. "pre" divides by N before the sum (mu = 1/N), "post" after it
(mu = 1), "dynamic" halves a tensor's mu until no more than 1e-5 of its sum is at the largest code. "blocks"
is the default here: E4M3 with a scale per 128 values, added in FP32. The sum is then an FP32 shard, or a
shard kept in E4M3, which rounds once more; the paper's sums are in E4M3 from the start.

SNR: of the reduced gradient, in dB, relative to the exact sum. Underflow: non-zero values of the ranks'
gradients whose code is zero. Overflow: values of the exact sum that are beyond the largest code.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import parser_of, write
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from compare import plt
from train_lm import ByteGPT, Corpus, Shape, read_corpus

from ds_fp8.ops import fp8_sum
from ds_fp8.ops.blocks import Blocks, decode, quantize, to_float32
from ds_fp8.ops.formats import E4M3, FP32
from ds_fp8.ops.reduction import accumulate

BLOCK = 128
BATCH = 8
THRESHOLD = 1e-5
PAPER = ("pre", "post", "dynamic")
OURS = ("blocks, FP32", "blocks, kept in E4M3")
WAYS = (*PAPER, *OURS)
CPU = torch.device("cpu")


@dataclass
class Error:
    """Sums over tensors and ranks."""

    signal: float = 0.0
    noise: float = 0.0
    sent: int = 0  # non-zero values
    lost: int = 0  # non-zero values whose code is zero
    summed: int = 0
    beyond: int = 0  # exact sums beyond the largest code

    def add(self, other: "Error") -> None:
        self.__init__(*map(sum, zip(astuple(self), astuple(other), strict=True)))  # type: ignore[misc]

    @property
    def figures(self) -> dict[str, float]:
        return {
            "snr_db": 10 * math.log10(self.signal / self.noise),
            "underflow": self.lost / self.sent,
            "overflow": self.beyond / self.summed,
        }


@dataclass
class Gradients:
    """Gradients of every tensor, one tensor at a time: [ranks, elements] bfloat16."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def of(self, ranks: int) -> Iterator[Tensor]:
        for each in self.tensors.values():
            yield each[:ranks]


def make(ranks: int, steps: int) -> Gradients:
    """Train the example on a single process for some steps, then take a gradient for each rank."""
    shape, corpus = Shape(), Corpus(read_corpus("topics"), Shape().context)
    torch.manual_seed(0)
    model = ByteGPT(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    batches = corpus.batches(BATCH, 0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(next(batches)).backward()
        optimizer.step()
    model.bfloat16()
    sizes = {name: each.numel() for name, each in model.named_parameters()}
    found = Gradients({name: torch.empty(ranks, size, dtype=torch.bfloat16) for name, size in sizes.items()})
    for rank in range(ranks):
        model.zero_grad()
        model(next(corpus.batches(BATCH, 1000 + rank))).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found.tensors[name][rank] = parameter.grad.view(-1)
    return found


def error(found: Tensor, exact: Tensor, sent: int, lost: int, reach: float) -> Error:
    noise = (found.double() - exact).square().sum().item()
    beyond = int((exact.abs() > reach).sum())
    return Error(exact.square().sum().item(), noise, sent, lost, exact.numel(), beyond)


def sum_in_fp8(gradients: Tensor, exact: Tensor, mu: float) -> tuple[Error, float]:
    """Do what ranks and owner do with a tensor; return also the share of the sum at the largest code."""
    rows, sent, lost, saturated = -(-gradients.shape[1] // BLOCK), 0, 0, 0.0
    amax = torch.stack([fp8_sum.largest(each) for each in gradients]).amax()
    inverse = fp8_sum.inverse_scales(amax[None], torch.tensor([mu]), E4M3)[0]
    total = Blocks(torch.zeros(rows, BLOCK, dtype=E4M3.dtype), None, E4M3)
    for gradient in gradients:
        codes = Blocks(torch.empty_like(total.codes), None, E4M3)
        fp8_sum.quantize(gradient, inverse, codes)
        values = to_float32(codes.codes, E4M3).view(-1)[: len(gradient)]
        sent += int(gradient.count_nonzero())
        lost += int((gradient.bool() & (values == 0)).sum())
        saturated = float(fp8_sum.ring_sum([total, codes], total)) / len(gradient)
    found = decode(total).view(-1)[: exact.numel()] / inverse
    return error(found, exact, sent, lost, E4M3.max / inverse.item()), saturated


def dynamic(gradients: Tensor, exact: Tensor) -> Error:
    """Sum with the mu at which the rule stops."""
    mu = 1.0
    while True:
        found, saturated = sum_in_fp8(gradients, exact, mu)
        if saturated <= THRESHOLD:
            return found
        mu /= 2


def sum_in_blocks(gradients: Tensor, exact: Tensor, *, keep: bool) -> Error:
    rows, sent, lost = -(-gradients.shape[1] // BLOCK), 0, 0
    total, piece = (Blocks.zeros(rows, BLOCK, fmt, CPU) for fmt in (FP32, E4M3))
    for gradient in gradients:
        quantize(gradient, piece)
        sent += int(gradient.count_nonzero())
        codes = to_float32(piece.codes, E4M3).view(-1)[: len(gradient)]
        lost += int((gradient.bool() & (codes == 0)).sum())
        accumulate([piece], total, overwrite=False)
    if keep:
        quantize(decode(total).view(-1), piece)
        total = piece
    return error(decode(total).view(-1)[: exact.numel()], exact, sent, lost, math.inf)


REDUCED: dict[str, Callable[[Tensor, Tensor], Error]] = {
    "pre": lambda gradients, exact: sum_in_fp8(gradients, exact, 1 / len(gradients))[0],
    "post": lambda gradients, exact: sum_in_fp8(gradients, exact, 1.0)[0],
    "dynamic": dynamic,
    "blocks, kept in E4M3": lambda gradients, exact: sum_in_blocks(gradients, exact, keep=True),
    "blocks, FP32": lambda gradients, exact: sum_in_blocks(gradients, exact, keep=False),
}


def measure(gradients: Gradients, ranks: int) -> dict[str, Any]:
    errors = {way: Error() for way in WAYS}
    for tensor in gradients.of(ranks):
        exact = sum((each.double() for each in tensor), start=torch.zeros(tensor.shape[1]).double())
        for way, found in errors.items():
            found.add(REDUCED[way](tensor, exact))
    ways = {way: each.figures for way, each in errors.items()}
    best = max(ways[way]["snr_db"] for way in PAPER)
    above = {way: ways[way]["snr_db"] - best for way in OURS}
    return {"ranks": ranks, "ways": ways, "above_best_of_paper_db": above}


def print_rows(rows: list[dict[str, Any]]) -> None:
    for figure, title in (("snr_db", "SNR, dB"), ("underflow", "underflow"), ("overflow", "overflow")):
        table = Table(title=title)
        columns = [f"{way} above the three" for way in OURS] if figure == "snr_db" else []
        for column in ("N", *WAYS, *columns):
            table.add_column(column, justify="right")
        for row in rows:
            form = ".2f" if figure == "snr_db" else ".2e"
            cells = [f"{row['ways'][way][figure]:{form}}" for way in WAYS]
            more = [f"{row['above_best_of_paper_db'][way]:.2f}" for way in OURS] if columns else []
            table.add_row(str(row["ranks"]), *cells, *more)
        Console(width=120).print(table)


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), constrained_layout=True)
    titles = {"snr_db": "SNR of the sum, dB", "underflow": "underflow, share", "overflow": "overflow, share"}
    for place, (name, title) in zip(axes, titles.items(), strict=True):
        for way in WAYS:
            values = [row["ways"][way][name] for row in rows]
            place.plot([row["ranks"] for row in rows], values, marker="o", markersize=3, label=way)
        place.set_xscale("log", base=2)
        place.set_xlabel("ranks")
        place.set_title(title)
        if name != "snr_db":
            place.set_yscale("symlog", linthresh=1e-6)
            place.set_ylim(bottom=-2e-7, top=1)
        place.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = parser_of(__doc__, rounds=False)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the curves to this PNG")
    parser.add_argument(
        "--largest", type=int, default=512, help="number of ranks, a power of two; default 512"
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps before; default 100")
    arguments = parser.parse_args()
    largest = 4 if arguments.quick else arguments.largest
    gradients = make(largest, 2 if arguments.quick else arguments.steps)
    counts = [2**power for power in range(1, largest.bit_length())]
    rows = [measure(gradients, ranks) for ranks in counts]
    print_rows(rows)
    elements = sum(each.shape[1] for each in gradients.tensors.values())
    write(arguments.out, {"elements": elements, "steps": arguments.steps, "batch": BATCH, "rows": rows})
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
