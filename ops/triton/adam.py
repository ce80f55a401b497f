"""The Adam sweep on a GPU: `ops.adam.adam_step` as one Triton launch per shard.

Formats are compile-time constants, hyperparameters are not. Which parameter a row belongs to, and so
the key of its random bits, is looked up in a table: the first segment of each tile, and from there over
the few that begin inside the tile. Whether the step is taken, and what the gradient is multiplied with,
is read from device memory: nothing waits for the host.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops import health
from ds_fp8.ops.adam import Segment, Sweep
from ds_fp8.ops.guards import check_segments, check_step
from ds_fp8.ops.rounding import EXP_AVG_SQ, MASTER, signed
from ds_fp8.ops.triton.launching import launch
from ds_fp8.ops.triton.masters import load_masters, store_masters
from ds_fp8.ops.triton.moments import (
    UNIT,
    clamp_first_moment,
    divide,
    first_moment,
    minimum,
    most_registers,
    on_hopper,
    quotient,
    root_and_inverse,
    second_moment,
    store_first_moment,
    store_second_moment,
)
from ds_fp8.ops.triton.rounding import key_of, random_words, row_places
from ds_fp8.ops.triton.tiles import (
    Plan,
    deciding_magnitudes,
    hardware_fp8,
    load_codes,
    load_scales,
    magnitude,
    partials,
    scales_of,
    tile_of,
    tile_rows,
    two_to_the,
)

WARPS = 2
STATE_COUNTS = tl.constexpr(health.STATE_COUNTS)


@triton.jit(do_not_specialize=["v_stream", "p_stream", "multiplier", "odd", "segments"])
def adam_kernel(
    control,  # [2] float32: what the gradient is multiplied with; 0 if the step is skipped
    gradient_codes,
    gradient_scales,
    master_codes,
    master_scales,
    m_codes,
    m_scales,
    v_codes,
    v_scales,
    weights,
    table,  # [3, segments] int32: row with which a segment begins, its block of the parameter, the parameter
    tile_segments,  # [tiles + 1] int32: the segment with which a tile begins
    partial,  # [programs, 3] float64: counts, if COUNT
    amax,  # [3, blocks] int32: of a row's p, m and v: measure: written; write: of the row's tensor
    segments,
    v_stream,  # words of the step's random bits
    p_stream,
    multiplier,  # the last of random words
    odd,  # 1: of odd numbers
    blocks,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    root_beta2,
    quotient_beta,
    step_size,
    root_correction,
    eps,
    decay,  # decoupled: 1 - lr * weight decay; else the weight decay
    clamp,
    SWEEP: tl.constexpr,  # blocks; of tensors, whose v is stored itself, measure, then write
    DECOUPLED: tl.constexpr,
    CLAMPED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COUNT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASTER: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.load(control + 1) == 0.0:
        return
    tile = tl.program_id(0)
    first, rows, offset, inside = tile_rows(blocks, tile, BLOCK, ROWS)
    start = first * BLOCK

    # Load: gradient and moments, as FP32.
    g = load_codes(gradient_codes + start, offset, inside, GRADIENT, HARDWARE)
    m = load_codes(m_codes + start, offset, inside, M, HARDWARE)
    v = load_codes(v_codes + start, offset, inside, V, HARDWARE)
    g_scale = load_scales(gradient_scales + first, rows, inside, GRADIENT)
    m_scale = load_scales(m_scales + first, rows, inside, M)
    v_scale = load_scales(v_scales + first, rows, inside, V)

    unit = two_to_the(UNIT)
    g = g * (g_scale * (tl.load(control) * unit))[:, None]
    masters, p_scales, w = master_codes + start, master_scales + first, weights + start
    if not DECOUPLED:
        p = load_masters(
            masters,
            p_scales,
            weights=w,
            rows=rows,
            offset=offset,
            inside=inside,
            factor=1.0,
            FORMAT=MASTER,
            HARDWARE=HARDWARE,
        )
        g = g + p * (decay * unit)

    # Update: m and v after the step, and what it takes from p.
    v, root = second_moment(v, v_scale, unit * unit * beta2, unit * root_beta2, M, V, SWEEP)
    m = first_moment(m, m_scale, beta1 * unit, quotient_beta, root, M) + g * one_minus_beta1
    v = minimum(v + g * g * one_minus_beta2, 3.4028234663852886e38)
    root, inverse = root_and_inverse(v)
    m_unclamped = m
    m, m_magnitudes = clamp_first_moment(m, root * clamp, CLAMPED)
    clamped = tl.abs(m_unclamped) > tl.abs(m)
    update = divide(m, root * root_correction + eps * unit) * step_size
    if M == "int8":
        m = quotient(m, root, inverse)
        parameter, first_element = row_places(first, rows, table, tile_segments, tile, segments, BLOCK)

    # Magnitudes that decide scales, of a row or of its tensor.
    amax += first
    m_magnitudes = deciding_magnitudes(m_magnitudes, amax + blocks, rows, inside, SWEEP)
    v_magnitudes = deciding_magnitudes(magnitude(v), amax + 2 * blocks, rows, inside, SWEEP)

    # Store: m and v.
    place = partial + tile * STATE_COUNTS
    random = offset  # not read: of states that are rounded to nearest
    if M == "int8":
        random = random_words(key_of(v_stream, parameter), first_element, multiplier, odd, BLOCK)
    if SWEEP != "measure":
        store_first_moment(
            m,
            m_magnitudes,
            random,
            clamped=clamped,
            place=place,
            codes=m_codes + start,
            scales=m_scales + first,
            rows=rows,
            offset=offset,
            inside=inside,
            COUNT=COUNT,
            FORMAT=M,
            HARDWARE=HARDWARE,
        )
        if V != "fp32" and SWEEP == "blocks" and M != "int8":
            parameter, first_element = row_places(first, rows, table, tile_segments, tile, segments, BLOCK)
            random = random_words(key_of(v_stream, parameter), first_element, multiplier, odd, BLOCK)
        store_second_moment(
            v,
            v_magnitudes,
            random,
            root=root,
            place=place,
            codes=v_codes + start,
            scales=v_scales + first,
            rows=rows,
            offset=offset,
            inside=inside,
            COUNT=COUNT,
            FORMAT=V,
            SWEEP=SWEEP,
            HARDWARE=HARDWARE,
        )

    # The master, with its weight: loaded only now, since registers decide how many warps run at a time.
    p = load_masters(
        masters,
        p_scales,
        weights=w,
        rows=rows,
        offset=offset,
        inside=inside,
        factor=decay if DECOUPLED else 1.0,
        FORMAT=MASTER,
        HARDWARE=HARDWARE,
    )
    p = p - update
    p_magnitudes = deciding_magnitudes(magnitude(p), amax, rows, inside, SWEEP)
    if SWEEP == "measure":
        return
    if STOCHASTIC:
        if M != "int8":
            parameter, first_element = row_places(first, rows, table, tile_segments, tile, segments, BLOCK)
        random = random_words(key_of(p_stream, parameter), first_element, multiplier, odd, BLOCK)
    store_masters(
        p,
        p_magnitudes,
        random,
        codes=masters,
        scales=p_scales,
        weights=w,
        rows=rows,
        offset=offset,
        inside=inside,
        FORMAT=MASTER,
        STOCHASTIC=STOCHASTIC,
        HARDWARE=HARDWARE,
    )


def plan(segments: Sequence[Segment], blocks: int, block_size: int, device: torch.device) -> Plan:
    """`ops.adam.plan`."""
    check_segments(segments, blocks)
    return Plan.of(segments, blocks, block_size, WARPS, device)


def adam_step(sweep: Sweep) -> None:
    """`ops.adam.adam_step` in one launch."""
    if len(sweep.gradient):
        launch_sweep(sweep, "blocks", sweep.plan.table)


def launch_sweep(sweep: Sweep, which: str, amax: Tensor) -> None:
    """which: SWEEP of `adam_kernel`; amax: as the kernel has it."""
    check_step(sweep, sweep.plan.blocks)
    s, state, gradient, plan = sweep.scalars, sweep.state, sweep.gradient, sweep.plan
    rows, programs = tile_of(len(gradient), gradient.block_size, WARPS)
    partial = partials(sweep.counts, programs, plan.table)
    launch(
        adam_kernel,
        programs,
        WARPS,
        control=sweep.control,
        gradient_codes=gradient.codes,
        gradient_scales=scales_of(gradient),
        master_codes=state.master.codes,
        master_scales=scales_of(state.master),
        m_codes=state.exp_avg.codes,
        m_scales=scales_of(state.exp_avg),
        v_codes=state.exp_avg_sq.codes,
        v_scales=scales_of(state.exp_avg_sq),
        weights=sweep.weights,
        table=plan.table,
        tile_segments=plan.tile_segments,
        partial=partial,
        amax=amax,
        segments=plan.table.shape[1],
        v_stream=signed(sweep.rounding.stream(s.step, EXP_AVG_SQ)),
        p_stream=signed(sweep.rounding.stream(s.step, MASTER)),
        multiplier=signed(sweep.rounding.multiplier(s.step)),
        odd=int(sweep.rounding.spread),
        blocks=len(gradient),
        **s.factors(quotient=state.stores_quotient),
        eps=s.eps,
        clamp=s.clamp or 0.0,
        SWEEP=which,
        DECOUPLED=s.decoupled,
        CLAMPED=s.clamp is not None,
        STOCHASTIC=sweep.rounding.stochastic,
        COUNT=sweep.counts is not None,
        GRADIENT=gradient.format.name,
        MASTER=state.master.format.name,
        M=state.exp_avg.format.name,
        V=state.exp_avg_sq.format.name,
        HARDWARE=hardware_fp8(sweep.weights.device),
        BLOCK=gradient.block_size,
        ROWS=rows,
        maxnreg=most_registers(
            state.exp_avg.format.name, sweep.rounding.stochastic, on_hopper(sweep.weights)
        ),
    )
    if sweep.counts is not None:
        sweep.counts.add_(partial.sum(dim=0))
