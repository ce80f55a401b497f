"""The FP8 exchange on several GPUs: the same bits as gloo, then time and bytes beside NCCL's own collectives.

    torchrun --nproc_per_node 2 benchmarks/gpu_many.py --out gpu_many.json
    torchrun --nproc_per_node 2 benchmarks/gpu_many.py --quick            # without GPUs: gloo, tiny sizes

1. Reduced gradients and gathered weights equal those of the plain-PyTorch reference over gloo, bit for bit:
   several formats, overlap on and off, one hop and, from four ranks on, two.
2. A small model trains with ZeRO 1, 2 and 3, overlap on and off, one hop and two, with O3 under ZeRO 2 and
   3, with one scale per tensor and a sum in FP8: all ranks end with the same bits, and so do settings that
   must not differ, whatever the stage; stock DeepSpeed BF16 beside it.
3. Buckets of several sizes: the exchange and its parts, NCCL's reduce-scatter and all-reduce in BF16 and
   FP32, and its reduce-scatter in FP8 if it has one. Medians of interleaved rounds, and medians of the
   ratios to the BF16 reduce-scatter, round by round. Bytes are counted at the collectives.
"""

import argparse
import gc
import os
from typing import Any

import torch
from claims import Claim, print_claims
from exchange_times import EXCHANGE, GRAIN, OTHERS, OVERLAPPED, PARTS, REDUCE, measure
from ranks_gpu import facts, join_ranks
from rich.console import Console
from rich.table import Table
from same_bits import PARITY, STOCK, against_host, settings, trainings
from timing import element_count, parser_of, round_count, write

from ds_fp8.ops.backend import choose

CONSOLE = Console(width=132)
PARTS_OF_ALL = ("bits", "trainings", "times")
SIZES = ("1M", "4M", "16M", "64M", "128M", "256M", "512M")
ARRIVAL = "FP8 all-to-all, decode and sum"
FROM = 60_000_000  # elements from which on the exchange is claimed to be as fast


def print_trainings(rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"{len(rows[0]['losses'])} steps of a small model; every rank ends with these weights"
    )
    for column in ("", "last loss", "weights"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], f"{row['last_loss']:.4f}", row["weights"][:16])
    CONSOLE.print(table)


def print_sizes(found: list[dict[str, Any]], ranks: int) -> None:
    table = Table(title=f"ms / share of {REDUCE}; {ranks} ranks")
    table.add_column("elements")
    for each in found:
        table.add_column(f"{each['elements'] / 1e6:,.0f} M", justify="right")
    by_name = [{row["name"]: row for row in each["rows"]} for each in found]
    for name in by_name[0]:
        cells = [f"{rows[name]['milliseconds']:.3f} / {rows[name]['by_reduce']:.2f}" for rows in by_name]
        table.add_row(f"  of it {name}" if name in (*PARTS, OTHERS) else name, *cells)
    CONSOLE.print(table)
    if found[0]["no_native_fp8"]:
        CONSOLE.print(f"no FP8 reduce-scatter: {found[0]['no_native_fp8']}")


def claims_of(result: dict[str, Any]) -> list[Claim]:
    found = []
    if result["trainings"]:
        losses = {row["name"]: row["last_loss"] for row in result["trainings"]}
        stock = next(each for name, each in losses.items() if name.startswith(STOCK))
        apart = max(abs(each - stock) for each in losses.values())
        found.append(Claim.at_most("loss, nats from stock's", apart, PARITY))
    for each in result["sizes"]:
        found.append(Claim.at_most("bytes sent, of BF16's", each["wire_by_bf16"], 0.51))
        if each["elements"] >= FROM:
            ways = {row["name"]: row["by_reduce"] for row in each["rows"]}
            ways[ARRIVAL] = sum(ways[name] for name in PARTS[1:])
            for name in (EXCHANGE, OVERLAPPED, ARRIVAL):
                text = f"{name}, {each['elements'] / 1e6:,.0f} M, of {REDUCE}"
                found.append(Claim.at_most(text, ways[name], 1.0))
    return found


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    out = arguments.out if torch.distributed.get_rank() == 0 else None
    CONSOLE.quiet = torch.distributed.get_rank() > 0
    result: dict[str, Any] = {**facts(device), "same_as_gloo": [], "trainings": [], "sizes": []}
    if "bits" in arguments.parts:
        result["same_as_gloo"] = against_host(device, choose(device))
        CONSOLE.print("\n".join(result["same_as_gloo"]))
    if "trainings" in arguments.parts:
        for row in trainings(settings(result["ranks"]), arguments.steps):
            result["trainings"].append(row)
            write(out, result)  # results so far, in case the run is killed
        print_trainings(result["trainings"])
    write(out, result)
    if "times" in arguments.parts:
        spare = torch.distributed.new_group()
        for elements in arguments.elements:
            free()
            result["sizes"].append(measure(elements, arguments.rounds, device, spare))
            write(out, result)
        print_sizes(result["sizes"], result["ranks"])
    claims = claims_of(result)
    print_claims(claims, CONSOLE)
    write(out, {**result, "claims": [vars(each) for each in claims]})


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--elements", type=element_count, nargs="+", help=f"per bucket: {' '.join(SIZES)}")
    parser.add_argument("--steps", type=round_count, help="of the small model; default 50")
    parser.add_argument("--parts", nargs="+", choices=PARTS_OF_ALL, default=PARTS_OF_ALL, help="1, 2 and 3")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.rounds = arguments.rounds or (2 if quick else 21)
    arguments.steps = arguments.steps or (2 if quick else 50)
    arguments.elements = arguments.elements or [
        element_count(each) for each in (("64K",) if quick else SIZES)
    ]
    grain = GRAIN * int(os.environ["WORLD_SIZE"])
    arguments.elements = [max(1, each // grain) * grain for each in arguments.elements]
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by deterministic algorithms
    run(arguments, join_ranks())
    from train_lm import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
