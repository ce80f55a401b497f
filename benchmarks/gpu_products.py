"""FP8 products on one GPU: checked against their contract, then timed beside BF16 products and a plain copy.

    python benchmarks/gpu_products.py --out gpu_products.json
    TRITON_INTERPRET=1 python benchmarks/gpu_products.py --tiny   # without a GPU

Casts and weights are compared bit by bit with the reference, products with FP64 (`verify_products.py`); if
one is wrong, nothing is timed, unless --regardless asks for it. Shapes are those of a GPT layer, tokens
8,192. In every round each contestant is timed once, by CUDA events, after the L2 cache has been overwritten;
figures are medians. Products by cuBLAS are left out if it does not support them, and the reason is printed.

`host`: microseconds that Python takes for the calls of one linear layer, forward and backward, at a size at
which the GPU does not matter.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
from product_operands import gaussian, pairs
from rich.console import Console
from timing import Clock, Contestant, event_clock, host_clock, interleave
from torch import Tensor
from verify_products import verify

from ds_fp8.ops import cublas, products
from ds_fp8.ops.product_backend import MULTIPLY, Products, by_way, triton_products
from ds_fp8.ops.products import Operand, Weight, scale_shape, tiles

HIDDEN = {"1.3B": 2048, "7B": 4096}
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "up": (1, 4), "down": (4, 1)}  # K and N, in hidden sizes
L2_BYTES = 1 << 28
CONSOLE = Console(width=140, highlight=False)


@dataclass(frozen=True)
class Row:
    """One timed operation."""

    model: str
    operation: str
    shape: str
    microseconds: float
    terabytes_per_second: float | None = None
    teraflops: float | None = None
    of_bf16: float | None = None  # time as a share of the BF16 product's, round by round


def clock_of(device: torch.device) -> Clock:
    """Return a clock that starts with a cold L2 cache, and with the host ahead of the GPU."""
    if device.type != "cuda":
        return host_clock
    flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)

    def cold(run: Callable[[], object]) -> float:
        flushed.zero_()
        return event_clock(run)

    return cold


def casts(ours: Products, values: Tensor) -> Iterator[Contestant]:
    """Yield casts. Bytes: BF16 read, codes and scales of rows, transposed codes, sums."""
    codes = values.numel()
    scales = 4 * (codes // products.TILE)
    both = {"dgrad": True, "wgrad": True}

    def gradient(bias: bool) -> Callable[[], object]:
        return lambda: ours.cast_gradient(values, **both, bias=bias)

    yield Contestant("x, forward only", lambda: ours.cast_input(values, wgrad=False), 3 * codes + scales)
    yield Contestant("x, also for wgrad", lambda: ours.cast_input(values, wgrad=True), 4 * codes + scales)
    yield Contestant("dy", gradient(False), 4 * codes + 2 * scales)
    yield Contestant("dy and its sums", gradient(True), 4 * codes + 2 * scales)
    copy = torch.empty_like(values)
    yield Contestant("BF16 copy", lambda: copy.copy_(values), 4 * codes)


def weights(ours: Products, values: Tensor) -> Iterator[Contestant]:
    rows, columns = values.shape
    device, count, flat = values.device, values.numel(), values.view(-1)
    exponents = torch.zeros(tiles(rows), tiles(columns), dtype=torch.uint8, device=device)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    ours.find_exponents(flat, 0, columns, exponents)
    ours.encode_weight(flat, 0, columns, exponents, codes.view(-1))
    out = torch.empty_like(values)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "find exponents": (lambda: ours.find_exponents(flat, 0, columns, exponents), 2 * count),
        "encode": (lambda: ours.encode_weight(flat, 0, columns, exponents, codes.view(-1)), 3 * count),
        "decode to BF16": (lambda: ours.decode_weight(codes, exponents, out), 3 * count),
        "transpose": (lambda: ours.transpose(codes, exponents), 2 * count),
        "expand exponents": (
            lambda: ours.expand(codes, exponents),
            exponents.nbytes + 4 * prod(scale_shape(rows, columns)),
        ),
    }
    for name, (run, moved) in runs.items():
        yield Contestant(name, run, moved)


def matmuls(x: Tensor, w: Tensor, dy: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the BF16 products of a linear layer."""
    yield "forward", lambda: x @ w.t()
    yield "dgrad", lambda: dy @ w
    yield "wgrad", lambda: dy.t() @ x


def multiplied(left: Operand, right: Operand, bias: Tensor | None) -> Callable[[], object]:
    return lambda: MULTIPLY["cublas"](left, right, bias)


def measured(
    name: str, shape: str, contestants: list[Contestant], rounds: int, clock: Clock
) -> Iterator[Row]:
    """Time passes over memory."""
    times = interleave(contestants, rounds, clock)
    for each in contestants:
        rate = each.moved / times.median(each.name) / 1e9
        yield Row(name, each.name, shape, times.median(each.name) * 1e3, terabytes_per_second=rate)


def measured_products(
    ours: Products,
    model: str,
    layer: str,
    operands: tuple[Tensor, Tensor, Tensor],
    rounds: int,
    clock: Clock,
    with_bias: bool,
) -> Iterator[Row]:
    """Time products by cuBLAS, in BF16 and with FP8's block scales."""
    x, w, dy = operands
    shape = f"{layer}: {len(x)} tokens, {w.shape[1]} -> {w.shape[0]}"
    for name, run in matmuls(x, w, dy):
        pair = pairs(ours, x, w, dy)[name]
        contestants = [Contestant("BF16", run, 0), Contestant("FP8", multiplied(*pair, None), 0)]
        if name == "forward" and with_bias:
            bias = torch.zeros(len(w), dtype=w.dtype, device=w.device)
            contestants.append(Contestant("FP8 with bias", multiplied(*pair, bias), 0))
        times = interleave(contestants, rounds, clock)
        for each in contestants:
            median = times.median(each.name)
            rate = 2 * len(x) * w.numel() / median / 1e9
            share = times.ratio(each.name, "BF16")
            yield Row(model, f"{name}, {each.name}", shape, median * 1e3, teraflops=rate, of_bf16=share)


def rows_of(
    ours: Products, device: torch.device, options: argparse.Namespace, with_bias: bool
) -> Iterator[Row]:
    """Time everything."""
    clock = clock_of(device)
    for model, hidden in {"tiny": 128}.items() if options.tiny else HIDDEN.items():
        for factor in sorted({each for pair in LAYERS.values() for each in pair}):
            values = gaussian(options.tokens, factor * hidden, device=device, seed=factor)
            shape = f"{options.tokens} x {factor * hidden}"
            yield from measured(model, shape, list(casts(ours, values)), options.rounds, clock)
        for layer, (inner, outer) in LAYERS.items():
            shapes = ((options.tokens, inner), (outer * hidden, inner), (options.tokens, outer))
            x, w, dy = (
                gaussian(rows, columns * hidden, device=device, seed=rows) for rows, columns in shapes
            )
            of_weight = list(weights(ours, w))
            yield from measured(
                model, f"{layer}: {w.shape[0]} x {w.shape[1]}", of_weight, options.rounds, clock
            )
            if cublas.obstacle(device) is None:
                yield from measured_products(ours, model, layer, (x, w, dy), options.rounds, clock, with_bias)


def host_microseconds(ours: Products, device: torch.device, repeat: int) -> dict[str, float]:
    """Return the host's time by call, and that of a linear layer's forward and backward."""
    size = 256
    x, w, dy = (gaussian(size, size, device=device, seed=each) for each in range(3))
    way = "emulated" if cublas.obstacle(device) else "cublas"
    operands = pairs(ours, x, w, dy)
    codes = operands["forward"][1].codes
    exponents = torch.full((tiles(size), tiles(size)), 127, dtype=torch.uint8, device=device)
    calls: dict[str, Callable[[], object]] = {
        "cast x": lambda: ours.cast_input(x, wgrad=True),
        "cast dy": lambda: ours.cast_gradient(dy, dgrad=True, wgrad=True, bias=False),
        "transpose": lambda: ours.transpose(codes, exponents),
        **{f"{name}, {way}": partial(MULTIPLY[way], *pair, None) for name, pair in operands.items()},
        "BF16 matmul": lambda: x @ w.t(),
    }
    if ours.multiply_weight is not None:
        calls[f"forward, {way}"] = partial(
            ours.multiply_weight, operands["forward"][0], Weight(codes, exponents), None, False
        )
    found = {name: host_time(run, repeat, device) for name, run in calls.items()}
    found["linear"] = sum(value for name, value in found.items() if name != "BF16 matmul")
    return found


def host_time(run: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Return microseconds of a call that does not wait for the GPU."""
    for _ in range(3):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat * 1e6


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cpu" if options.tiny else "cuda")
    ours, obstacle = triton_products(), cublas.obstacle(device)
    if obstacle is None:  # the calls of a training
        ours, MULTIPLY["cublas"] = by_way("cublas", ours)
    verified = verify(ours, ["emulated"] if obstacle else ["emulated", "cublas"], device, options.tiny)
    for line in (*verified.lines, *(f"WRONG: {each}" for each in verified.wrong)):
        CONSOLE.print(line)
    if obstacle:
        CONSOLE.print(f"no products by cuBLAS: {obstacle}")
    result = {
        "device": "cpu" if options.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "tokens": options.tokens,
        "rounds": options.rounds,
        **asdict(verified),
        "no_cublas": obstacle,
    }
    if verified.wrong and not options.regardless:
        return result | {"rows": [], "host_microseconds": {}}
    with_bias = not any("with bias" in each for each in verified.wrong)
    rows = []
    for row in rows_of(ours, device, options, with_bias):
        rows.append(asdict(row))
        print_row(row)
    host = host_microseconds(ours, device, 1 if options.tiny else 300)
    CONSOLE.print("host, us:", {name: round(value, 1) for name, value in host.items()})
    return result | {"rows": rows, "host_microseconds": host}


def print_row(row: Row) -> None:
    figures = {"TB/s": row.terabytes_per_second, "TFLOP/s": row.teraflops, "of BF16": row.of_bf16}
    shown = "".join(f"{value:10,.3f} {unit}" for unit, value in figures.items() if value is not None)
    CONSOLE.print(f"{row.model:5} {row.shape:36} {row.operation:24} {row.microseconds:10,.1f} us{shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=None, help="default: 8192, or 64 with --tiny")
    parser.add_argument("--rounds", type=int, default=None, help="default: 30, or 1 with --tiny")
    parser.add_argument("--tiny", action="store_true", help="run on the CPU, in Triton's interpreter")
    parser.add_argument(
        "--regardless", action="store_true", help="time everything that runs, even if a check fails"
    )
    parser.add_argument("--out", type=Path, metavar="JSON")
    options = parser.parse_args()
    options.tokens = options.tokens or (64 if options.tiny else 8192)
    options.rounds = options.rounds or (1 if options.tiny else 30)
    result = measure(options)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    if result["wrong"]:
        raise SystemExit(f"{len(result['wrong'])} wrong")


if __name__ == "__main__":
    main()
