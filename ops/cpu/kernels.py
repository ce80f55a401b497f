"""The ops on a CPU: `ops.blocks`, `ops.reduction` and `ops.adam` in C++ (`csrc/`), bit for bit.

Tensors go in as pointers, through ctypes, which lets other threads of Python run meanwhile. The processor
chooses the instruction set; DS_FP8_CPU_ISA overrides it.
"""

import ctypes
import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops import guards
from ds_fp8.ops.adam import AdamScalars, Segment, Sweep
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.cpu import build
from ds_fp8.ops.cpu.structures import CBlocks, CRun, CScalars, CSegment, CSweep, CValues
from ds_fp8.ops.cpu.threads import thread_count
from ds_fp8.ops.formats import BY_NAME
from ds_fp8.ops.moments import UNIT
from ds_fp8.ops.reduction import NORM_PARTS
from ds_fp8.ops.rounding import EXP_AVG_SQ, MASTER

VARIABLE = "DS_FP8_CPU_ISA"
FORMATS = {fmt: index for index, fmt in enumerate(BY_NAME.values())}  # the order of csrc/formats.h
DTYPES = {fmt.dtype: index for fmt, index in FORMATS.items() if fmt.dtype.is_floating_point}


@dataclass(frozen=True)
class Plan:
    """The segments of a shard, as the kernel reads them."""

    segments: ctypes.Array[CSegment]
    blocks: int


class Kernels:
    """The compiled functions of one instruction set."""

    def __init__(self, library: ctypes.CDLL, isa: str) -> None:
        def function(name: str, *arguments: Any) -> Any:
            compiled = getattr(library, f"{name}_{isa}")
            compiled.argtypes, compiled.restype = arguments, None
            return compiled

        blocks, values, run = POINTER(CBlocks), POINTER(CValues), POINTER(CRun)
        self.isa = isa
        quantize = (values, c_int64, blocks, c_int64, c_int32, c_int32, c_void_p)
        accumulate = (blocks, c_int32, blocks, c_int32, c_int64, c_int32, c_int32, c_void_p)
        step = (POINTER(CSweep), c_int32)
        self.dequantize = function("dequantize", blocks, values, c_int64, c_int32, c_int32)
        self.quantize = function("quantize", *quantize)
        self.accumulate = function("accumulate", *accumulate)
        self.adam_step = function("adam_step", *step)
        self.quantize_tensor = function("quantize_tensor", *quantize)
        self.accumulate_tensor = function("accumulate_tensor", *accumulate)
        self.step_tensors = function("step_tensors", *step)
        self.find_exponents = function("find_exponents", c_void_p, run, c_void_p, c_int32)
        self.encode_weight = function("encode_weight", c_void_p, run, c_void_p, c_void_p, c_int32)
        self.decode_weight = function("decode_weight", c_void_p, run, c_void_p, values, c_int32)


@functools.cache
def _library() -> ctypes.CDLL:
    path = build.library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"{path} does not load: {error}") from error
    library.best_isa.restype = c_char_p
    return library


@functools.cache
def kernels(isa: str | None) -> Kernels:
    """The kernels of an instruction set; of the processor's best if None.

    Raises `ops.cpu.build.BuildError` if they cannot be built, ValueError for a set that is not compiled or
    that the processor lacks.
    """
    library = _library()
    best: str = library.best_isa().decode()
    sets = list(build.instruction_sets())
    allowed = sets[sets.index(best) :]
    if isa is not None and isa not in allowed:
        raise ValueError(f"{VARIABLE}: received {isa!r}, allowed on this processor: {', '.join(allowed)}")
    return Kernels(library, isa or best)


def load() -> Kernels:
    """The kernels that the environment and the processor choose; `kernels` says what it raises."""
    return kernels(os.environ.get(VARIABLE))


def _blocks(blocks: Blocks) -> CBlocks:
    scales = None if blocks.scales is None else blocks.scales.data_ptr()
    return CBlocks(blocks.codes.data_ptr(), scales, FORMATS[blocks.format])


def c_values(values: Tensor) -> CValues:
    return CValues(values.data_ptr(), DTYPES[values.dtype])


@contextmanager
def _counted(counts: Tensor | None) -> Iterator[int | None]:
    """The address of zeros, one row of counts per thread; at the end they are added to the counts."""
    if counts is None:
        yield None
        return
    by_thread = torch.zeros(thread_count(), counts.numel(), dtype=torch.float64)
    yield by_thread.data_ptr()
    counts += by_thread.sum(dim=0)


def quantize(values: Tensor, out: Blocks, counts: Tensor | None = None) -> None:
    """`ops.blocks.quantize`."""
    _quantize(load().quantize, values, out, counts)


def quantize_tensor(values: Tensor, out: Blocks, counts: Tensor | None = None) -> None:
    """`ops.per_tensor.quantize`."""
    _quantize(load().quantize_tensor, values, out, counts)


def _quantize(kernel: Any, values: Tensor, out: Blocks, counts: Tensor | None) -> None:
    guards.check_quantize(values, out, counts)
    with _counted(counts) as address:
        kernel(
            byref(c_values(values)),
            values.numel(),
            byref(_blocks(out)),
            len(out),
            out.block_size,
            thread_count(),
            address,
        )


def dequantize(blocks: Blocks, out: Tensor) -> None:
    """`ops.blocks.dequantize`."""
    guards.check_dequantize(blocks, out)
    count = min(out.numel(), blocks.codes.numel())
    load().dequantize(byref(_blocks(blocks)), byref(c_values(out)), count, blocks.block_size, thread_count())


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, overwrite: bool) -> Tensor:
    """`ops.reduction.accumulate`."""
    return _accumulate(load().accumulate, pieces, shard, overwrite)


def accumulate_tensor(pieces: Sequence[Blocks], shard: Blocks, *, overwrite: bool) -> Tensor:
    """`ops.per_tensor.accumulate`."""
    return _accumulate(load().accumulate_tensor, pieces, shard, overwrite)


def _accumulate(kernel: Any, pieces: Sequence[Blocks], shard: Blocks, overwrite: bool) -> Tensor:
    guards.check_accumulate(pieces, shard)
    threads = thread_count()
    parts = torch.zeros(threads, NORM_PARTS, dtype=torch.int64)
    array = (CBlocks * len(pieces))(*map(_blocks, pieces))
    rows, size = len(shard), shard.block_size
    kernel(array, len(pieces), byref(_blocks(shard)), overwrite, rows, size, threads, parts.data_ptr())
    return parts.sum(dim=0)


def plan(segments: Sequence[Segment], blocks: int, block_size: int, device: torch.device) -> Plan:
    """`ops.adam.plan`: the segments as the kernel reads them."""
    guards.check_segments(segments, blocks)
    rows = [CSegment(s.blocks.start, s.blocks.stop, s.first_element, s.parameter) for s in segments]
    return Plan((CSegment * len(rows))(*rows), blocks)


def adam_step(sweep: Sweep) -> None:
    """`ops.adam.adam_step`."""
    _step(load().adam_step, sweep)


def step_tensors(sweep: Sweep) -> None:
    """`ops.per_tensor.adam_step`."""
    _step(load().step_tensors, sweep)


def _step(kernel: Any, sweep: Sweep) -> None:
    guards.check_step(sweep, sweep.plan.blocks)
    with _counted(sweep.counts) as address:
        kernel(byref(_sweep(sweep, address)), thread_count())


def _sweep(sweep: Sweep, counts: int | None) -> CSweep:
    """counts: their address."""
    state, plan, rounding, step = sweep.state, sweep.plan, sweep.rounding, sweep.scalars.step
    return CSweep(
        gradient=_blocks(sweep.gradient),
        master=_blocks(state.master),
        exp_avg=_blocks(state.exp_avg),
        exp_avg_sq=_blocks(state.exp_avg_sq),
        gradient_scales=_fine_scales(sweep.gradient),
        weights=c_values(sweep.weights),
        segments=ctypes.addressof(plan.segments),
        segment_count=len(plan.segments),
        counts=counts,
        control=sweep.control.data_ptr(),
        exp_avg_sq_stream=rounding.stream(step, EXP_AVG_SQ),
        master_stream=rounding.stream(step, MASTER),
        multiplier=rounding.multiplier(step),
        odd=rounding.spread,
        block_size=sweep.gradient.block_size,
        stochastic=sweep.rounding.stochastic,
        stores_sqrt=state.stores_sqrt,
        scalars=_scalars(sweep.scalars, state.stores_quotient),
    )


def _scalars(s: AdamScalars, quotient: bool) -> CScalars:
    clamp = math.inf if s.clamp is None else s.clamp
    return CScalars(**s.factors(quotient=quotient), eps=s.eps * UNIT, clamp=clamp, decoupled=s.decoupled)


def _fine_scales(blocks: Blocks) -> int | None:
    """The address of scales that are FP32."""
    fine = blocks.scales is not None and blocks.scales.is_floating_point()
    return blocks.scales.data_ptr() if fine and blocks.scales is not None else None
