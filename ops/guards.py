"""Checks before kernels are given raw pointers: past the end of a tensor lies other memory.

They are a few comparisons of integers per op, whatever its length. The reference needs none: torch checks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamState, Segment, Sweep
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import E4M3, INT8, UE4M4
from ds_fp8.ops.health import GRADIENT_COUNTS, STATE_COUNTS
from ds_fp8.ops.products import TILE, TOKENS, tiles
from ds_fp8.ops.weight_runs import Run

BLOCK_SIZES = (32, 64, 128, 256)
VALUES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED = ("fp16", "bf16", "split8")  # masters that lose bits, and so may lose them stochastically
MASTERS = ("fp32", "split16", *ROUNDED)
E8M0 = (torch.uint8,)
E8M0_OR_FP32 = (torch.uint8, torch.float32)


def check_quantize(values: Tensor, out: Blocks, counts: Tensor | None) -> None:
    """Before `ops.blocks.quantize`."""
    _tensor("values", values, out.codes.device, VALUES)
    most = out.codes.numel()
    if values.numel() > most:
        raise _refusal("values", f"{values.numel()} elements", f"at most {most}, as `out` has")
    _blocks("out", out, values.device)
    _format("out", out, out.format.dtype.is_floating_point)
    _counts(counts, GRADIENT_COUNTS, values.device)


def check_dequantize(blocks: Blocks, out: Tensor) -> None:
    """Before `ops.blocks.dequantize`."""
    _tensor("out", out, blocks.codes.device, VALUES)
    _blocks("blocks", blocks, out.device)
    _format("blocks", blocks, not blocks.format.split)


def check_accumulate(pieces: Sequence[Blocks], shard: Blocks) -> None:
    """Before `ops.reduction.accumulate`."""
    device = shard.codes.device
    _blocks("shard", shard, device)
    _format("shard", shard, shard.format.dtype.is_floating_point)
    if not pieces:
        raise _refusal("pieces", "none", "one per rank")
    for number, piece in enumerate(pieces):
        _blocks(f"pieces[{number}]", piece, device)
        _format(f"pieces[{number}]", piece, piece.format.dtype.is_floating_point)
        _same(f"pieces[{number}]", piece.codes.shape, shard.codes.shape, "the shard's shape")
        _same(f"pieces[{number}]", piece.format.name, pieces[0].format.name, "the first piece's format")


def check_segments(segments: Sequence[Segment], blocks: int) -> None:
    """Before a plan of a shard of `blocks` blocks is made."""
    for segment in segments:
        first, last = segment.blocks.start, segment.blocks.stop
        if not 0 <= first <= last <= blocks:
            raise _refusal("segment", f"blocks {first} to {last}", f"0 to {blocks}")


def check_distances(tensors: Sequence[Tensor]) -> None:
    """Before a kernel looks for pieces at equal distances in one buffer."""
    first, second = tensors[0], tensors[min(1, len(tensors) - 1)]
    stride = second.storage_offset() - first.storage_offset()
    for number, piece in enumerate(tensors):
        apart = piece.storage_offset() - first.storage_offset()
        _same(f"pieces[{number}]", apart, number * stride, "elements from the first, at equal distances")
        if piece.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            raise _refusal(f"pieces[{number}]", "a buffer of its own", "one buffer for all pieces")


def check_step(sweep: Sweep, planned: int) -> None:
    """Before `ops.adam.adam_step`. planned: rows that the plan was made for."""
    gradient, device, shape = sweep.gradient, sweep.weights.device, sweep.gradient.codes.shape
    _blocks("gradient", gradient, device, E8M0_OR_FP32)
    _format("gradient", gradient, gradient.format.dtype.is_floating_point)
    _states(sweep.state, device, shape, sweep.rounding.stochastic)
    _same("weights", sweep.weights.shape, shape, "the gradient's shape")
    allowed = (torch.bfloat16,) if sweep.state.master.format.split else VALUES
    _tensor("weights", sweep.weights, device, allowed)
    _same("plan", planned, len(gradient), "the gradient's rows")
    _tensor("control", sweep.control, device, (torch.float32,))
    _same("control", sweep.control.numel(), 2, "elements")
    _counts(sweep.counts, STATE_COUNTS, device)


def check_cast(name: str, values: Tensor) -> None:
    """Before `ops.products.cast_input` and `cast_gradient`."""
    if values.dtype is not torch.bfloat16:
        raise _refusal(name, values.dtype, torch.bfloat16)
    if values.dim() != 2 or values.shape[1] % TOKENS or not values.shape[1]:
        raise _refusal(name, f"shape {tuple(values.shape)}", f"[tokens, a multiple of {TOKENS}]")
    if values.stride(1) != 1:
        raise _refusal(name, f"strides {values.stride()}", "adjacent features, a stride of 1")


def check_run(
    values: Tensor, first: int, columns: int, exponents: Tensor, codes: Tensor | None = None
) -> None:
    """Before `ops.products.find_exponents` and `encode_weight`."""
    _tensor("values", values, exponents.device, (torch.bfloat16,))
    _tensor("exponents", exponents, values.device, E8M0)
    if columns < 1 or exponents.dim() != 2 or exponents.shape[1] != tiles(columns):
        raise _refusal("exponents", f"shape {tuple(exponents.shape)}", f"[tiles, tiles of {columns} columns]")
    most = exponents.shape[0] * TILE * columns
    if not 0 <= first <= most - values.numel():
        raise _refusal("first", f"{first} with {values.numel()} values", f"0 to {most} for both")
    if codes is not None:
        _tensor("codes", codes, values.device, (E4M3.dtype,))
        _same("codes", codes.numel(), values.numel(), "as many as values")


def check_decode(codes: Tensor, exponents: Tensor, out: Tensor) -> None:
    """Before `ops.products.decode_weight`."""
    check_weight(codes, exponents)
    _tensor("out", out, codes.device, (torch.bfloat16, torch.float32))
    _same("out", out.shape, codes.shape, "the codes' shape")


def check_weight(codes: Tensor, exponents: Tensor) -> None:
    """Before `ops.products.transpose` or `expand`."""
    _tensor("codes", codes, codes.device, (E4M3.dtype,))
    if codes.dim() != 2 or not codes.numel():
        raise _refusal("codes", f"shape {tuple(codes.shape)}", "[rows, columns] of a matrix")
    _tensor("exponents", exponents, codes.device, E8M0)
    rows, columns = codes.shape
    _same("exponents", tuple(exponents.shape), (tiles(rows), tiles(columns)), "a byte per tile")


class Ends(NamedTuple):
    """Where the runs of weights end: the least lengths of their vectors."""

    values: int
    exponents: int
    codes: int


def check_runs(runs: Sequence[Run]) -> Ends:
    """Before `ops.weight_runs.WeightRuns` is used."""
    for run in runs:
        grid = run.grid
        down, across = grid.shape
        if across != tiles(grid.columns) or grid.place.stop - grid.place.start != down * across:
            raise _refusal(
                "grid", f"{grid.shape} at {grid.place}", f"[tiles, tiles of {grid.columns} columns]"
            )
        most = down * TILE * grid.columns
        if min(run.first, run.values, run.codes) < 0 or not 0 < run.count <= most - run.first:
            raise _refusal("run", f"{run.count} values from {run.first} on", f"1 to {most} from 0 on")
    return Ends(
        max((run.values + run.count for run in runs), default=0),
        max((run.grid.place.stop for run in runs), default=0),
        max((run.codes + run.count for run in runs), default=0),
    )


def check_vectors(ends: Ends, values: Tensor, exponents: Tensor, codes: Tensor | None = None) -> None:
    """Before a function of `ops.weight_runs.WeightRuns`."""
    device = exponents.device
    for name, tensor, least, dtype in (
        ("values", values, ends.values, torch.bfloat16),
        ("exponents", exponents, ends.exponents, torch.uint8),
        ("codes", codes, ends.codes, E4M3.dtype),
    ):
        if tensor is not None:
            _tensor(name, tensor, device, (dtype,))
            if tensor.numel() < least:
                raise _refusal(name, f"{tensor.numel()} elements", f"{least} or more")


def _states(state: AdamState, device: torch.device, shape: torch.Size, stochastic: bool) -> None:
    for name in ("master", "exp_avg", "exp_avg_sq"):
        blocks: Blocks = getattr(state, name)
        _blocks(name, blocks, device)
        _same(name, blocks.codes.shape, shape, "the gradient's shape")
    _format("master", state.master, state.master.format.name in (ROUNDED if stochastic else MASTERS))
    whole = state.stores_sqrt and state.exp_avg.format is INT8
    _format("exp_avg", state.exp_avg, state.exp_avg.format.dtype.is_floating_point or whole)
    unsigned = state.stores_sqrt and state.exp_avg_sq.format is UE4M4
    _format("exp_avg_sq", state.exp_avg_sq, state.exp_avg_sq.format.dtype.is_floating_point or unsigned)


def _blocks(
    name: str, blocks: Blocks, device: torch.device, scale_dtypes: Sequence[torch.dtype] = E8M0
) -> None:
    codes, scales = blocks.codes, blocks.scales
    _tensor(name, codes, device, (blocks.format.dtype,))
    if codes.dim() != 2 or codes.shape[1] not in BLOCK_SIZES:
        shape = f"[blocks, block size] of a block size among {BLOCK_SIZES}"
        raise _refusal(name, f"codes of shape {tuple(codes.shape)}", shape)
    if blocks.format.scaled:
        if scales is None or scales.shape != codes.shape[:1]:
            raise _refusal(name, f"{0 if scales is None else scales.numel()} scales", "one per block")
        _tensor(name, scales, device, scale_dtypes)


def _format(name: str, blocks: Blocks, fits: bool) -> None:
    if not fits:
        raise _refusal(name, blocks.format.name, "a format that this operation reads or writes")


def _counts(counts: Tensor | None, size: int, device: torch.device) -> None:
    if counts is not None:
        _tensor("counts", counts, device, (torch.float64,))
        _same("counts", counts.numel(), size, "elements")


def _tensor(name: str, tensor: Tensor, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        raise _refusal(name, tensor.dtype, " or ".join(map(str, dtypes)))
    if tensor.device != device:
        raise _refusal(name, tensor.device, device)
    if not tensor.is_contiguous():
        raise _refusal(name, f"strides {tensor.stride()}", "a contiguous tensor")


def _same(name: str, received: object, allowed: object, what: str) -> None:
    if received != allowed:
        raise _refusal(name, received, f"{allowed}, {what}")


def _refusal(name: str, received: object, allowed: object) -> ValueError:
    return ValueError(f"{name}: received {received}, allowed: {allowed}")
