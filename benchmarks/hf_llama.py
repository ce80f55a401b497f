"""Train a Hugging Face Llama with random weights on real text, beside stock DeepSpeed.

    for config in zero3_bf16_torch zero3_o2 zero3_o2plus zero3_o3; do
        torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out llama.json --size 7B --checkpointing \\
            --micro_batch 8 --deepspeed_config benchmarks/gpu/$config.json
    done
    torchrun --nproc_per_node 2 benchmarks/hf_llama.py --probe 4 8 12 16 --size 7B --checkpointing \\
        --deepspeed_config benchmarks/gpu/zero3_bf16_torch.json

The second prints the peak by micro-batch, until memory runs out. `--fsdp2` instead of a configuration is
plain PyTorch; headline.py says what `--micro_steps`, `--compile` and `--gpu_gb` are for. With

    torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out alst.json --size 350M --context 8192 \\
        --sequence_parallel 2 --steps 200 --sleeps 20 --deepspeed_config benchmarks/gpu/zero3_o2.json

two ranks share each sequence (DeepSpeed's ALST), attention is flash attention, and every rank sleeps up
to 20 ms before each forward; step times then mean nothing, and sent bytes are not counted. With

    for config in bf16_torch o2_overlap; do
        torchrun --nproc_per_node 2 benchmarks/hf_llama.py --out autotp.json --size 350M --micro_batch 4 \\
            --tensor_parallel 2 --steps 200 --lr 1e-4 --sleeps 20 \\
            --deepspeed_config benchmarks/gpu/$config.json
    done

AutoTP splits the model over two ranks, its all-reduces overlap (tp_overlap_comm), and every rank also sleeps
before one in 20 collectives.

One configuration per process group, in any order and number: --out collects them (`--again` repeats a run
that it has), and the table shows the medians of all steps of all runs of a configuration. "States GB" is what
a rank should keep of states and reduced gradient. The text is the standard library's sources, as bytes.
"""

import argparse
import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engine_facts import decodes, gradient_bytes_sent, predicted_bytes, sent, waits, weights_saved
from fsdp2 import Fsdp2
from gpu_train import CONSOLE, load
from llama import (
    LAYERS,
    SIZES,
    Batch,
    batches,
    engine_of,
    micro_step,
    recorded,
    same_everywhere,
    sleepy_collectives,
    step,
)
from llama_report import Run, choice_of, report
from meters import elements
from ranks_gpu import facts, join_ranks, limit_memory, wait
from timing import write
from torch import cuda


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        cuda.empty_cache()
        cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    return cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def train(arguments: argparse.Namespace, device: torch.device) -> Run:
    """Return times, losses and bytes of some steps, the same on every rank."""
    engine = engine_of(arguments, device)
    source = batches(arguments, device)
    forget_peak(device)
    milliseconds, losses, norms = [], [], []
    draw = random.Random(torch.distributed.get_rank())
    for _ in range(arguments.steps):
        whole = list(itertools.islice(source, arguments.micro_steps))
        wait(device)
        time.sleep(draw.uniform(0, arguments.sleeps) / 1000)
        start = time.perf_counter()
        with sleepy_collectives(draw, arguments.sleeps if arguments.tensor_parallel > 1 else 0):
            losses.append(step(engine, iter(whole)))
        norms.append(engine.get_global_grad_norm())
        wait(device)
        milliseconds.append((time.perf_counter() - start) * 1000)
    mean = torch.stack(losses).float()
    torch.distributed.all_reduce(mean)
    ranks = torch.distributed.get_world_size()
    sequences = arguments.micro_batch * arguments.micro_steps * ranks // _ranks_per_sequence(arguments)
    return {
        "config": name_of(arguments),
        "model": arguments.size,
        "world_size": ranks,
        "options": recorded(arguments),
        "parameters": elements(engine.module),
        "tokens": sequences * arguments.context,
        "milliseconds": milliseconds[arguments.warm_up :],
        "losses": (mean / ranks).tolist(),
        "norms": [float(each) for each in norms],
        "peak_bytes_allocated": peak(device),
        **facts_of(engine, arguments, source),
        **facts(device),
    }


def facts_of(engine: Any, arguments: argparse.Namespace, source: Iterator[Batch]) -> Run:
    """Return what is found out after the steps that are timed."""
    found: Run = {
        "predicted_bytes": predicted_bytes(engine),
        "weights_saved": weights_saved(engine),
        "decodes": decodes(engine),
        "gradient_bytes": gradient_bytes_sent(engine),
    }
    if isinstance(engine, Fsdp2):
        return found | {"sent": {}, "waits": {}, "same_everywhere": True}
    found["same_everywhere"] = same_everywhere(engine)
    if _ranks_per_sequence(arguments) > 1 or arguments.compile:  # counting would run what is compiled eagerly
        return found | {"sent": {}, "waits": {}}
    found["sent"] = sent(lambda: step(engine, source))
    for _ in range(arguments.micro_steps - 1):
        micro_step(engine, next(source))
    engine.backward(engine(**next(source)).loss)
    return found | {"waits": waits(engine.step)}


def name_of(arguments: argparse.Namespace) -> str:
    name = "fsdp2" if arguments.fsdp2 else arguments.deepspeed_config.stem
    return name + ("+float8" if arguments.float8 else "")


def _ranks_per_sequence(arguments: argparse.Namespace) -> int:
    return max(arguments.sequence_parallel, arguments.tensor_parallel)


def probe(arguments: argparse.Namespace, device: torch.device) -> None:
    """Print the peak of two steps with each micro-batch, until memory runs out."""
    engine = engine_of(arguments, device)
    for micro_batch in arguments.probe:
        arguments.micro_batch = micro_batch
        source = batches(arguments, device)
        forget_peak(device)
        try:
            for _ in range(2):
                step(engine, source)
        except torch.OutOfMemoryError:
            CONSOLE.print(f"micro-batch {micro_batch}: out of memory")
            return
        CONSOLE.print(f"micro-batch {micro_batch}: peak {peak(device) / 1e9:.2f} GB")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    engine = parser.add_mutually_exclusive_group(required=True)
    engine.add_argument("--deepspeed_config", type=Path)
    engine.add_argument("--fsdp2", action="store_true", help="plain PyTorch")
    add("--out", type=Path, metavar="FILE", help="file that collects runs")
    add("--again", action="store_true", help="repeat runs that --out has")
    add("--size", choices=SIZES, default="tiny")
    add("--micro_batch", type=int, default=1)
    add("--context", type=int, default=2048)
    add("--micro_steps", type=int, default=1, metavar="N", help="gradient accumulation")
    add("--steps", type=int, default=16)
    add("--warm_up", type=int, default=4, metavar="N", help="steps that are not timed: the allocator settles")
    add("--lr", type=float, help="peak learning rate; default: the configuration's")
    add("--warmup_steps", type=int, default=0, metavar="N", help="of the learning rate")
    add(
        "--compile",
        choices=("model", *LAYERS),
        help="engine.compile(); each layer and the loss; in CUDA graphs",
    )
    add("--gpu_gb", type=float, help="GPU memory that may be used; default: all")
    add("--float8", action="store_true", help="products by torchao's tensorwise float8; named +float8")
    add("--sequence_parallel", type=int, default=1, metavar="N", help="ranks that share a sequence")
    add(
        "--tensor_parallel", type=int, default=1, metavar="N", help="ranks over which AutoTP splits the model"
    )
    add("--sleeps", type=float, default=0.0, metavar="MS", help="a rank's longest sleep before a forward")
    add("--zero_init", action="store_true", help="no rank makes the whole model (ZeRO 3)")
    add("--checkpointing", action="store_true", help="checkpoint every layer's activations")
    add("--deterministic", action="store_true", help="add in a fixed order, attention too: slower")
    add("--kept_layers", type=int, default=0, metavar="N", help="first layers that are not checkpointed")
    add("--probe", type=int, nargs="+", metavar="N", help="micro-batches to try")
    return parser.parse_args()


def main() -> None:
    arguments = read_options()
    if arguments.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = join_ranks()
    if arguments.gpu_gb:
        limit_memory(arguments.gpu_gb, device)
    CONSOLE.quiet = torch.distributed.get_rank() > 0
    if arguments.probe:
        probe(arguments, device)
        return
    runs = load(arguments.out)
    asked = {"config": name_of(arguments), "options": recorded(arguments)}
    if arguments.again or choice_of(asked) not in map(choice_of, runs):
        runs.append(train(arguments, device))
        write(arguments.out if torch.distributed.get_rank() == 0 else None, {"runs": runs})
    report(runs)
    from train_lm import leave_ranks

    leave_ranks()


if __name__ == "__main__":
    main()
