"""Time our Adam sweep on a CPU beside the AdamWs of other libraries and STREAM triad.

    OMP_NUM_THREADS=2 python benchmarks/adam_cpu.py --sizes 1M 10M 50M 200M --out adam_cpu.json

What it shows: O2 (FP16 master, E4M3 exp_avg, FP16 exp_avg_sq, block 128) reads a BF16 gradient and writes
BF16 weights in less time than an FP32 AdamW that does the same work, at the speed of memory, with 5 bytes
of state per parameter and no temporary. First the kernels must equal the reference, and every contestant's
first step must be Adam's. In each round every contestant steps once, so that all run under the same
conditions; "time / ours" is the median of the ratios, round by round. --sizes adds our sweep's cost per
parameter by size.

ms: median. GB/s: the least that a step reads and writes, by the formats, without temporaries. State: all but
gradient and BF16 weights. Extra MB: rise of the resident high-water mark in a step (VmHWM, reset by
/proc/self/clear_refs). The bf16 peers have no master: steps below BF16's precision are lost.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from operations import BLOCK, LEVELS, gradients, sweep
from peers_cpu import HYPERPARAMETERS, PEERS, Peer, PeerError, PeerStep
from rich.console import Console
from rich.table import Table
from timing import (
    CPU,
    TRIAD,
    Contestant,
    Times,
    checked_backend,
    element_count,
    facts,
    interleave,
    parser_of,
    peak_extra_bytes,
    title,
    triad,
    write,
)
from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, next_clamp
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BF16

OURS = "ds_fp8 O2"
FORMATS = {**{f"ds_fp8 {level}": formats for level, formats in LEVELS.items()}, "ds_fp8 bf16": (BF16,) * 3}
MULTIPLE = 1024
CHECKED = 1 << 16  # elements whose first step is checked
TOLERANCE = 0.1  # share of an update, most of which is the rounding of the BF16 weight


@dataclass(frozen=True)
class Entry:
    """A contestant and its columns in the table."""

    contestant: Contestant
    held: int  # bytes of state
    gradient: str
    fp32_peer: bool


def scalars(*, clamped: bool) -> Callable[[], AdamScalars]:
    """Return a function that gives the scalars of consecutive steps."""
    betas = HYPERPARAMETERS["betas"]
    step, square = 0, None

    def following() -> AdamScalars:
        nonlocal step, square
        step, square = step + 1, next_clamp(square, betas) if step else (1 - betas[0]) ** 2 / (1 - betas[1])
        clamp = math.sqrt(square) if clamped else None
        lr, eps, decay = (HYPERPARAMETERS[name] for name in ("lr", "eps", "weight_decay"))
        return AdamScalars(step, lr, betas[0], betas[1], eps, decay, True, True, clamp)

    return following


def start_weights(size: int) -> Tensor:
    """Return weights, [n] BF16, of a model's magnitude."""
    return gradients(size, CPU).mul_(20)


def update_error(weights: Tensor, start: Tensor, gradient: Tensor) -> float:
    """Return the relative distance of a first step from Adam's."""
    w, w0, g = (each.reshape(-1)[:CHECKED].float() for each in (weights, start, gradient))
    lr, decay, eps = (HYPERPARAMETERS[name] for name in ("lr", "weight_decay", "eps"))
    exact = -lr * decay * w0 - lr * g / (g.abs() + eps)
    return float((w - w0 - exact).norm() / exact.norm())


def check_first_step(weights: Tensor, start: Tensor, gradient: Tensor) -> None:
    error = update_error(weights, start, gradient)
    if not error < TOLERANCE:
        raise PeerError(f"its first step differs from Adam's by {error:.2f} of it")


def ours(backend: Backend, name: str, start: Tensor, gradient: Tensor) -> Entry:
    weights = start.clone().view(-1, BLOCK)
    blocks = Blocks(gradient.view(-1, BLOCK), None, BF16)
    run, moved, held = sweep(
        backend, FORMATS[name], blocks, weights, scalars(clamped="O1" not in name), torch.ones(2)
    )
    run()
    check_first_step(weights, start, gradient)
    return Entry(Contestant(name, run, moved), held, "bf16", False)


def theirs(peer: Peer, start: Tensor, by_dtype: dict[torch.dtype, Tensor], *, quick: bool) -> Entry:
    if quick and peer.compiles:
        raise PeerError("left out by --quick: it may compile for minutes")
    step = PeerStep(peer, start, by_dtype)
    check_first_step(step.weights, start, by_dtype[torch.bfloat16])
    gradient = "bf16" if peer.gradient is torch.bfloat16 else "fp32"
    return Entry(Contestant(peer.name, step.run, step.moved, peer.rounds), step.held, gradient, step.fp32)


def enter(backend: Backend, size: int, *, quick: bool) -> tuple[list[Entry], dict[str, str]]:
    """Return the contestants that can run, and the reasons of those that cannot."""
    start, gradient = start_weights(size), gradients(size, CPU)
    by_dtype = {torch.bfloat16: gradient, torch.float32: gradient.float()}
    entries = [ours(backend, name, start, gradient) for name in FORMATS]
    not_run = {}
    for peer in PEERS:
        try:
            entries.append(theirs(peer, start, by_dtype, quick=quick))
        except PeerError as reason:
            not_run[peer.name] = str(reason)
    return entries, not_run


def rows_of(entries: Sequence[Entry], times: Times, size: int) -> Iterator[dict[str, Any]]:
    for entry in sorted(entries, key=lambda each: times.median(each.contestant.name)):
        name = entry.contestant.name
        yield {
            "name": name,
            "milliseconds": times.median(name),
            "time_by_ours": times.ratio(name, OURS),
            "bytes_per_parameter": entry.contestant.moved / size,
            "gigabytes_per_second": times.bandwidth(name),
            "of_triad": times.share_of_triad(name),
            "state_bytes_per_parameter": entry.held / size,
            "peak_extra_bytes": peak_extra_bytes(entry.contestant.run),
            "gradient": entry.gradient,
            "fp32_peer": entry.fp32_peer,
            "rounds": times.milliseconds[name],
        }


def compare(backend: Backend, size: int, rounds: int, *, quick: bool) -> dict[str, Any]:
    entries, not_run = enter(backend, size, quick=quick)
    limit = triad(size)
    times = interleave([limit, *(entry.contestant for entry in entries)], rounds)
    rows = list(rows_of(entries, times, size))
    fastest = next(row for row in rows if row["fp32_peer"])  # torch's own always runs
    return {
        "parameters": size,
        "triad_gigabytes_per_second": times.bandwidth(TRIAD),
        "triad_milliseconds": times.milliseconds[TRIAD],
        "rows": rows,
        "fastest_fp32_peer": {key: fastest[key] for key in ("name", "time_by_ours")},
        "not_run": not_run,
        "others_cores": times.others,
    }


def by_size(backend: Backend, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Time our sweep at several sizes, interleaved."""
    contestants = []
    for size in sizes:
        each = ours(backend, OURS, start_weights(size), gradients(size, CPU)).contestant
        contestants.append(Contestant(f"{size}", each.run, each.moved))
    times = interleave([triad(max(sizes)), *contestants], rounds)
    return [
        {
            "parameters": size,
            "milliseconds": times.median(f"{size}"),
            "nanoseconds_per_parameter": times.median(f"{size}") / size * 1e6,
            "of_triad": times.share_of_triad(f"{size}"),
            "rounds": times.milliseconds[f"{size}"],
        }
        for size in sizes
    ]


def print_result(result: dict[str, Any], machine: dict[str, Any]) -> None:
    console = Console(width=132)
    table = Table(
        title=title(f"one AdamW step, {result['parameters']:,} parameters", machine, result["others_cores"])
    )
    heads = "gradient", "ms", "time / ours", "B moved", "GB/s", "of triad", "state B", "extra MB", "rounds"
    table.add_column("bf16 weights out; B: bytes per parameter")
    for column in heads:
        table.add_column(column, justify="right")
    table.add_row(TRIAD, "", "", "", "", f"{result['triad_gigabytes_per_second']:.1f}", "1.00", "", "", "")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            row["gradient"],
            f"{row['milliseconds']:.1f}",
            f"{row['time_by_ours']:.2f}",
            f"{row['bytes_per_parameter']:.2f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['of_triad']:.2f}",
            f"{row['state_bytes_per_parameter']:.2f}",
            f"{row['peak_extra_bytes'] / 1e6:.1f}",
            str(len(row["rounds"])),
        )
    console.print(table)
    for name, reason in result["not_run"].items():
        console.print(f"{name}: {reason}", markup=False)
    fastest = result["fastest_fp32_peer"]
    console.print(
        f"fastest peer with FP32 parameters: {fastest['name']}, {fastest['time_by_ours']:.2f} of ours"
    )


def print_sizes(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"{OURS} by size")
    for column in ("parameters", "ms", "ns per parameter", "of triad"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (
            f"{row['milliseconds']:.2f}",
            f"{row['nanoseconds_per_parameter']:.3f}",
            f"{row['of_triad']:.2f}",
        )
        table.add_row(f"{row['parameters']:,}", *figures)
    Console(width=132).print(table)


def whole_blocks(text: str) -> int:
    """Parse a size; round it down to whole blocks of all contestants: some keep other sizes in FP32."""
    return max(1, element_count(text) // MULTIPLE) * MULTIPLE


def main() -> None:
    parser = parser_of(__doc__)
    size_help = "rounded down to a multiple of 1024; K, M and G are powers of ten"
    parser.add_argument("--parameters", type=whole_blocks, metavar="N", help=f"{size_help}; default 50M")
    parser.add_argument("--sizes", type=whole_blocks, nargs="+", metavar="N", default=[], help=size_help)
    arguments = parser.parse_args()
    size = arguments.parameters or whole_blocks("64K" if arguments.quick else "50M")
    rounds = arguments.rounds or (2 if arguments.quick else 21)
    machine = facts()
    backend, verified = checked_backend()
    result = compare(backend, size, rounds, quick=arguments.quick)
    print_result(result, machine)
    result |= {"machine": machine, "verified": verified}
    if arguments.sizes:
        result["by_size"] = by_size(backend, arguments.sizes, rounds)
        print_sizes(result["by_size"])
    write(arguments.out, result)


if __name__ == "__main__":
    main()
