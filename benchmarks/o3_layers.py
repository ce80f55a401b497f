"""Forward and backward of GPT layers in an engine of O3, beside stock DeepSpeed's in BF16.

    torchrun --nproc_per_node 1 benchmarks/o3_layers.py --out o3_layers.json
    torchrun --nproc_per_node 1 benchmarks/o3_layers.py --tiny       # without a GPU, `emulated`

The time includes all work of an engine between the beginning of forward and the end of backward: hooks,
casts, transposes, gradients that are copied or quantised into buckets. Tokens are 8,192, in sequences of
2,048. Engines take turns within every round; each round times forward and backward once, by CUDA events, and
then takes a step, untimed. Figures are medians, and shares medians of the ratios within rounds.

The GPU waits before the first event until the host is some layers ahead, as in a training whose GPU has more
work than its host; the host's time for its calls is a separate figure, "host ms".
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks_gpu import facts, join_ranks
from rich.console import Console
from timing import event_clock, host_clock, write
from torch import Tensor, nn
from torch.nn import functional

from ds_fp8.estimate import dry_run

SIZES = {"1.3B": (2048, 16, 4), "7B": (4096, 32, 2), "13B": (5120, 40, 2)}  # hidden size, heads, layers
TINY = {"tiny": (1024, 8, 1)}
LIMITS = {"1.3B": (0.84, 0.80), "7B": (0.72, 0.70), "13B": (0.74, 0.72)}  # eager, compiled: by arithmetic
CONFIGS = {"BF16": "bf16_torch", "O3": "o3"}
AHEAD = 60_000_000  # cycles that the GPU waits for the host, about 35 ms
Times = dict[str, list[float]]
CONSOLE = Console(width=140, highlight=False)


class Layer(nn.Module):
    """LayerNorm, causal attention, LayerNorm, GELU."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.projection = nn.Linear(hidden, 3 * hidden, False), nn.Linear(hidden, hidden, False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, False), nn.Linear(4 * hidden, hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        parts = self.qkv(self.before_attention(x)).view(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class Layers(nn.Module):
    def __init__(self, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(hidden, heads) for _ in range(layers)))

    def forward(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return a loss whose gradient is dy."""
        return torch.dot(self.layers(x).flatten(), dy.flatten())


def engine_of(config: str, size: tuple[int, int, int], device: torch.device, compiled: bool) -> Any:
    import deepspeed

    torch.manual_seed(0)
    with device:
        model = Layers(*size).bfloat16()
    path = Path(__file__).with_name("gpu") / f"{CONFIGS[config]}.json"
    parameters = model.parameters()
    engine = deepspeed.initialize(
        model=model, model_parameters=parameters, config=dict(dry_run.read(str(path)))
    )[0]
    if compiled:
        engine.compile()
    return engine


def clock(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return milliseconds on the GPU, and those of the host."""
    if device.type != "cuda":
        return (host_clock(run),) * 2
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    host = 0.0

    def timed() -> None:
        nonlocal host
        host = host_clock(run)

    return event_clock(timed), host


def measure(
    size: tuple[int, int, int], shape: tuple[int, int], rounds: int, device: torch.device
) -> tuple[Times, Times]:
    """Return milliseconds of forward and backward of all layers, by engine, and those of the host."""
    x, dy = (torch.randn(*shape, size[0], device=device, dtype=torch.bfloat16) for _ in range(2))
    dy *= 1e-3
    engines = {
        f"{config}{', compiled' if compiled else ''}": engine_of(config, size, device, compiled)
        for config in CONFIGS
        for compiled in (False, True)
    }

    def both_ways(engine: Any) -> None:
        engine.backward(engine(x, dy))

    times, hosts = ({name: [] for name in engines} for _ in range(2))
    for number in range(-3, rounds):
        names = [*engines][number % len(engines) :] + [*engines][: number % len(engines)]
        for name in names:
            milliseconds, host = clock(lambda name=name: both_ways(engines[name]), device)  # type: ignore[misc]
            engines[name].step()
            if number >= 0:
                times[name].append(milliseconds)
                hosts[name].append(host)
    for engine in engines.values():
        engine.destroy()
    return times, hosts


def share(times: Times, kind: str) -> float:
    pairs = zip(times[f"O3{kind}"], times[f"BF16{kind}"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--tiny", action="store_true", help="one small layer, two rounds")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    device = join_ranks()
    sizes = TINY if arguments.tiny else {name: SIZES[name] for name in arguments.models}
    shape, rounds = ((1, 64), 2) if arguments.tiny else ((4, 2048), arguments.rounds)
    found = []
    for model, size in sizes.items():
        times, hosts = measure(size, shape, rounds, device)
        medians, host_medians = (
            {name: statistics.median(each) / size[2] for name, each in kind.items()}
            for kind in (times, hosts)
        )
        shares = {"eager": share(times, ""), "compiled": share(times, ", compiled")}
        limits = dict(zip(shares, LIMITS.get(model, (None, None)), strict=True))
        row = {"model": model, "ms_per_layer": medians, "host_ms_per_layer": host_medians}
        found.append({**row, "of_bf16": shares, "limits": limits})
        CONSOLE.print(found[-1])
        write(arguments.out, {"rounds": rounds, "shape": shape, "layers": found, **facts(device)})


if __name__ == "__main__":
    main()
