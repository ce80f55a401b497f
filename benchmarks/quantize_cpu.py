"""Quantising and summing gradients on a CPU, as a share of STREAM triad's bandwidth.

    OMP_NUM_THREADS=2 python benchmarks/quantize_cpu.py --out quantize_cpu.json

What it shows: a BF16 gradient becomes E4M3 blocks, and the pieces of 2 and 8 ranks become an E4M3 or FP32
shard (and the norm's sum of squares is computed), at the speed of memory. First the kernels must equal the
reference. In each round every operation runs once; "of triad" is the median of the shares, round by round.
The plain-PyTorch reference runs beside it, in three rounds. GB/s: codes, scales and values, read and written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from operations import BLOCK, accumulated, quantized
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
    title,
    triad,
    write,
)

from ds_fp8.ops.backend import REFERENCE, Backend

SLOW = 3  # rounds of the reference
MULTIPLE = 8 * BLOCK  # whole blocks for each of 8 ranks


def contestants(backend: Backend, size: int) -> list[Contestant]:
    operations = chain(quantized(backend, size, CPU), accumulated(backend, size, CPU))
    return [Contestant(*operation) for operation in operations]


def of_reference(size: int) -> list[Contestant]:
    return [
        replace(each, name=f"{each.name}, reference", rounds=SLOW) for each in contestants(REFERENCE, size)
    ]


def rows_of(timed: Sequence[Contestant], times: Times, size: int) -> Iterator[dict[str, Any]]:
    for each in timed:
        yield {
            "name": each.name,
            "milliseconds": times.median(each.name),
            "bytes_per_element": each.moved / size,
            "gigabytes_per_second": times.bandwidth(each.name),
            "of_triad": times.share_of_triad(each.name),
            "reference_milliseconds": times.median(f"{each.name}, reference"),
            "reference_by_ours": times.ratio(f"{each.name}, reference", each.name),
            "rounds": times.milliseconds[each.name],
        }


def measure(backend: Backend, size: int, rounds: int) -> dict[str, Any]:
    timed = contestants(backend, size)
    times = interleave([triad(size), *timed, *of_reference(size)], rounds)
    return {
        "elements": size,
        "triad_gigabytes_per_second": times.bandwidth(TRIAD),
        "triad_milliseconds": times.milliseconds[TRIAD],
        "rows": list(rows_of(timed, times, size)),
        "others_cores": times.others,
    }


def print_result(result: dict[str, Any], machine: dict[str, Any]) -> None:
    table = Table(title=title(f"{result['elements']:,} elements", machine, result["others_cores"]))
    table.add_column("B: bytes per element of gradient")
    for column in ("ms", "B moved", "GB/s", "of triad", "reference ms", "reference / ours"):
        table.add_column(column, justify="right")
    table.add_row(TRIAD, "", "", f"{result['triad_gigabytes_per_second']:.1f}", "1.00", "", "")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['milliseconds']:.1f}",
            f"{row['bytes_per_element']:.2f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['of_triad']:.2f}",
            f"{row['reference_milliseconds']:.0f}",
            f"{row['reference_by_ours']:.0f}",
        )
    Console(width=132).print(table)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--elements",
        type=element_count,
        metavar="N",
        help="of the gradient, a multiple of 1024; default 2^26",
    )
    arguments = parser.parse_args()
    size = arguments.elements or (1 << 16 if arguments.quick else 1 << 26)
    if size % MULTIPLE:
        parser.error(f"--elements: received {size}, allowed: multiples of {MULTIPLE}")
    machine = facts()
    backend, verified = checked_backend()
    result = measure(backend, size, arguments.rounds or (2 if arguments.quick else 21))
    print_result(result, machine)
    write(arguments.out, {**result, "machine": machine, "verified": verified})


if __name__ == "__main__":
    main()
