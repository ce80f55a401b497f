"""Exposed communication of an iteration on CPU ranks, with overlap_comm and without.

    python benchmarks/overlap_cpu.py --out overlap_cpu.json

Exposed is the time in which a rank stands still: launching collectives, and waiting for them. Both engines
live in the same processes, with the model of examples/train_lm.py, the same seeds and the same batches; their
iterations alternate, and so does which engine begins. All ranks meet before an iteration and after it. An
iteration's time is the slowest rank's; medians over iterations, and of the ratios within them. Both must end
with the same loss.

overlap_comm moves the exchange of gradients behind backward. The gather of weights is launched bucket by
bucket behind the sweeps either way. On a CPU the threads that communicate need a core, too: with as many
ranks as cores, less waiting means slower computing.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ranks_cpu import in_turn, run_ranks
from rich.console import Console
from rich.table import Table
from timing import element_count, facts, parser_of, round_count, title, write

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

COLLECTIVES = {"all_to_all_single": "exchange", "all_gather_into_tensor": "gather"}
ENGINES = {"plain": False, "overlap": True}
WARM_UP = 3


class Handle:
    """A work handle whose wait is timed."""

    def __init__(self, work: Any, spent: Counter[str], name: str) -> None:
        self._work, self._spent, self._name = work, spent, name

    def wait(self) -> None:
        start = time.perf_counter()
        self._work.wait()
        self._spent[self._name] += (time.perf_counter() - start) * 1000


@contextmanager
def exposed() -> Iterator[Counter[str]]:
    """Count the milliseconds that this rank spends on launching and waiting, by collective."""
    from deepspeed import comm

    spent: Counter[str] = Counter()

    def timed(name: str) -> Any:
        original = getattr(comm, name)

        def launch(*arguments: Any, **options: Any) -> Handle:
            start = time.perf_counter()
            work = original(*arguments, **options)
            spent[COLLECTIVES[name]] += (time.perf_counter() - start) * 1000
            return Handle(work, spent, COLLECTIVES[name])

        return patch.object(comm, name, launch)

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(timed(name))
        yield spent


def build(shape: dict[str, int], bucket: int, micro_batch: int, *, overlap: bool) -> Any:
    import deepspeed
    from train_lm import ByteGPT, Shape

    torch.manual_seed(0)
    model = ByteGPT(Shape(**shape))
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket, "overlap_comm": overlap},
        "steps_per_print": 10**9,
        "fp8": {"enabled": True, "opt_level": "O2"},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def iterate(engine: Any, batch: torch.Tensor) -> tuple[dict[str, float], float]:
    """Run one iteration; return milliseconds exposed and in total, and the loss."""
    torch.distributed.barrier()
    start = time.perf_counter()
    with exposed() as spent:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
    torch.distributed.barrier()
    return {**spent, "iteration": (time.perf_counter() - start) * 1000}, loss.item()


def train(shape: dict[str, int], bucket: int, micro_batch: int, rounds: int) -> dict[str, Any]:
    """Return a rank's times and losses of both engines, iteration by iteration."""
    from train_lm import Corpus, read_corpus

    import ds_fp8

    engines = {name: build(shape, bucket, micro_batch, overlap=overlap) for name, overlap in ENGINES.items()}
    source = Corpus(read_corpus("topics"), shape["context"])
    batches = source.batches(micro_batch, torch.distributed.get_rank())
    found = list(islice(in_turn(engines, batches, iterate), WARM_UP + rounds))
    return {
        "times": {name: [each[name][0] for each in found[WARM_UP:]] for name in engines},
        "losses": {name: [each[name][1] for each in found] for name in engines},
        "parameters": sum(each.numel() for each in engines["plain"].module.parameters()),
        "buckets": len(engines["plain"].optimizer.parts.buckets),
        "fp8": ds_fp8.describe(engines["overlap"]),
    }


def rows_of(per_rank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for part in (*COLLECTIVES.values(), "iteration"):
        slowest = {
            name: [max(each[part] for each in ranks) for ranks in zip(*found, strict=True)]
            for name, found in ((name, [each["times"][name] for each in per_rank]) for name in ENGINES)
        }
        ratios = [a / b for a, b in zip(slowest["overlap"], slowest["plain"], strict=True)]
        medians = {name: statistics.median(each) for name, each in slowest.items()}
        row = {"part": part, "milliseconds": medians, "overlap_by_plain": statistics.median(ratios)}
        rows.append({**row, "rounds": slowest})
    return rows


def print_result(result: dict[str, Any], machine: dict[str, Any]) -> None:
    what = (
        f"{result['parameters']:,} parameters in {result['buckets']} buckets, {result['ranks']} ranks, "
        f"{result['micro_batch']} x {result['shape']['context']} bytes per rank and iteration"
    )
    table = Table(title=title(what, machine))
    table.add_column("ms, medians")
    for column in ("plain", "overlap", "overlap / plain"):
        table.add_column(column, justify="right")
    names = {"exchange": "exchange, exposed", "gather": "weight gather, exposed"}
    for row in result["rows"]:
        figures = [f"{row['milliseconds'][name]:.2f}" for name in ENGINES]
        table.add_row(names.get(row["part"], row["part"]), *figures, f"{row['overlap_by_plain']:.2f}")
    Console(width=132).print(table)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=round_count, default=2)
    parser.add_argument("--bucket", type=element_count, default=100_000, help="reduce_bucket_size")
    shape = {"layers": 3, "width": 128, "heads": 4, "context": 96}
    for name, default in {**shape, "micro-batch": 8}.items():
        parser.add_argument(f"--{name}", type=round_count, default=default)
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in shape}
    if shape["width"] % shape["heads"]:
        parser.error(f"--width: received {shape['width']}, allowed: multiples of --heads, {shape['heads']}")
    rounds = arguments.rounds or (3 if arguments.quick else 101)
    machine = {**facts(), "threads": arguments.ranks}
    per_rank = run_ranks(arguments.ranks, train, shape, arguments.bucket, arguments.micro_batch, rounds)
    first = per_rank[0]
    if first["losses"]["plain"] != first["losses"]["overlap"]:
        raise SystemExit("not timed: overlap changes the losses")
    result = {
        **{name: first[name] for name in ("parameters", "buckets", "losses", "fp8")},
        "ranks": arguments.ranks,
        "micro_batch": arguments.micro_batch,
        "shape": shape,
        "rows": rows_of(per_rank),
    }
    print_result(result, machine)
    write(arguments.out, {**result, "machine": machine})


if __name__ == "__main__":
    main()
