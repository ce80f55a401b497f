"""The operations that the benchmarks time, on vectors of any size and device: one list for CPU and GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_fp8.config.section import ROUNDED
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import E4M3, FP16, FP32, INT8, SPLIT16, UE4M4, Format
from ds_fp8.ops.rounding import Rounding

BLOCK = 128
LEVELS = {  # master, exp_avg, exp_avg_sq
    "O1": (FP32, FP32, FP32),
    "O2": (FP16, INT8, FP16),
    "O2+": (SPLIT16, INT8, UE4M4),
    "O2 of e4m3": (FP16, E4M3, FP16),
    "O2+ of e4m3": (SPLIT16, E4M3, UE4M4),
}

Operation = tuple[str, Any, int]  # its name, the function to time, bytes read and written


def gradients(size: int, device: torch.device) -> Tensor:
    """Random BF16 of a gradient's magnitude, made without a float32 vector of that length."""
    piece = torch.randn(min(size, 1 << 24), device=device).mul_(1e-3).bfloat16()
    return piece.repeat(-(-size // len(piece)))[:size]


def zeros(fmt: Format, blocks: int, device: torch.device) -> Blocks:
    return Blocks.zeros(blocks, BLOCK, fmt, device)


def quantized(backend: Backend, size: int, device: torch.device) -> Iterator[Operation]:
    source, target = gradients(size, device), zeros(E4M3, size // BLOCK, device)
    moved = source.nbytes + target.nbytes
    yield "quantize bf16 to e4m3", lambda: backend.quantize(source, target), moved
    values = torch.empty(size, dtype=torch.bfloat16, device=device)
    yield "dequantize e4m3 to bf16", lambda: backend.dequantize(target, values), moved


def accumulated(backend: Backend, size: int, device: torch.device) -> Iterator[Operation]:
    for ranks in (2, 8):
        blocks = size // BLOCK // ranks
        codes = zeros(E4M3, ranks * blocks, device)
        backend.quantize(gradients(ranks * blocks * BLOCK, device), codes)
        pieces = [codes[slice(rank * blocks, (rank + 1) * blocks)] for rank in range(ranks)]
        for fmt in (E4M3, FP32):
            shard = zeros(fmt, blocks, device)
            yield (
                f"decode and sum {ranks} ranks into {fmt.name}",
                lambda pieces=pieces, shard=shard: backend.accumulate(pieces, shard, overwrite=True),
                codes.nbytes + shard.nbytes,
            )


def sweep(
    backend: Backend,
    formats: tuple[Format, Format, Format],  # of master, exp_avg and exp_avg_sq
    gradient: Blocks,
    weights: Tensor,  # [blocks, block size] bfloat16, read and overwritten
    scalars: Callable[[], AdamScalars],  # of the next step
    control: Tensor,
) -> tuple[Callable[[], None], int, int]:
    """Return a function that runs one Adam sweep, bytes read and written, and bytes of state."""
    blocks, device = len(gradient), weights.device
    segments = [Segment(slice(0, blocks // 3), 0, 0), Segment(slice(blocks // 3, blocks), 1, 0)]
    plan = backend.plan(segments, blocks, BLOCK, device)
    state = AdamState(*(zeros(fmt, blocks, device) for fmt in formats))
    if not state.master.format.split:
        backend.quantize(weights.view(-1), state.master)
    rounding = Rounding(0, state.master.format.name in ROUNDED, spread=state.stores_quotient)
    held = sum(each.nbytes for each in (state.master, state.exp_avg, state.exp_avg_sq))

    def run() -> None:
        backend.adam_step(Sweep(state, gradient, weights, plan, scalars(), control, rounding))

    read = weights.nbytes if state.master.format.split else 0
    return run, 2 * held + gradient.nbytes + weights.nbytes + read, held


def swept(backend: Backend, size: int, device: torch.device) -> Iterator[Operation]:
    blocks = size // BLOCK
    control = torch.tensor([0.5, 1.0], device=device)
    for level, formats in LEVELS.items():
        gradient = zeros(E4M3, blocks, device)
        backend.quantize(gradients(size, device), gradient)
        weights = gradients(size, device).view(blocks, BLOCK)
        scalars = AdamScalars(10, 1e-3, 0.9, 0.95, 1e-8, 0.1, True, True, None if level == "O1" else 1.165)
        run, moved, _ = sweep(backend, formats, gradient, weights, lambda fixed=scalars: fixed, control)
        yield f"sweep {level}, writes bf16 weights", run, moved
