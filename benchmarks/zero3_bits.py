"""Digests that show that ZeRO 3 and O3 give the same bits over NCCL as over gloo, for the same gradients.

    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=    # for gloo
    torchrun --nproc_per_node 2 benchmarks/zero3_bits.py --out gloo.json
    unset DS_ACCELERATOR CUDA_VISIBLE_DEVICES
    torchrun --nproc_per_node 2 benchmarks/zero3_bits.py --out nccl.json --expect gloo.json

Parameters of many sizes get given gradients, by modules that fetch them; after some steps the states of all
ranks, the gathered weights, and the norms are hashed: with overlap and without, at every level, with
micro-steps, persistent parameters and a skipped step; from four ranks on also in two hops. A GPU must give
the host's digests. At O3 some parameters are matrices, which are multiplied as codes; their gradients are
sums of small integers, exact in any order and by any kernel. O3 runs under ZeRO 2, too, which gathers codes.

Files are written as digests are found: a run that is killed has compared those before.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_train import CONSOLE
from ranks_gpu import facts, join_ranks
from same_bits import node_sizes
from timing import write
from torch import Tensor, nn

LEVELS = ("O1", "O2", "O2+", "O3")
SIZES = (1000, 128, 70_000, 1, 600_000, 40_000, 12_345, 300, 9_999)
MATRICES = ((256, 192), (96, 400))
TOKENS = 48
STEPS = 6
SPOILT = 3  # the step with a gradient that is not finite


class Term(nn.Module):
    """A parameter whose gradient is given."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size))
        self.given: Tensor | None = None

    def forward(self, total: Tensor) -> Tensor:
        return total + (self.weight * self.given).sum()


class Product(nn.Module):
    """A matrix whose gradient is the product of two given matrices, of numbers from -1 to 1."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False)
        self.linear.weight = nn.Parameter(torch.linspace(-1, 1, rows * columns).view(rows, columns))
        self.given: tuple[Tensor, Tensor] | None = None

    def forward(self, total: Tensor) -> Tensor:
        assert self.given is not None
        x, dy = self.given
        return total + (self.linear(x) * dy).sum()


class Terms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.terms = nn.ModuleList(map(Term, SIZES))
        self.products = nn.ModuleList(Product(*each) for each in MATRICES)

    def forward(self, total: Tensor) -> Tensor:
        for term in (*self.terms, *self.products):
            total = term(total)
        return total


def give(model: Terms, step: int, micro_step: int, device: torch.device) -> None:
    """Set different gradients on every rank, in every micro-step."""
    rank = torch.distributed.get_rank()
    for number, (term, size) in enumerate(zip(model.terms, SIZES, strict=True)):
        draw = torch.Generator().manual_seed(100_000 * step + 1000 * micro_step + 10 * number + rank)
        values = torch.randn(size, generator=draw) * 10.0 ** (number - 4)
        if step == SPOILT and number == 4 and rank == 0:
            values[17] = torch.inf
        term.given = values.to(torch.bfloat16).to(device)
    draw = torch.Generator().manual_seed(100_000 * step + 1000 * micro_step + 500 + rank)
    for matrix, (rows, columns) in zip(model.products, MATRICES, strict=True):
        sides = (torch.randint(-1, 2, (TOKENS, each), generator=draw) for each in (columns, rows))
        x, dy = (each.to(torch.bfloat16).to(device) for each in sides)
        matrix.given = x, dy


@dataclass(frozen=True)
class Case:
    """A way to train; two hops overlap and have nodes of two ranks."""

    level: str
    overlap: bool
    micro_steps: int
    stage: int = 3
    node_size: int = 1

    def __str__(self) -> str:
        stage = "" if self.stage == 3 else f", ZeRO {self.stage}"
        overlap = "overlap" if self.overlap else "no overlap"
        nodes = "" if self.node_size == 1 else f", nodes of {self.node_size}"
        return f"{self.level}{stage}, {overlap}, {self.micro_steps} micro-steps{nodes}"

    def ds_config(self) -> dict[str, Any]:
        zero = {"stage": self.stage, "overlap_comm": self.overlap, "reduce_bucket_size": 50_000}
        if self.stage == 3:
            zero |= {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 100_000}
            zero |= {"stage3_max_reuse_distance": 0}
        fp8 = {"enabled": True, "opt_level": self.level, "gradients": {"intra_node_size": self.node_size}}
        if self.level == "O3":
            fp8 |= {"weights": {"min_elements": 4096}}
        params = {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": params},
            "zero_optimization": zero,
            "fp8": fp8,
            "steps_per_print": 10**9,
        }


def cases(ranks: int) -> list[Case]:
    found = [Case(*each) for each in product(LEVELS, (False, True), (1, 2))]
    for size in node_sizes(ranks):
        levels = () if size == 1 else LEVELS
        found += [Case(level, True, micro_steps, 3, size) for level, micro_steps in product(levels, (1, 2))]
        found += [Case("O3", overlap, 1, 2, size) for overlap in (False, True)]
    return found


def digest(case: Case, device: torch.device) -> str:
    """Return the digest of a run; the same on every rank."""
    import deepspeed

    model = Terms()
    parameters = model.parameters()
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=case.ds_config())[0]
    norms = []
    for step in range(STEPS):
        for micro_step in range(case.micro_steps):
            give(engine.module, step, micro_step, device)
            engine.backward(engine(torch.zeros((), dtype=torch.bfloat16, device=device)))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    assert engine.skipped_steps == 1, f"{case}: {engine.skipped_steps} steps were skipped"
    found = hash_of(engine, norms)
    engine.destroy()
    return found


def hash_of(engine: Any, norms: list[float]) -> str:
    """Return digests of norms, states and weights, in one text: the same on every rank."""
    import deepspeed

    from ds_fp8.zero_fp8.checkpoint import writer
    from ds_fp8.zero_fp8.comm.agreement import gather_objects

    handler = engine.optimizer
    states, weights = hashlib.sha256(), hashlib.sha256()
    for name, entry in sorted(writer.pack(handler.parts.shards, handler.parameter_names).items()):
        states.update(name.encode())
        for key, value in sorted(entry.items()):
            states.update(key.encode() + (value.numpy().tobytes() if isinstance(value, Tensor) else b""))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for parameter in engine.module.parameters():
            weights.update(parameter.detach().cpu().view(torch.int16).numpy().tobytes())
    parts = {"norms": hashlib.sha256(repr(norms).encode()), "states": states, "weights": weights}
    found = []
    for part, own in parts.items():
        together = "".join(gather_objects(own.hexdigest(), handler.dp_process_group))
        found.append(f"{part} {hashlib.sha256(together.encode()).hexdigest()[:16]}")
    return ", ".join(found)


def differing(found: str, expected: str) -> str:
    """Name the parts that differ; empty if none does."""
    pairs = zip(found.split(", "), expected.split(", "), strict=True)
    return " and ".join(ours.split()[0] for ours, theirs in pairs if ours != theirs)


def run(
    out: Path, expected: dict[str, str], device: torch.device, chosen: Sequence[str] | None = None
) -> list[str]:
    """Find all digests, or those of the cases with these names; return the names of unexpected ones."""
    rank, digests = torch.distributed.get_rank(), {}
    different = []
    by_name = {str(each): each for each in cases(torch.distributed.get_world_size())}
    if unknown := [each for each in chosen or () if each not in by_name]:
        raise SystemExit(f"--cases: received {unknown}, allowed: {list(by_name)}")
    for case in by_name.values() if chosen is None else [by_name[name] for name in chosen]:
        name, found = str(case), digest(case, device)
        digests[name] = found
        wrong = differing(found, expected[name]) if expected else ""
        if wrong:
            different.append(f"{wrong} of {name}")
        write(out if rank == 0 else None, {**facts(device), "digests": digests})
        CONSOLE.print(f"{found}  {name}{f'  {wrong} DIFFER' if wrong else ''}")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, metavar="FILE", required=True)
    parser.add_argument("--expect", type=Path, metavar="FILE", help="digests of another device")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these, in this order; default: all")
    arguments = parser.parse_args()
    device = join_ranks()
    CONSOLE.quiet = torch.distributed.get_rank() > 0
    expected = json.loads(arguments.expect.read_text())["digests"] if arguments.expect else {}
    different = run(arguments.out, expected, device, arguments.cases)
    if different:
        raise SystemExit(f"bits differ from {arguments.expect}: {'; '.join(different)}")
    if expected:
        runs = len(arguments.cases or expected)
        CONSOLE.print(f"the same bits as {arguments.expect}: {runs} runs")
    from train_lm import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
