"""Adam's sweeps on one GPU, in turn: of this checkout, of another one, or with other limits of registers.

    git worktree add before 4ec2d3d    # masters were loaded first
    for round in 1 2; do
        PYTHONPATH=before python benchmarks/sweeps.py --out sweeps.json --label before
        python benchmarks/sweeps.py --out sweeps.json --label 72,80 --registers 72 80
        python benchmarks/sweeps.py --out sweeps.json --label 72,72 --registers 72 72
    done

Medians of 41 rounds, in which every level sweeps once, after a sweep that is not timed. --registers: the most
that a thread has whose exp_avg is int8, if masters are rounded to nearest and if they are drawn.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from operations import swept
from rich.console import Console
from timing import event_clock, host_clock, write

from ds_fp8.ops.backend import choose


def sweep_times(size: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Return milliseconds by name."""
    clock = event_clock if device.type == "cuda" else host_clock
    operations = [(name, run) for name, run, _ in swept(choose(device), size, device)]
    times = defaultdict(list)
    for _ in range(rounds):
        for name, run in operations:
            run()
            times[name].append(clock(run))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="file that collects runs")
    parser.add_argument("--label", required=True)
    parser.add_argument("--registers", type=int, nargs=2, metavar="N")
    parser.add_argument("--parameters", type=int, default=1 << 28, help="a multiple of 1024")
    arguments = parser.parse_args()
    if arguments.registers:
        from ds_fp8.ops.triton import moments

        moments.QUOTIENT_REGISTERS = tuple(arguments.registers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times = sweep_times(arguments.parameters, 41 if device.type == "cuda" else 1, device)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    run = {
        "label": arguments.label,
        "device": name,
        "parameters": arguments.parameters,
        "milliseconds": times,
    }
    write(arguments.out, {"runs": [*runs, {**run, "milliseconds": times}]})
    for operation, milliseconds in times.items():
        Console().print(f"{milliseconds:8.4f} ms  {operation}")


if __name__ == "__main__":
    main()
