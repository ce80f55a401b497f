"""FP8 products in CUDA graphs: a training with graphs has the losses and weights of one without, to the bit.

    torchrun --nproc_per_node 1 benchmarks/gpu_graphs.py --out gpu_graphs.json
    torchrun --nproc_per_node 1 benchmarks/gpu_graphs.py --tiny      # without a GPU, and so without graphs

Two layers that share an input among products, with biases, a Conv1D and, in a second model, frozen FP8
matrices train at O3 with two micro-steps per step, an evaluation after each, and health measured on every
second step. Pairs that must agree: eager beside `torch.cuda.make_graphed_callables`, and torch.compile beside
its mode "reduce-overhead". Graphs that their user captures do not count x and dy, those of torch.compile do.

Engines are initialised in a stream of their own. DeepSpeed, like ds_fp8, keeps the nodes that accumulate
gradients; a node belongs to the stream in which it was made, and CUDA lets no capture reach the default one.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks_gpu import facts, join_ranks
from rich.console import Console
from timing import write
from torch import Tensor, nn
from torch.nn import functional

import ds_fp8

HIDDEN, TOKENS = (1024, 512), (2048, 64)  # on a GPU, and with --tiny
STEPS = 6
PAIRS = {"eager": "graphed", "compiled": "reduce-overhead"}
CONSOLE = Console(width=140, highlight=False)


@dataclass(frozen=True)
class Found:
    """What a training leaves."""

    losses: list[float]
    weights: list[Tensor]
    health: dict[str, dict[str, float]]
    replays: int


class Layer(nn.Module):
    """Three products of one input, a Conv1D, and a product that is cast for itself."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.norm, self.q, self.k = nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.v, self.up = nn.Linear(hidden, hidden, bias=False), Conv1D(2 * hidden, hidden)
        self.down = nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.q(normed) * self.k(normed).sigmoid() + self.v(normed)
        return x + self.down(functional.gelu(self.up(x)))


class Layers(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(2))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x.float() - target.float()).square().mean()


class CountedGraph(torch.cuda.CUDAGraph):
    """A CUDA graph, of whose kind all replays are counted."""

    replays = 0

    def replay(self) -> None:
        CountedGraph.replays += 1
        super().replay()


def config(frozen: bool) -> dict[str, Any]:
    weights = {"min_elements": 1} | ({"frozen": "e4m3"} if frozen else {})
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "fp8": {
            "enabled": True,
            "opt_level": "O3",
            "weights": weights,
            "stats": {"interval": 2},
        },
        "steps_per_print": 10**9,
    }


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run what is launched inside in a stream of its own, in order with what comes before and after."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def train(way: str, frozen: bool, hidden: int, tokens: int, device: torch.device) -> Found:
    import deepspeed

    torch.compiler.reset()
    CountedGraph.replays = 0
    torch.manual_seed(0)
    with device:
        model = Layers(hidden).bfloat16()
    for layer in model.layers:
        for each in (layer.q, layer.v) if frozen else ():
            each.weight.requires_grad_(False)
    trained = [each for each in model.parameters() if each.requires_grad]
    with own_stream(device):
        engine = deepspeed.initialize(model=model, model_parameters=trained, config=config(frozen))[0]
    graph(way, engine.module, torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=device))
    draw, losses = torch.Generator(device).manual_seed(1), []

    def batch() -> tuple[Tensor, Tensor]:
        x, target = torch.randn(2, tokens, hidden, generator=draw, device=device).bfloat16()
        return x, target

    for _ in range(STEPS):
        for _ in range(2):
            torch.compiler.cudagraph_mark_step_begin()
            loss = engine(*batch())
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            losses.append(engine(*batch()).item())
    weights = [each.detach().clone() for each in engine.module.parameters()]
    health = {name: dict(each) for name, each in ds_fp8.stats(engine)["products"].items()}
    engine.destroy()
    return Found(losses, weights, health, CountedGraph.replays)


def graph(way: str, model: Layers, x: Tensor) -> None:
    """Put the layers into graphs of a kind."""
    if way == "graphed":
        samples = [(x.clone().requires_grad_(),) for _ in model.layers]
        torch.cuda.make_graphed_callables(tuple(model.layers), tuple(samples))
    elif way != "eager":
        for layer in model.layers:
            layer.compile(mode="default" if way == "compiled" else way)


def differences(plain: Found, graphs: Found, counted: bool) -> dict[str, int]:
    """Return how many losses, elements of weights and figures of health differ."""
    wanted, found = (
        {(name, figure): value for name, each in run.health.items() for figure, value in each.items()}
        for run in (plain, graphs)
    )
    figures = {key: value for key, value in wanted.items() if counted or key[1].startswith("w_")}
    return {
        "losses": sum(a != b for a, b in zip(plain.losses, graphs.losses, strict=True)),
        "weights": sum(int((a != b).sum()) for a, b in zip(plain.weights, graphs.weights, strict=True)),
        "figures": sum(found.get(key) != value for key, value in figures.items()),
        "figures too many": len(found.keys() - figures.keys()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU: small layers, and no graphs")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    device = join_ranks()
    torch.cuda.CUDAGraph = CountedGraph  # type: ignore[misc]
    if device.type == "cpu":
        os.environ["DS_FP8_PRODUCTS"] = "emulated"
    sizes = [each[arguments.tiny] for each in (HIDDEN, TOKENS)]
    found = []
    for frozen in (False, True):
        for plain, graphs in PAIRS.items():
            if device.type == "cpu" and graphs == "graphed":
                continue
            first, second = (train(way, frozen, *sizes, device) for way in (plain, graphs))
            differ = differences(first, second, counted=graphs != "graphed")
            names = {"frozen": frozen, "plain": plain, "graphs": graphs}
            figures = sum(map(len, second.health.values()))
            found.append({**names, "replays": second.replays, "figures": figures, "differences": differ})
            CONSOLE.print(found[-1], first.losses[-3:])
    write(arguments.out, {"pairs": found, "steps": STEPS, **facts(device)})
    if any(any(each["differences"].values()) for each in found):
        raise SystemExit("graphs change results")
    if device.type == "cuda" and not all(each["replays"] for each in found):
        raise SystemExit("no graph was replayed")


if __name__ == "__main__":
    main()
