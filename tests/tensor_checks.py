"""One scale per tensor: kernels beside the reference, for the tests of Triton and C++ both."""

import random
from dataclasses import replace
from itertools import accumulate

import torch
from kernel_support import CPU, Kernels, assert_same, assert_same_blocks, dirty, inner, to
from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import TENSOR_REFERENCE
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BY_NAME, E4M3, Format
from ds_fp8.ops.health import GRADIENT_COUNTS, STATE_COUNTS
from ds_fp8.ops.rounding import Rounding
from ds_fp8.zero_fp8.gradients.exchange import blocks_in
from ds_fp8.zero_fp8.placement.messages import Message
from ds_fp8.zero_fp8.recipe import weight_dtypes


def values(numel: int, seed: int, spread: float = 6.0) -> Tensor:
    """Of many sizes; zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(spread * torch.randn(numel, generator=generator))
    return torch.randn(numel, generator=generator) * sizes * (torch.rand(numel, generator=generator) > 0.05)


def quantized(numel: int, fmt: Format, block_size: int, seed: int) -> Blocks:
    out = Blocks.zeros(-(-numel // block_size), block_size, fmt, CPU)
    TENSOR_REFERENCE.quantize(values(numel, seed), out)
    return out


def check_quantize(kernels: Kernels, fmt: Format, numel: int, seed: int) -> None:
    """Nothing but the tensor's own rows is written; inf and NaN make all of it not finite."""
    for bad in (None, torch.inf, torch.nan):
        vector = values(numel, seed).to(torch.bfloat16 if seed % 2 else torch.float32)
        if bad is not None:
            vector[numel // 2] = bad
        expected = dirty(-(-numel // 64), 64, fmt)
        found = to(expected, kernels.device)
        counts = torch.zeros(GRADIENT_COUNTS, dtype=torch.float64)
        ours = counts.to(kernels.device, copy=True)
        TENSOR_REFERENCE.quantize(vector, inner(expected), counts)
        kernels.ops.quantize(vector.to(kernels.device), inner(found), ours)
        assert_same_blocks(found, expected, f"{numel} with {bad}")
        if fmt.scaled:
            torch.testing.assert_close(ours.cpu(), counts, rtol=1e-12, atol=0)


def check_accumulate(kernels: Kernels, fmt: Format, numel: int, *, overwrite: bool) -> None:
    message = Message(-(-numel // 128), 128, E4M3)
    buffer = torch.empty(3, message.nbytes, dtype=torch.uint8)
    for seed, each in enumerate(buffer):
        blocks_in(each, message).copy_(quantized(numel, E4M3, 128, seed))
    expected = quantized(numel, fmt, 128, 9)
    found, arrived = to(expected, kernels.device), buffer.to(kernels.device, copy=True)
    pieces = [blocks_in(each, message) for each in buffer]
    parts = TENSOR_REFERENCE.accumulate(pieces, expected, overwrite=overwrite)
    ours = kernels.ops.accumulate([blocks_in(each, message) for each in arrived], found, overwrite=overwrite)
    assert_same_blocks(found, expected, f"sum of {numel}")
    assert torch.equal(ours.cpu(), parts), f"sum of {numel}: parts of the norm"


def segments_of(rows: list[int]) -> list[Segment]:
    """Parameters side by side, with indices of their own."""
    ends = list(accumulate(rows))
    return [
        Segment(slice(end - size, end), 7 * number + 3, 0)
        for number, (end, size) in enumerate(zip(ends, rows, strict=True))
    ]


def gradient_of(name: str, rows: list[int], size: int, seed: int) -> Blocks:
    """name: of a format; "e4m3, fp32 scales" is what a sum in FP8 leaves."""
    fmt = BY_NAME[name.split(",", maxsplit=1)[0]]
    held = Blocks.zeros(sum(rows), size, fmt, CPU)
    for each in segments_of(rows):
        tensor = values((each.blocks.stop - each.blocks.start) * size, seed + each.parameter, spread=3.0)
        TENSOR_REFERENCE.quantize(tensor, held[each.blocks])
    if "," in name and held.scales is not None:
        return replace(held, scales=torch.exp2(held.scales.float() - 127) * 1.000693)
    return held


def on(state: AdamState, device: torch.device) -> AdamState:
    held = (to(each, device) for each in (state.master, state.exp_avg, state.exp_avg_sq))
    master, exp_avg, exp_avg_sq = held
    return AdamState(master, exp_avg, exp_avg_sq, stores_sqrt=False)


def fresh_state(formats: list[Format], rows: int, size: int) -> AdamState:
    master, exp_avg, exp_avg_sq = (Blocks.zeros(rows, size, fmt, CPU) for fmt in formats)
    return AdamState(master, exp_avg, exp_avg_sq, stores_sqrt=False)


def check_steps(
    kernels: Kernels, formats: tuple[str, str, str, str], seed: int, longest: int = 40, steps: int = 3
) -> None:
    """Some steps of four tensors. formats: of gradient, master, exp_avg, exp_avg_sq."""
    gradient, master, *moments = formats
    draw = random.Random(seed)
    rows, size = [draw.choice([1, 2, 5, longest]) for _ in range(4)], draw.choice([32, 64, 128, 256])
    kinds = [BY_NAME[name.split(",")[0]] for name in (master, *moments)]
    state = fresh_state(kinds, sum(rows), size)
    ours = on(state, kernels.device)
    weights = torch.zeros(sum(rows), size, dtype=draw.choice(weight_dtypes(kinds[0])))
    written = weights.to(kernels.device, copy=True)
    counts = torch.zeros(STATE_COUNTS, dtype=torch.float64)
    counted = counts.to(kernels.device, copy=True)
    rounding = Rounding(draw.randrange(2**40), stochastic="stochastic" in master)
    decoupled = draw.random() < 0.5
    segments, control = segments_of(rows), torch.tensor([0.37, 1.0])
    plans = [ops.plan(segments, sum(rows), size, kernels.device) for ops in (TENSOR_REFERENCE, kernels.ops)]
    for step in range(1, steps + 1):
        scalars = AdamScalars(step, 1e-2, 0.9, 0.95, 1e-8, 0.1, decoupled, draw.random() < 0.5, None)
        held = gradient_of(gradient, rows, size, seed + 100 * step)
        sweep = Sweep(state, held, weights, plans[0], scalars, control, rounding, counts)
        twin = replace(
            sweep,
            state=ours,
            gradient=to(held, kernels.device),
            weights=written,
            plan=plans[1],
            control=control.to(kernels.device),
            counts=counted,
        )
        TENSOR_REFERENCE.adam_step(sweep)
        kernels.ops.adam_step(twin)
        what = f"{', '.join(formats)}, step {step}"
        assert_same(written, weights, f"{what}: weight")
        for key in ("master", "exp_avg", "exp_avg_sq"):
            assert_same_blocks(getattr(ours, key), getattr(state, key), f"{what}: {key}")
        assert counted.tolist() == counts.tolist(), what
    assert weights.any()


def check_a_skipped_step(kernels: Kernels) -> None:
    master, exp_avg, exp_avg_sq = (
        quantized(512, BY_NAME[name], 128, seed) for seed, name in enumerate(("fp16", "e4m3", "fp16"))
    )
    state = on(AdamState(master, exp_avg, exp_avg_sq), kernels.device)
    weights = torch.ones(4, 128, dtype=torch.bfloat16, device=kernels.device)
    scalars = AdamScalars(1, 1e-2, 0.9, 0.95, 1e-8, 0.1, True, True, None)
    plan = kernels.ops.plan(segments_of([4]), 4, 128, kernels.device)
    gradient = to(quantized(512, E4M3, 128, 3), kernels.device)
    control = torch.tensor([1.0, 0.0], device=kernels.device)
    kernels.ops.adam_step(Sweep(state, gradient, weights, plan, scalars, control, Rounding(0)))
    for mine, theirs in zip(
        (state.master, state.exp_avg, state.exp_avg_sq), (master, exp_avg, exp_avg_sq), strict=True
    ):
        assert_same_blocks(mine, theirs, "a skipped step")
    assert (weights == 1).all()


MASTERS = ("fp32", "fp16", "bf16", "split16", "split8", "fp16, stochastic", "bf16, stochastic")
SWEEPS = (
    *(("e4m3", master, "e4m3", "fp16") for master in MASTERS),
    *(("fp32", "fp16", "e5m2", name) for name in ("fp32", "bf16", "e4m3", "e5m2")),
    *(("bf16", "fp32", name, "fp16") for name in ("fp32", "bf16", "fp16")),
    ("e4m3, fp32 scales", "fp16", "e4m3", "fp16"),
    ("e5m2, fp32 scales", "fp16", "e4m3", "fp16"),
)
