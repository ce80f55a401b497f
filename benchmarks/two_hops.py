"""The cost of the second rounding in a two-hop exchange: signal to noise of the reduced gradient.

    python benchmarks/two_hops.py --out two_hops.json

Gradients of N ranks are drawn with a correlation between ranks, rounded, added and rounded as in the exchange
(tests/test_two_hops.py checks that the exchange gives the same sums, bit for bit), and compared with the
exact sum. "cost" is one hop's dB less two hops', without the rounding of the reduced gradient itself.
"theory" assumes that the second rounding is as noisy, relative to its input, as the first: 10 log10(2 +
(k - 1) c) dB, c the correlation: 3 for independent gradients, 10 log10(1 + k) for equal ones.
"with ties" takes into account that a sum of k codes of one binade often lies in the middle between two codes:
at most 1 + 2/k^2 times the noise. "kept" is with the rounding of the reduced gradient; the defaults are E4M3
with one hop and BF16 with two in E4M3.
"""

import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import element_count, parser_of, write
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, dequantize, quantize
from ds_fp8.ops.formats import BF16, E4M3, Format

BLOCK = 128
CORRELATIONS = (0.0, 0.5, 0.9)
RANKS = ((4, 2), (8, 2), (8, 4), (16, 8), (32, 8))


def rounded(values: Tensor, fmt: Format) -> Tensor:
    """Return FP32 values as a format stores them."""
    blocks = Blocks.zeros(len(values) // BLOCK, BLOCK, fmt, values.device)
    quantize(values, blocks)
    result = torch.empty_like(values)
    dequantize(blocks, result)
    return result


def total(parts: list[Tensor]) -> Tensor:
    """Add the parts in order."""
    return sum(parts[1:], start=parts[0])


def drawn(ranks: int, correlation: float, size: int) -> list[Tensor]:
    """Draw one gradient per rank."""
    generator = torch.Generator().manual_seed(ranks)
    shared = torch.randn(size, generator=generator) * math.sqrt(correlation)
    own = math.sqrt(1 - correlation)
    return [shared + torch.randn(size, generator=generator) * own for _ in range(ranks)]


def signal_to_noise(found: Tensor, exact: Tensor) -> float:
    """Return the signal to noise ratio in dB."""
    return 10 * math.log10((exact.square().sum() / (found.double() - exact).square().sum()).item())


def measure(ranks: int, node: int, correlation: float, size: int) -> dict[str, Any]:
    gradients = drawn(ranks, correlation, size)
    exact = total([each.double() for each in gradients])
    wire = [rounded(each, E4M3) for each in gradients]
    sums = [total(wire[first : first + node]) for first in range(0, ranks, node)]
    one = total(wire)
    two, bf16 = (total([rounded(each, fmt) for each in sums]) for fmt in (E4M3, BF16))
    decibels = {name: signal_to_noise(each, exact) for name, each in {"one": one, "two": two}.items()}
    decibels["two, BF16 between"] = signal_to_noise(bf16, exact)
    decibels["one, kept in E4M3"] = signal_to_noise(rounded(one, E4M3), exact)
    decibels["two, kept in BF16"] = signal_to_noise(rounded(two, BF16), exact)
    decibels["two, kept in E4M3"] = signal_to_noise(rounded(two, E4M3), exact)
    decibels["two, BF16 between, kept in E4M3"] = signal_to_noise(rounded(bf16, E4M3), exact)
    power = 1 + (node - 1) * correlation
    return {
        "ranks": ranks,
        "node": node,
        "correlation": correlation,
        "decibels": decibels,
        "cost": decibels["one"] - decibels["two"],
        "theory": 10 * math.log10(1 + power),
        "theory_with_ties": 10 * math.log10(1 + power * (1 + 2 / node**2)),
        "cost_of_bf16": decibels["one"] - decibels["two, BF16 between"],
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Signal to noise of the reduced gradient in dB, E4M3, two hops of nodes of k ranks")
    names = list(rows[0]["decibels"])
    for column in ("correlation", "N", "k", *names, "cost", "theory", "with ties", "cost of BF16 between"):
        table.add_column(column, justify="right")
    for row in rows:
        decibels = [f"{row['decibels'][name]:.1f}" for name in names]
        costs = [f"{row[name]:.2f}" for name in ("cost", "theory", "theory_with_ties", "cost_of_bf16")]
        table.add_row(f"{row['correlation']:g}", str(row["ranks"]), str(row["node"]), *decibels, *costs)
    Console(width=160).print(table)


def main() -> None:
    parser = parser_of(__doc__, rounds=False)
    parser.add_argument("--elements", type=element_count, default=1 << 20, help="multiples of 128")
    arguments = parser.parse_args()
    size = 1 << 14 if arguments.quick else arguments.elements
    if size % BLOCK:
        parser.error(f"--elements: received {size}, allowed: multiples of {BLOCK}")
    cases = [(*ranks, correlation) for correlation in CORRELATIONS for ranks in RANKS]
    rows = [measure(ranks, node, correlation, size) for ranks, node, correlation in cases]
    print_rows(rows)
    write(arguments.out, {"elements": size, "rows": rows})


if __name__ == "__main__":
    main()
