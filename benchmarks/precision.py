"""Which states training tolerates: FP8-LM's Table 6 with the formats of ds_fp8, on real text.

    python benchmarks/precision.py --out precision.json
    python benchmarks/precision.py --out precision_4M.json --model 4M       # for bigger machines

A byte-level GPT (examples/train_lm.py) of 1 M parameters is trained on the documentation of Python for 600
steps, once per recipe (recipes.py) and seed; then every recipe fine-tunes FP32's weights on the sources of
the standard library for 300 steps at a constant rate of 1e-5, at which a step is less than half a code of
most BF16 masters. The 4M form trains 4 M parameters for 3,000 steps.

Runs are paired: for a seed all recipes begin with the same weights and see the same batches. The compared
figure is the validation loss less FP32's, over the same 65,536 bytes that no run has trained on: the mean
over the seeds and its standard error. The peak rate of 5e-4 was chosen by stock BF16 and O1 alone, which
differ only in the rounding of gradients: at that rate they end within 2e-4 nats of each other. At 2e-3 they
diverge by up to 0.014, and no difference could be seen.

Every result is written as soon as it exists: a study that was killed continues where it was. FP32's weights
stay beside the file, as FILE_seedN.pt. On a machine with many cores, `precision_parallel.py` has several runs
going at once.
"""

import argparse
import json
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from claims import print_claims
from precision_report import Runs, judge, print_rows, summarise
from recipes import FINE_RATE, FP32, PEAK_RATE, RECIPES, Build
from rich.console import Console
from timing import facts, parser_of, round_count, write
from torch import Tensor

import ds_fp8

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from train_lm import ByteGPT, Corpus, Shape, read_corpus, train_step, validate

WARM_UP = 0.05  # share of the steps
LAST = 50  # steps whose mean training loss is kept


@dataclass(frozen=True)
class Size:
    """A model and the length of its training."""

    shape: Shape
    batch: int
    steps: int
    fine_steps: int
    validation_windows: int
    close: float  # nats: required distance of a level to FP32


class Job(NamedTuple):
    """One run."""

    stage: str
    recipe: str
    seed: int


SIZES = {
    "1M": Size(Shape(5, 128, 4, 64), 8, steps=600, fine_steps=300, validation_windows=1024, close=0.005),
    "4M": Size(Shape(5, 256, 8, 128), 16, steps=3000, fine_steps=600, validation_windows=512, close=0.003),
    "tiny": Size(Shape(1, 32, 2, 64), 2, steps=4, fine_steps=2, validation_windows=32, close=0.005),
}
STAGES = {"training": "topics", "fine-tuning": "stdlib"}  # with their texts


def rate(step: int, steps: int) -> float:
    """Learning rate of training: linear warm-up, then a cosine to zero."""
    return PEAK_RATE * min(1.0, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def train(engine: Any, batches: Iterator[Tensor], rates: list[float]) -> float:
    """Train; return the mean loss of the last steps."""
    losses = []
    for each in rates:
        for group in engine.optimizer.param_groups:
            group["lr"] = each
        losses.append(train_step(engine, batches))
    return statistics.fmean(losses[-LAST:])


def run(job: Job, size: Size, weights: Path, build: Build | None = None) -> dict[str, float]:
    """Run a job. weights: FP32's, written by its training and read by fine-tuning.

    build: makes the engine, instead of the recipe.
    """
    start = time.perf_counter()
    corpus = Corpus(read_corpus(STAGES[job.stage]), size.shape.context)
    validation = corpus.validation_batches(32, size.validation_windows // 32)
    torch.manual_seed(job.seed)
    model = ByteGPT(size.shape)
    rates = [rate(step, size.steps) for step in range(size.steps)]
    if job.stage == "fine-tuning":
        model.load_state_dict(torch.load(weights, map_location="cpu"))
        rates = [FINE_RATE] * size.fine_steps
    engine = (build or RECIPES[job.recipe])(model, size.batch)
    result = {"before": validate(engine, validation)}
    result["training"] = train(engine, corpus.batches(size.batch, job.seed), rates)
    result["validation"] = validate(engine, validation)
    result["seconds"] = time.perf_counter() - start
    if (job.stage, job.recipe) == ("training", FP32):
        torch.save(engine.module.state_dict(), weights)
    engine.destroy()
    return result


def weights_of(out: Path, seed: int) -> Path:
    return out.with_name(f"{out.stem}_seed{seed}.pt")


def jobs(out: Path, runs: Runs, seeds: int, recipes: Collection[str]) -> Iterator[Job]:
    """Yield every run without a result, fine-tuning last; FP32's training again if its weights are lost."""

    def lost(seed: int) -> bool:
        tuned = [name for name in recipes if str(seed) in runs["fine-tuning"].get(name, {})]
        return not weights_of(out, seed).exists() and len(tuned) < len(recipes)

    for stage in STAGES:
        for name in recipes:
            results = runs[stage].setdefault(name, {})
            for seed in range(seeds):
                if str(seed) not in results or ((stage, name) == ("training", FP32) and lost(seed)):
                    yield Job(stage, name, seed)


def keep(out: Path, result: dict[str, Any], job: Job, found: dict[str, float], console: Console) -> None:
    """Write a result into the file."""
    result["runs"][job.stage][job.recipe][str(job.seed)] = found
    write(out, result)
    figures = "validation {validation:.4f}, {seconds:.0f} s".format(**found)
    console.print(f"{job.stage}, seed {job.seed}, {job.recipe}: {figures}", markup=False, highlight=False)


def study(
    out: Path, result: dict[str, Any], size: Size, seeds: int, recipes: Collection[str], console: Console
) -> None:
    """Run all that `result` does not have yet, one after the other, and update the file."""
    write(out, result)
    for job in jobs(out, result["runs"], seeds, recipes):
        keep(out, result, job, run(job, size, weights_of(out, job.seed)), console)


def start() -> None:
    """Make this process the only rank, with ds_fp8 registered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it compiles, even for one rank
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(deepspeed.get_accelerator().communication_backend_name())
    ds_fp8.register()


def resumed(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the file's results of the same study. Raises ValueError if it holds another one."""
    fresh: dict[str, Any] = {"settings": settings, "runs": {stage: {} for stage in STAGES}}
    if not out.exists():
        return fresh
    found = json.loads(out.read_text())
    for key, value in settings.items():
        received = found.get("settings", {}).get(key)
        if received != value:
            raise ValueError(
                f"--out: received {out} with {key} {received}, allowed: {value}, or another file"
            )
    return {"settings": settings, "runs": found["runs"]}


def conclude(out: Path, result: dict[str, Any], size: Size, console: Console) -> None:
    """Print and write tables and claims."""
    rows = summarise(result["runs"])
    claims = judge(rows, size.close)
    print_rows(rows, console)
    print_claims(claims, console)
    write(out, {**result, "rows": rows, "claims": [asdict(each) for each in claims]})


def arguments_of(doc: str | None, at_once: int = 1) -> tuple[argparse.Namespace, Size, dict[str, Any]]:
    """Parse options, the size, and the file's results so far. at_once: number of runs, if it is an option."""
    parser = parser_of(doc, rounds=False)
    parser.add_argument("--model", choices=("1M", "4M"), default="1M")
    parser.add_argument("--seeds", type=round_count, help="default 3")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES], metavar="NAME")
    if at_once > 1:
        parser.add_argument("--at_once", type=round_count, default=at_once, help=f"default {at_once}")
    parser.set_defaults(out=Path("precision.json"))
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)
    size = SIZES["tiny" if arguments.quick else arguments.model]
    settings = {**asdict(size), "peak_rate": PEAK_RATE, "fine_rate": FINE_RATE}
    try:
        result = resumed(arguments.out, settings)
    except ValueError as error:
        parser.error(str(error))
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    result["machine"] = facts() | gpu
    return arguments, size, result


def main() -> None:
    arguments, size, result = arguments_of(__doc__)
    start()
    console = Console(width=132)
    study(arguments.out, result, size, arguments.seeds, arguments.recipes, console)
    conclude(arguments.out, result, size, console)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
