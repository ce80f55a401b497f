"""The study of precision.py with several runs at once: a process per run, spread over the GPUs.

    python benchmarks/precision_parallel.py --model 4M --out precision_4M.json --at_once 18 --recipes \\
        "#0 FP32" "#1 BF16" O1 "#2a O2" O2+ "O3's states"

FP32's trainings come first, and fine-tuning when all trainings are done. The file is that of precision.py,
which can continue it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from precision import SIZES, Job, arguments_of, conclude, jobs, keep, run, start, weights_of
from rich.console import Console
from timing import write

AT_ONCE = 8
Begin = Callable[[Job, int], tuple["subprocess.Popen[bytes]", Path]]


def child() -> None:
    """Run one job in this process."""
    parser = argparse.ArgumentParser()
    for name in ("--one", "--stage", "--recipe", "--weights"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    start()
    job = Job(options.stage, options.recipe, options.seed)
    write(options.result, run(job, SIZES[options.one], Path(options.weights)))
    torch.distributed.destroy_process_group()


def begin(job: Job, model: str, weights: Path, result: Path, gpu: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--one", model, "--stage", job.stage, "--recipe", job.recipe]
    command += ["--seed", str(job.seed), "--weights", str(weights), "--result", str(result)]
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    place = {"CUDA_VISIBLE_DEVICES": visible[gpu % count]} if count else {}
    return subprocess.Popen(command, env={**os.environ, **place})


def work(waiting: list[Job], at_once: int, begin_one: Begin) -> Iterator[tuple[Job, dict[str, float]]]:
    """Yield the results of runs as they end. Raises SystemExit if one fails."""
    left, running = waiting[::-1], {}
    while left or running:
        while left and len(running) < at_once:
            job = left.pop()
            running[job] = begin_one(job, len(left))
        time.sleep(0.2)
        for job in [each for each, (process, _) in running.items() if process.poll() is not None]:
            process, path = running.pop(job)
            if process.returncode:
                raise SystemExit(f"{job}: exit status {process.returncode}")
            yield job, json.loads(path.read_text())


def main() -> None:
    arguments, size, result = arguments_of(__doc__, AT_ONCE)
    model = next(name for name, each in SIZES.items() if each == size)
    console, out = Console(width=132), arguments.out
    write(out, result)
    waiting = list(jobs(out, result["runs"], arguments.seeds, arguments.recipes))
    with tempfile.TemporaryDirectory() as folder:

        def begin_one(job: Job, number: int) -> tuple["subprocess.Popen[bytes]", Path]:
            path = Path(folder, f"{job.stage}{number}.json")
            return begin(job, model, weights_of(out, job.seed), path, number), path

        for _, stage in groupby(waiting, key=lambda job: job.stage):
            for job, found in work(list(stage), arguments.at_once, begin_one):
                keep(out, result, job, found, console)
    conclude(out, result, size, console)


if __name__ == "__main__":
    child() if "--one" in sys.argv else main()
