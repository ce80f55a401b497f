"""How far low-precision moments lag in the first steps of a run without a warm-up.

    python benchmarks/first_steps.py --out first_steps.json

Without a warm-up all gradients have the same direction at first, and a moment that moves by less than half a
code per step stays, if it is rounded to nearest. A byte-level GPT (examples/train_lm.py) takes 30 steps at a
rate of 1e-3, in which the loss falls by .05 per step. The compared figure is the mean loss of the last ten
steps, less that of the same level with FP32 moments: for a seed both begin with the same weights, see the
same batches, and round their masters alike. "of e4m3": exp_avg in E4M3, rounded to nearest, as in FP8-LM.
"""

import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import deepspeed
import torch
from claims import Claim, print_claims
from precision import start
from recipes import ADAMW
from rich.console import Console
from rich.table import Table
from timing import facts, parser_of, round_count, write
from train_lm import ByteGPT, Corpus, Shape, read_corpus, train_step

SHAPE = Shape(layers=2, width=32, heads=2, context=32)
BATCH, STEPS, LAST, RATE = 4, 30, 10, 1e-3
CLIPPING = {"not clipped": 0.0, "clipped at 1": 1.0}
CLOSE = 0.003  # nats
EXACT = {"exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32"}
PUBLISHED = {"exp_avg_dtype": "e4m3"}
LEVELS = ("O2", "O2+")


def last_loss(level: str, optimizer: dict[str, str], clipping: float, seed: int, corpus: Corpus) -> float:
    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": clipping,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, **ADAMW}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
        "fp8": {"enabled": True, "opt_level": level, "optimizer": {**optimizer, "seed": seed}},
    }
    model = ByteGPT(SHAPE)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    batches = corpus.batches(BATCH, seed)
    losses = [train_step(engine, batches) for _ in range(STEPS)]
    engine.destroy()
    return statistics.fmean(losses[-LAST:])


def rows(seeds: int) -> Iterator[dict[str, Any]]:
    corpus = Corpus(read_corpus("topics"), SHAPE.context)
    for level in LEVELS:
        for how, clipping in CLIPPING.items():
            exact = [last_loss(level, EXACT, clipping, seed, corpus) for seed in range(seeds)]
            for name, optimizer in ((level, {}), (f"{level} of e4m3", PUBLISHED)):
                losses = [last_loss(level, optimizer, clipping, seed, corpus) for seed in range(seeds)]
                later = [loss - best for loss, best in zip(losses, exact, strict=True)]
                yield {"name": name, "gradients": how, "mean": statistics.fmean(later), "by_seed": later}


def print_rows(found: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="nats above FP32 moments")
    for column in ("", "gradients", "mean", "by seed"):
        table.add_column(column)
    for row in found:
        by_seed = " ".join(f"{each:+.4f}" for each in row["by_seed"])
        table.add_row(row["name"], row["gradients"], f"{row['mean']:+.4f}", by_seed)
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__, rounds=False)
    parser.add_argument("--seeds", type=round_count, help="default 6")
    arguments = parser.parse_args()
    machine, console = facts(), Console(width=132)
    start()
    found = list(rows(arguments.seeds or (1 if arguments.quick else 6)))
    print_rows(found, console)
    claims = [
        Claim.at_most(
            f"{row['name']}, {row['gradients']}: from FP32 moments in nats, the worst seed",
            max(map(abs, row["by_seed"])),
            CLOSE,
        )
        for row in found
        if row["name"] in LEVELS
    ]
    print_claims(claims, console)
    write(arguments.out, {"machine": machine, "rows": found, "claims": [asdict(each) for each in claims]})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
