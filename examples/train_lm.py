"""Train a byte-level GPT on text that every Python carries, with plain DeepSpeed.

    deepspeed --num_gpus 2 --module ds_fp8 examples/train_lm.py --deepspeed_config configs/zero2_o2.json
    deepspeed --num_gpus 2 examples/train_lm.py --deepspeed_config configs/zero2_bf16.json

The script knows nothing of FP8: the "fp8" section of the ds_config decides. At the end rank 0 prints
loss, state bytes per parameter, wire bytes per step and time per step, all measured from outside.
"""

import argparse
import json
import math
import os
import pydoc_data.topics
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from meters import Traffic, elements, live_tensors, optimizer_bytes, storages
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """Size of the model."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    context: int = 96


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, width]
        batch, context, width = x.shape
        split = (batch, context, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(split).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, context, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """A GPT over bytes; returns the mean cross entropy of the next byte, in nats."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:  # [batch, context + 1] int64
        inputs, targets = text[:, :-1], text[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))


def read_corpus(name: str) -> Tensor:
    """Bytes of the documentation topics, or of the standard library's sources, [n] uint8."""
    if name == "topics":
        topics = pydoc_data.topics.topics
        text = "".join(topics[key] for key in sorted(topics)).encode("ascii", "ignore")
    else:
        library = Path(sysconfig.get_path("stdlib"))
        text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Corpus:
    """Text cut into a training part and, at its end, a validation part of a tenth."""

    def __init__(self, text: Tensor, context: int) -> None:
        cut = len(text) * 9 // 10
        self.train, self.validation = text[:cut], text[cut:]
        self._window = torch.arange(context + 1)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Random windows without end, [size, context + 1] int64."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._windows(self.train, size, generator)

    def validation_batches(self, size: int, count: int) -> list[Tensor]:
        """The same windows at every call."""
        generator = torch.Generator().manual_seed(12345)
        return [self._windows(self.validation, size, generator) for _ in range(count)]

    def _windows(self, text: Tensor, size: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(text) - len(self._window), (size, 1), generator=generator)
        return text[starts + self._window].long()


def build_engine(ds_config: str | dict[str, Any], shape: Shape, seed: int) -> Any:
    """A seeded model in a DeepSpeed engine."""
    torch.manual_seed(seed)
    model = ByteGPT(shape)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]


def train_step(engine: Any, batches: Iterator[Tensor]) -> float:
    """All micro-steps of one step; the mean of their losses over all ranks."""
    micro_steps = engine.gradient_accumulation_steps()
    total = torch.zeros((), device=engine.device)
    for _ in range(micro_steps):
        loss = engine(next(batches).to(engine.device))
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    return mean_over_ranks(total / micro_steps)


def validate(engine: Any, batches: list[Tensor]) -> float:
    engine.eval()
    with torch.no_grad():
        loss = torch.stack([engine(batch.to(engine.device)) for batch in batches]).mean()
    engine.train()
    return mean_over_ranks(loss)


def mean_over_ranks(value: Tensor) -> float:
    deepspeed.comm.all_reduce(value)
    return value.item() / deepspeed.comm.get_world_size()


def train(engine: Any, corpus: Corpus, steps: int, seed: int, *, quiet: bool) -> dict[str, Any]:
    """Train, then measure one more step's traffic."""
    rank = deepspeed.comm.get_rank()
    size = engine.train_micro_batch_size_per_gpu()
    batches = corpus.batches(size, seed * 1000 + rank)
    losses, milliseconds = [], []
    bar = tqdm(range(steps), disable=quiet or rank > 0, file=sys.stderr, mininterval=1.0)
    for _ in bar:
        start = time.perf_counter()
        losses.append(train_step(engine, batches))
        milliseconds.append((time.perf_counter() - start) * 1000)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    validation = validate(engine, corpus.validation_batches(size, 20))
    with Traffic() as traffic:
        train_step(engine, batches)
    return {
        "losses": losses,
        "final_loss": statistics.fmean(losses[-50:]),
        "validation_loss": validation,
        "milliseconds_per_step": statistics.median(milliseconds),
        "wire_bytes_per_step": sum(traffic.sent.values()),
    }


def leave_ranks() -> None:
    """End of the process group; gloo's threads drop their last tensors before Python ends."""
    torch.distributed.destroy_process_group()
    time.sleep(0.2)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shape = Shape(arguments.layers, arguments.width, arguments.heads, arguments.context)
    corpus = Corpus(read_corpus(arguments.corpus), shape.context)
    before = storages(live_tensors())

    engine = build_engine(arguments.deepspeed_config, shape, arguments.seed)
    result = train(engine, corpus, arguments.steps, arguments.seed, quiet=arguments.quiet)
    parameters = elements(engine.module)
    state = mean_over_ranks(torch.tensor(float(optimizer_bytes(engine.module, before))))
    result |= {
        "ds_config": arguments.deepspeed_config,
        "world_size": deepspeed.comm.get_world_size(),
        "shape": asdict(shape),
        "parameters": parameters,
        "state_bytes_per_parameter": state * deepspeed.comm.get_world_size() / parameters,
    }
    if deepspeed.comm.get_rank() == 0:
        print_result(result)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1))
    engine.destroy()
    leave_ranks()
    if not math.isfinite(result["final_loss"]):
        raise SystemExit("the loss is not finite")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deepspeed_config", required=True, help="ds_config, a JSON file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", choices=("topics", "stdlib"), default="topics")
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write losses and figures to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    return parser.parse_args()


def print_result(result: dict[str, Any]) -> None:
    table = Table(title=f"{Path(result['ds_config']).name}, {result['parameters']:,} parameters")
    for column in ("loss, last 50", "validation", "state B/param", "wire KB/step", "ms/step"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{result['final_loss']:.4f}",
        f"{result['validation_loss']:.4f}",
        f"{result['state_bytes_per_parameter']:.2f}",
        f"{result['wire_bytes_per_step'] / 1000:,.1f}",
        f"{result['milliseconds_per_step']:.1f}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
