"""Compare trainings with FP8 and the best that BF16 does, at equal batch, in equal memory, and in memory.

    for contestant in "--fsdp2" "--deepspeed_config benchmarks/gpu/bf16_torch_overlap.json" \\
            "--deepspeed_config benchmarks/gpu/bf16_states_torch_overlap.json" \\
            "--deepspeed_config benchmarks/gpu/o2plus_overlap.json" \\
            "--deepspeed_config benchmarks/gpu/o2plus_overlap.json --float8" \\
            "--deepspeed_config benchmarks/gpu/o3_overlap.json"; do
        torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out batch.json --size 7B --micro_batch 4 \\
            --checkpointing --compile layers $contestant
    done
    python benchmarks/headline.py --equal_batch batch.json

In equal memory each contestant takes the micro-batch, checkpointing and compilation that suit it, of what
fits, with as many micro-steps as make a batch of 0.25 M tokens:

    torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out memory.json --size 7B --gpu_gb 83 \\
        --micro_batch 6 --micro_steps 11 --compile layers --deepspeed_config benchmarks/gpu/o3_overlap.json
    python benchmarks/headline.py --equal_memory memory.json

All files are hf_llama.py's. FSDP2 of plain PyTorch is among the BF16 contestants of equal batches; in equal
memory the claim is about stock DeepSpeed with FP32 masters, and the table shows all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims import Claim, print_claims
from gpu_train import CONSOLE, load
from llama_report import choice_of, gathered, is_bf16
from rich.table import Table

Run = dict[str, Any]
STOCK, FLOAT8, OURS = "bf16_torch", "+float8", "o3"


def speed(run: Run) -> float:
    """Return tokens per second of all ranks."""
    return float(run["tokens"] / run["milliseconds_per_step"] * 1000)


def fastest(runs: Sequence[Run], start: str = "") -> Run | None:
    """Return the fastest run of configurations whose name begins so."""
    return max((run for run in runs if run["config"].startswith(start)), key=speed, default=None)


def print_runs(runs: Sequence[Run], title: str) -> None:
    best = fastest([run for run in runs if is_bf16(run)])
    table = Table(title=f"{title}: Llama {runs[0]['model']}, {runs[0]['ranks']} x {runs[0]['device']}")
    for name in ("", "tokens/s", "of the best BF16", "ms/step", "peak GB"):
        table.add_column(name, justify="right" if name else "left")
    for run in runs:
        table.add_row(
            ", ".join(choice_of(run)),
            f"{speed(run):,.0f}",
            f"{speed(run) / speed(best):.3f}" if best else "",
            f"{run['milliseconds_per_step']:,.1f}",
            f"{run['peak_bytes_allocated'] / 1e9:.2f}",
        )
    CONSOLE.print(table)


def of_equal_batch(runs: Sequence[Run]) -> list[Claim]:
    ours, best = fastest(runs, OURS), fastest([run for run in runs if is_bf16(run)])
    float8 = fastest([run for run in runs if run["config"].endswith(FLOAT8)])
    if ours is None:
        return []
    name, found = f"{ours['model']}, {ours['ranks']} ranks, equal batch: ", []
    if best:
        found.append(Claim.at_least(name + "O3's speed / the best BF16's", speed(ours) / speed(best), 1.43))
    if float8:
        text = name + "O3's speed / that of O2+ with torchao's float8"
        found.append(Claim.at_least(text, speed(ours) / speed(float8), 1.10))
        memory = ours["peak_bytes_allocated"] / max(1, float8["peak_bytes_allocated"])
        found.append(Claim.at_most(name + "O3's peak / that of O2+ with torchao's float8", memory, 1.0))
    return found


def of_equal_memory(runs: Sequence[Run]) -> list[Claim]:
    ours, stock = fastest(runs, OURS), fastest(runs, STOCK)
    if ours is None or stock is None:
        return []
    name = f"{ours['model']}, {ours['ranks']} ranks, equal memory: O3's speed / stock BF16's"
    return [Claim.at_least(name, speed(ours) / speed(stock), 1.75)]


def of_memory(runs: Sequence[Run]) -> list[Claim]:
    ours, stock = fastest(runs, OURS), fastest(runs, STOCK)
    if ours is None or stock is None:
        return []
    name = f"{ours['model']}, {ours['ranks']} ranks: O3's peak / stock BF16's"
    return [Claim.at_most(name, ours["peak_bytes_allocated"] / max(1, stock["peak_bytes_allocated"]), 0.45)]


STUDIES = {"equal_batch": of_equal_batch, "equal_memory": of_equal_memory, "memory": of_memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in STUDIES:
        parser.add_argument(f"--{name}", type=Path, nargs="+", metavar="FILE", default=[])
    arguments = parser.parse_args()
    claims: list[Claim] = []
    for name, claims_of in STUDIES.items():
        for path in getattr(arguments, name):
            runs = gathered(load(path))
            print_runs(runs, name.replace("_", " "))
            claims += claims_of(runs)
    print_claims(claims, CONSOLE)


if __name__ == "__main__":
    main()
