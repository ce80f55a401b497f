"""Pretrain a GPT at the shapes of FP8-LM's Table 1 and of GPT-3, with plain DeepSpeed.

    deepspeed --module ds_fp8 examples/gpt_pretrain.py --model 1.3B --deepspeed_config configs/zero2_o2.json
    python examples/gpt_pretrain.py --model 125M --deepspeed_config configs/zero2_bf16.json  # one device

The script knows nothing of FP8: the "fp8" section of the ds_config decides. What is compared are loss, time
and memory, so the text is what every machine has: the standard library's sources, as bytes. These are the
first 256 entries of the vocabulary (`gpt.py`). The host runs ahead of the device: losses and clock are read
every --log_interval steps, and the time limit is looked at only there.
"""

import argparse
import json
import math
import os
import platform
import socket
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from gpt import MODELS, GPTShape, build_model
from meters import elements, live_tensors, optimizer_bytes, storages
from rich.console import Console
from rich.table import Table
from torch import Tensor, cuda
from torch.optim.lr_scheduler import LambdaLR
from train_lm import Corpus, leave_ranks, mean_over_ranks, validate

from ds_fp8.estimate import dry_run

Inspect = Callable[[Any, Iterator[Tensor]], dict[str, Any]]


def read_sources() -> Tensor:
    """Bytes of all modules of the standard library, its packages' too, [n] uint8."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in sorted(library.rglob("*.py")) if path.is_file())
    installed = {"site-packages", "dist-packages"}
    text = b"".join(path.read_bytes() for path in paths if not installed & set(path.parts))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to a tenth."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / max(1, warmup)) * (0.55 + 0.45 * math.cos(math.pi * done))


class Meter:
    """Time and peak memory of laps of steps; between laps the clock stands still.

    The device is waited for only where a lap begins and ends. The first lap is warm-up.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._laps: list[tuple[float, int, int]] = []

    def start(self) -> None:
        if self._device:
            cuda.synchronize(self._device)
            cuda.reset_peak_memory_stats(self._device)
        self._since = time.perf_counter()

    def stop(self, steps: int) -> float:
        """Milliseconds per step."""
        peaks = 0, 0
        if self._device:
            cuda.synchronize(self._device)
            peaks = cuda.max_memory_allocated(self._device), cuda.max_memory_reserved(self._device)
        self._laps.append(((time.perf_counter() - self._since) * 1000 / steps, *peaks))
        return self._laps[-1][0]

    def figures(self) -> dict[str, float]:
        """Median time; peaks over all laps, of the rank that has most. Zeros on a CPU."""
        milliseconds, *peaks = zip(*(self._laps[1:] or self._laps), strict=True)
        most = torch.tensor([max(each) for each in peaks], dtype=torch.float64, device=self._device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return {
            "milliseconds_per_step": statistics.median(milliseconds),
            "peak_bytes_allocated": most[0].item(),
            "peak_bytes_reserved": most[1].item(),
        }


def train_step(engine: Any, batches: Iterator[Tensor]) -> Tensor:
    """All micro-steps of one step; the mean of their losses on this rank, still on the device."""
    micro_steps: int = engine.gradient_accumulation_steps()
    total = torch.zeros((), device=engine.device)
    for _ in range(micro_steps):
        batch = next(batches)
        if engine.device.type == "cuda":
            batch = batch.pin_memory()  # else the copy would wait for the device
        loss = engine(batch.to(engine.device, non_blocking=True))
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    return total / micro_steps


def train(engine: Any, corpus: Corpus, arguments: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """From the engine's step to the last one, or to the deadline."""
    first, last = engine.global_steps, arguments.steps
    size, micro_steps = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    batches = corpus.batches(size, arguments.seed * 1000 + dist.get_rank())
    batches = islice(batches, first * micro_steps, None)  # a resumed run has seen the first ones
    meter, losses, waiting, late = Meter(engine.device), [], [], False
    meter.start()
    for step in range(first + 1, last + 1):
        waiting.append(train_step(engine, batches))
        saves = arguments.save and arguments.save_interval and step % arguments.save_interval == 0
        if not (saves or step == last or step % arguments.log_interval == 0):
            continue
        milliseconds = meter.stop(len(waiting))
        mean, late = gather(waiting, time.perf_counter() > deadline)
        losses += mean
        waiting.clear()
        if dist.get_rank() == 0:
            print(f"step {step}/{last}: loss {losses[-1]:.4f}, {milliseconds:,.1f} ms/step", flush=True)
        if arguments.save and (saves or step == last or late):
            engine.save_checkpoint(arguments.save, tag=f"step{step}")
        if late:
            break
        meter.start()
    stopped_early = late and step < last
    return {"first_step": first + 1, "stopped_early": stopped_early, "losses": losses} | meter.figures()


def gather(losses: list[Tensor], late: bool) -> tuple[list[float], bool]:
    """Losses, means over the ranks, and whether any rank is late; the one place that waits."""
    values = torch.stack([*losses, losses[0].new_full((), float(late))])
    dist.all_reduce(values)
    *means, late_ranks = (values / dist.get_world_size()).tolist()
    return means, late_ranks > 0


def build_engine(shape: GPTShape, arguments: argparse.Namespace, device: torch.device) -> Any:
    ds_config: dict[str, Any] = {**dry_run.read(str(arguments.deepspeed_config))}
    if arguments.micro_batch:
        ds_config["train_micro_batch_size_per_gpu"] = arguments.micro_batch
    if arguments.lr:
        ds_config["optimizer"]["params"]["lr"] = arguments.lr
    torch.manual_seed(arguments.seed)
    model = build_model(shape, ds_config, device, checkpointing=arguments.activation_checkpointing)
    factor = partial(cosine, steps=arguments.steps, warmup=arguments.warmup_steps)
    scheduler = partial(LambdaLR, lr_lambda=factor)
    parameters = model.parameters()
    engine = deepspeed.initialize(
        model=model, model_parameters=parameters, config=ds_config, lr_scheduler=scheduler
    )[0]
    if arguments.resume and engine.load_checkpoint(arguments.save)[0] is None:
        raise SystemExit(f"--resume: no checkpoint in {arguments.save}")
    if engine.global_steps >= arguments.steps:
        raise SystemExit(f"nothing to do: {engine.global_steps} steps are done, --steps is {arguments.steps}")
    return engine


def join_ranks() -> torch.device:
    """This rank's device, with the process group up: of one rank where no launcher made more."""
    if not {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    deepspeed.init_distributed()
    local_rank = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(local_rank)
    return torch.device(get_accelerator().device_name(local_rank))


def run(
    arguments: argparse.Namespace, device: torch.device, inspect: Inspect | None = None
) -> dict[str, Any]:
    """Train and validate; the figures, the same on every rank.

    inspect: finds out more about the engine, with batches of its own, before it goes.
    """
    deadline = time.perf_counter() + arguments.time_limit
    shape = MODELS[arguments.model]
    context = arguments.context or shape.context
    corpus = Corpus(read_sources(), context)
    before = storages(live_tensors())

    engine = build_engine(shape, arguments, device)
    trained = train(engine, corpus, arguments, deadline)
    size, tokens = engine.train_micro_batch_size_per_gpu(), engine.train_batch_size() * context
    validation = validate(engine, corpus.validation_batches(size, 20))
    state = mean_over_ranks(torch.tensor(float(optimizer_bytes(engine.module, before)), device=device))
    parameters = elements(engine.module)
    inspected = inspect(engine, corpus.batches(size, arguments.seed)) if inspect else {}
    engine.destroy()
    return {
        **trained,
        **about(arguments, shape, device),
        "parameters": parameters,
        "final_loss": statistics.fmean(trained["losses"][-50:]),
        "validation_loss": validation,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / trained["milliseconds_per_step"] * 1000,
        "state_bytes_per_parameter": state * dist.get_world_size() / parameters,
        **inspected,
    }


def about(arguments: argparse.Namespace, shape: GPTShape, device: torch.device) -> dict[str, Any]:
    """What was run, and on what."""
    return {
        "model": arguments.model,
        "ds_config": str(arguments.deepspeed_config),
        "shape": asdict(shape),
        "world_size": dist.get_world_size(),
        "device": cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    result = run(arguments, join_ranks())
    if dist.get_rank() == 0:
        print_result(result)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1))
    leave_ranks()
    if not math.isfinite(result["final_loss"]):
        raise SystemExit("the loss is not finite")


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--deepspeed_config", type=Path, required=True, help="ds_config, a JSON file")
    add("--model", choices=MODELS, default="125M")
    add("--steps", type=int, default=300)
    add("--seed", type=int, default=0)
    add("--micro_batch", type=int, help="instead of the ds_config's train_micro_batch_size_per_gpu")
    add("--context", type=int, help="tokens in a sequence, if fewer than the model takes")
    add("--lr", type=float, help="peak, instead of the ds_config's; Table 1: 6e-4 for 125M, 3e-4 for 7B, 13B")
    add("--warmup_steps", type=int, default=0, help="then a cosine to a tenth of the peak, at --steps")
    add("--activation_checkpointing", action="store_true", help="of every block")
    add("--log_interval", type=int, default=10, help="steps between two looks at losses and clock")
    add("--time_limit", type=float, default=math.inf, metavar="SECONDS", help="stop, and save, when over")
    add("--save", type=Path, metavar="DIR", help="write a checkpoint to this folder at the end")
    add(
        "--save_interval",
        type=int,
        default=0,
        help="steps from one checkpoint to the next; default: the last only",
    )
    add("--resume", action="store_true", help="go on from the latest checkpoint in --save")
    add("--json", type=Path, metavar="OUT", help="write losses and figures to this file")
    add("--local_rank", type=int, help="given by the deepspeed launcher")
    arguments = parser.parse_args(given)
    if arguments.resume and not arguments.save:
        parser.error("--resume needs --save, the folder to resume from")
    longest = MODELS[arguments.model].context
    if arguments.context and arguments.context > longest:
        parser.error(f"--context is {arguments.context}, {arguments.model} takes at most {longest}")
    return arguments


def print_result(result: dict[str, Any]) -> None:
    table = Table("", Path(result["ds_config"]).name, title=f"{result['model']} on {result['device']}")
    last = result["first_step"] + len(result["losses"]) - 1
    rows = {
        "parameters": f"{result['parameters']:,}",
        "ranks": f"{result['world_size']}",
        "ms/step": f"{result['milliseconds_per_step']:,.1f}",
        "tokens/s": f"{result['tokens_per_second']:,.0f}",
        "state B/param": f"{result['state_bytes_per_parameter']:.2f}",
        "steps": f"{result['first_step']} to {last}",
        "loss, last 50": f"{result['final_loss']:.4f}",
        "validation": f"{result['validation_loss']:.4f}",
        "torch, deepspeed": ", ".join(result["versions"].values()),
    }
    for kind in ("allocated", "reserved"):
        if result[f"peak_bytes_{kind}"]:
            rows[f"peak GB {kind}"] = f"{result[f'peak_bytes_{kind}'] / 1e9:.2f}"
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
