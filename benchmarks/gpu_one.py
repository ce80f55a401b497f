"""The kernels on one GPU: compared with the reference, then timed beside their peers and a plain copy.

    python benchmarks/gpu_one.py --json gpu_one.json
    DS_FP8_BACKEND=triton TRITON_INTERPRET=1 python benchmarks/gpu_one.py --parameters 8192   # without a GPU

Peers: torch's fused FP32 AdamW, DeepSpeed's FusedAdam if it builds, torchao's AdamWFp8 if installed.
Each also writes the BF16 weights, as the sweep does. The limit is a device-to-device copy, counting
bytes read and written. Kernel times are medians between CUDA events after a warm-up of half a second.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from operations import accumulated, quantized, swept
from rich.console import Console
from rich.table import Table
from timing import event_clock, host_clock
from torch import Tensor
from verify import verify

from ds_fp8.ops.backend import choose


@dataclass(frozen=True)
class Row:
    """One timed operation."""

    name: str
    milliseconds: float
    bytes_moved: int
    of_copy: float  # share of the copy's bandwidth


class Clock:
    """Medians of an operation's time, by CUDA events, or by the host's clock without a GPU."""

    def __init__(self, device: torch.device, repeat: int) -> None:
        self._cuda = device.type == "cuda"
        self._repeat = repeat

    def milliseconds(self, operation: Callable[[], object]) -> float:
        warm_until = time.perf_counter() + (0.5 if self._cuda else 0.0)
        operation()
        while time.perf_counter() < warm_until:
            operation()
            torch.cuda.synchronize()
        once = event_clock if self._cuda else host_clock
        return statistics.median(once(operation) for _ in range(self._repeat))


def copy_bandwidth(clock: Clock, device: torch.device, size: int) -> float:
    """Return bytes per second, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / clock.milliseconds(lambda: target.copy_(source)) * 1000


def peers(size: int, device: torch.device, skipped: list[str]) -> Iterator[tuple[str, Any, int]]:
    """Yield FP32 AdamWs that also write BF16 weights; 30 bytes per parameter."""
    parameter = torch.nn.Parameter(torch.randn(size, device=device))
    parameter.grad = torch.randn(size, device=device) * 1e-3
    weights = torch.zeros(size, dtype=torch.bfloat16, device=device)
    for name, make in {
        "torch AdamW fused": torch_adamw,
        "DeepSpeed FusedAdam": fused_adam,
        "torchao AdamWFp8": adamw_fp8,
    }.items():
        try:
            optimizer = make(parameter)
            optimizer.step()
        except Exception as error:  # a peer that does not build here is listed with its reason
            skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue

        def step(optimizer: Any = optimizer) -> None:
            optimizer.step()
            weights.copy_(parameter.detach())

        yield f"{name}, then bf16 weights", step, 0 if "Fp8" in name else 34 * size
        optimizer.state.clear()


def torch_adamw(parameter: Tensor) -> Any:
    return torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), fused=True)


def fused_adam(parameter: Tensor) -> Any:
    if not parameter.is_cuda:
        raise RuntimeError("needs a GPU")
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam([parameter], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)


def adamw_fp8(parameter: Tensor) -> Any:
    from torchao.optim import AdamWFp8

    return AdamWFp8([parameter], lr=1e-3, betas=(0.9, 0.95))


def measure(size: int, repeat: int, device: torch.device, sweeps: bool) -> dict[str, Any]:
    backend, clock = choose(device), Clock(device, repeat)
    skipped: list[str] = []
    verified = verify(backend, device, sweeps)
    bandwidth = copy_bandwidth(clock, device, 4 * size)
    rows = []
    for make in (swept,) if sweeps else (quantized, accumulated, swept):
        rows += [timed(clock, bandwidth, *each) for each in make(backend, size, device)]
    if not sweeps:
        rows += [timed(clock, bandwidth, *each) for each in peers(size, device, skipped)]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "parameters": size,
        "kernels": backend.name,
        "verified": verified,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "rows": [asdict(row) for row in rows],
        "skipped_peers": skipped,
    }


def timed(clock: Clock, bandwidth: float, name: str, operation: Callable[[], object], moved: int) -> Row:
    milliseconds = clock.milliseconds(operation)
    return Row(name, milliseconds, moved, moved / milliseconds * 1000 / bandwidth)


def print_result(result: dict[str, Any]) -> None:
    console = Console(width=110)
    for line in result["verified"]:
        console.print(line)
    table = Table(title=f"{result['device']}, {result['parameters']:,} parameters")
    for column in ("operation", "ms", "bytes per parameter", "of a copy's bandwidth"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    table.add_row("device-to-device copy", "", "", f"{result['copy_gigabytes_per_second']:,.0f} GB/s")
    for row in result["rows"]:
        share = [f"{row['bytes_moved'] / result['parameters']:.2f}", f"{row['of_copy']:.3f}"]
        table.add_row(row["name"], f"{row['milliseconds']:.2f}", *(share if row["bytes_moved"] else ["", ""]))
    console.print(table)
    for line in result["skipped_peers"]:
        console.print(f"not run: {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=1 << 30, help="a multiple of 1024")
    parser.add_argument("--repeat", type=int, default=31 if torch.cuda.is_available() else 1)
    parser.add_argument("--sweeps", action="store_true", help="only Adam's sweeps; int8 exp_avg is verified")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    if arguments.parameters < 1024 or arguments.parameters % 1024:
        parser.error(f"--parameters: received {arguments.parameters}, allowed: multiples of 1024")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(arguments.parameters, arguments.repeat, device, arguments.sweeps)
    print_result(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
