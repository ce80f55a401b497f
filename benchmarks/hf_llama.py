"""Trainings of a Hugging Face Llama with random weights on real text, beside stock DeepSpeed's.

    for config in zero3_bf16_torch zero3_o2 zero3_o2plus; do
        torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out llama.json --size 7B --checkpointing \\
            --micro_batch 8 --deepspeed_config benchmarks/gpu/$config.json
    done
    torchrun --nproc_per_node 2 benchmarks/hf_llama.py --probe 4 8 12 16 --size 7B --checkpointing \\
        --deepspeed_config benchmarks/gpu/zero3_bf16_torch.json

The second prints the peak by micro-batch, until memory ends.

One configuration per process group, in any order and as often as wanted: --out gathers them (`--again` runs
what it has once more), and the table shows the medians of all steps of all runs of a configuration. "States
GB" is what a rank should keep of states and reduced gradient. The text is the standard library's sources, as
bytes.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from claims import print_claims
from engine_facts import predicted_bytes, sent
from gpu_train import CONSOLE, claims_of_memory_and_time, load
from meters import elements
from ranks_gpu import facts, join_ranks
from rich.table import Table
from timing import write
from torch import Tensor, cuda

from ds_fp8.estimate import dry_run

SIZES = {  # hidden size, layers, heads, size between
    "tiny": (64, 2, 4, 172),
    "350M": (1024, 24, 16, 2736),
    "1.3B": (2048, 24, 16, 5504),
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
}
VOCABULARY = 32_000
WARM_UP = 4  # steps that are not timed: DeepSpeed's trace and the allocator settle
Run = dict[str, Any]


def model_of(arguments: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, between = SIZES[arguments.size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=between,
        vocab_size=VOCABULARY,
        max_position_embeddings=arguments.context,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: torch.nn.Module = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if arguments.checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    return model


def engine_of(arguments: argparse.Namespace, device: torch.device) -> Any:
    import deepspeed

    config = dict(dry_run.read(str(arguments.deepspeed_config)))
    config["train_micro_batch_size_per_gpu"] = arguments.micro_batch
    model = model_of(arguments, device)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def batches(arguments: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    from gpt_pretrain import read_sources
    from train_lm import Corpus

    corpus = Corpus(read_sources(), arguments.context - 1)  # a row has one token more
    for batch in corpus.batches(arguments.micro_batch, torch.distributed.get_rank()):
        yield batch.to(device, torch.long)


def step(engine: Any, batch: Tensor) -> Tensor:
    loss: Tensor = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        cuda.synchronize(device)


def peak(device: torch.device) -> int:
    return cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def train(arguments: argparse.Namespace, device: torch.device) -> Run:
    """Times, losses and bytes of some steps, the same on every rank."""
    engine = engine_of(arguments, device)
    source = batches(arguments, device)
    if device.type == "cuda":
        cuda.empty_cache()
        cuda.reset_peak_memory_stats(device)
    milliseconds, losses = [], []
    for _ in range(arguments.steps):
        batch = next(source)
        wait(device)
        start = time.perf_counter()
        losses.append(step(engine, batch))
        wait(device)
        milliseconds.append((time.perf_counter() - start) * 1000)
    mean = torch.stack(losses).float()
    torch.distributed.all_reduce(mean)
    return {
        "config": arguments.deepspeed_config.stem,
        "model": arguments.size,
        "world_size": torch.distributed.get_world_size(),
        "options": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "parameters": elements(engine.module),
        "milliseconds": milliseconds[WARM_UP:],
        "losses": (mean / torch.distributed.get_world_size()).tolist(),
        "peak_bytes_allocated": peak(device),
        "predicted_bytes": predicted_bytes(engine),
        "sent": sent(lambda: step(engine, next(source))),
        **facts(device),
    }


def probe(arguments: argparse.Namespace, device: torch.device) -> None:
    """Print the peak of two steps with each micro-batch, until memory ends."""
    engine = engine_of(arguments, device)
    for micro_batch in arguments.probe:
        arguments.micro_batch = micro_batch
        source = batches(arguments, device)
        if device.type == "cuda":
            cuda.empty_cache()
            cuda.reset_peak_memory_stats(device)
        try:
            for _ in range(2):
                step(engine, next(source))
        except torch.OutOfMemoryError:
            CONSOLE.print(f"micro-batch {micro_batch}: out of memory")
            return
        CONSOLE.print(f"micro-batch {micro_batch}: peak {peak(device) / 1e9:.2f} GB")


def gathered(runs: list[Run]) -> list[Run]:
    """One run per configuration: medians of the steps of all its runs."""
    found = []
    for name in dict.fromkeys(run["config"] for run in runs):
        same = [run for run in runs if run["config"] == name]
        times = [each for run in same for each in run["milliseconds"]]
        found.append({**same[0], "milliseconds_per_step": statistics.median(times), "runs": len(same)})
    return found


def report(runs: list[Run]) -> None:
    compared = gathered(runs)
    stock = next((run for run in compared if "bf16" in run["config"]), None)
    table = Table(title=f"Llama {runs[0]['model']}, {runs[0]['ranks']} x {runs[0]['device']}")
    for name in ("", "runs", "ms/step", "/ stock", "peak GB", "states GB", "sent B/param", "loss"):
        table.add_column(name, justify="right" if name else "left")
    for run in compared:
        ratio = run["milliseconds_per_step"] / stock["milliseconds_per_step"] if stock else 1.0
        table.add_row(
            run["config"],
            str(run["runs"]),
            f"{run['milliseconds_per_step']:,.1f}",
            f"{ratio:.3f}",
            *(f"{run[key] / 1e9:.2f}" for key in ("peak_bytes_allocated", "predicted_bytes")),
            f"{sum(run['sent'].values()) / run['parameters']:.3f}",
            f"{run['losses'][-1]:.4f}",
        )
    CONSOLE.print(table)
    ours = [run for run in compared if run is not stock] if stock else []
    print_claims([claim for run in ours for claim in claims_of_memory_and_time(run, stock, 0.92)], CONSOLE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--deepspeed_config", type=Path, required=True)
    add("--out", type=Path, metavar="FILE", help="where runs are gathered")
    add("--again", action="store_true", help="also what --out has")
    add("--size", choices=SIZES, default="tiny")
    add("--micro_batch", type=int, default=1)
    add("--context", type=int, default=2048)
    add("--steps", type=int, default=16)
    add("--checkpointing", action="store_true", help="of every layer's activations")
    add("--probe", type=int, nargs="+", metavar="N", help="micro-batches to try")
    arguments = parser.parse_args()
    device = join_ranks()
    CONSOLE.quiet = torch.distributed.get_rank() > 0
    if arguments.probe:
        probe(arguments, device)
        return
    runs = load(arguments.out)
    if arguments.again or arguments.deepspeed_config.stem not in [run["config"] for run in runs]:
        runs.append(train(arguments, device))
        write(arguments.out if torch.distributed.get_rank() == 0 else None, {"runs": runs})
    report(runs)
    from train_lm import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
