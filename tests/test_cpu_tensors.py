"""One scale a tensor in C++: the reference's bits, on any threads and instruction set."""

import random
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from cpu_support import CPP, each_isa, running
from kernel_support import CPU, assert_same, assert_same_blocks, dirty, inner, to
from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Rounding, Segment
from ds_fp8.ops.backend import TENSOR_REFERENCE, cpu_tensor_backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BF16, BY_NAME, E4M3, E5M2, FP16, FP32, Format
from ds_fp8.ops.health import GRADIENT_COUNTS, STATE_COUNTS
from ds_fp8.zero_fp8.recipe import weight_dtypes

OURS = cpu_tensor_backend()
SIZES = (1, 31, 32, 100, 128, 4097, 20_000)
each_format = pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16, FP32], ids=lambda fmt: fmt.name)
MASTERS = ("fp32", "fp16", "bf16", "split16", "split8", "fp16, stochastic", "bf16, stochastic")


def values(numel: int, seed: int, spread: float = 6.0) -> Tensor:
    """Of many sizes; zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(spread * torch.randn(numel, generator=generator))
    return torch.randn(numel, generator=generator) * sizes * (torch.rand(numel, generator=generator) > 0.05)


def quantized(numel: int, fmt: Format, block_size: int, seed: int) -> Blocks:
    out = Blocks.zeros(-(-numel // block_size), block_size, fmt, CPU)
    TENSOR_REFERENCE.quantize(values(numel, seed), out)
    return out


@each_isa
@each_format
@pytest.mark.parametrize("threads", [1, 3])
def test_quantize(isa: str, fmt: Format, threads: int) -> None:
    """Nothing but the tensor's own rows is written; inf and NaN make all of it not finite."""
    with running(isa, threads):
        for seed, numel in enumerate(SIZES):
            for bad in (None, torch.inf, torch.nan):
                vector = values(numel, seed).to(torch.bfloat16 if seed % 2 else torch.float32)
                if bad is not None:
                    vector[numel // 2] = bad
                expected = dirty(-(-numel // 64), 64, fmt)
                found = to(expected, CPU)
                counts = torch.zeros(2, GRADIENT_COUNTS, dtype=torch.float64)
                TENSOR_REFERENCE.quantize(vector, inner(expected), counts[0])
                OURS.quantize(vector, inner(found), counts[1])
                assert_same_blocks(found, expected, f"{numel} with {bad}")
                if fmt.scaled:
                    torch.testing.assert_close(counts[1], counts[0], rtol=1e-12, atol=0)


@each_isa
@each_format
@pytest.mark.parametrize("fresh", [True, False])
def test_accumulate(isa: str, fmt: Format, fresh: bool) -> None:
    with running(isa, 2):
        for numel in SIZES:
            pieces = [quantized(numel, E4M3, 128, seed) for seed in range(3)]
            expected = quantized(numel, fmt, 128, 9)
            found = to(expected, CPU)
            figures = TENSOR_REFERENCE.accumulate(pieces, expected, fresh=fresh)
            ours = OURS.accumulate(pieces, found, fresh=fresh)
            assert_same_blocks(found, expected, f"sum of {numel}")
            torch.testing.assert_close(ours, figures, rtol=CPP.tolerance, atol=0)


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
        fine = torch.exp2(held.scales.float() - 127) * 1.000693
        return replace(held, scales=fine)
    return held


def check_steps(gradient: str, master: str, exp_avg: str, exp_avg_sq: str, seed: int) -> None:
    draw = random.Random(seed)
    rows, size = [draw.choice([1, 2, 5, 40]) for _ in range(4)], draw.choice([32, 64, 128, 256])
    formats = [BY_NAME[name.split(",")[0]] for name in (master, exp_avg, exp_avg_sq)]
    weights = torch.zeros(sum(rows), size, dtype=draw.choice(weight_dtypes(formats[0])))
    states = [
        AdamState(*(Blocks.zeros(sum(rows), size, fmt, CPU) for fmt in formats), rooted=False)  # type: ignore[misc]
        for _ in range(2)
    ]
    both = [weights, weights.clone()]
    counts = torch.zeros(2, STATE_COUNTS, dtype=torch.float64)
    rounding = Rounding(draw.randrange(2**40), stochastic="stochastic" in master)
    decoupled = draw.random() < 0.5
    for step in (1, 2, 3):
        scalars = AdamScalars(step, 1e-2, 0.9, 0.95, 1e-8, 0.1, decoupled, draw.random() < 0.5, None)
        held = gradient_of(gradient, rows, size, seed + 100 * step)
        for ops, state, own, counted in zip((TENSOR_REFERENCE, OURS), states, both, counts, strict=True):
            plan = ops.plan(segments_of(rows), sum(rows), size, CPU)
            control = torch.tensor([0.37, 1.0])
            ops.adam_step(state, held, own, plan, scalars, control, rounding=rounding, counts=counted)
        what = f"{gradient}, {master}, {exp_avg}, {exp_avg_sq}, step {step}"
        assert_same(both[1], both[0], f"{what}: weight")
        for key in ("master", "exp_avg", "exp_avg_sq"):
            assert_same_blocks(getattr(states[1], key), getattr(states[0], key), f"{what}: {key}")
        assert counts[1].tolist() == counts[0].tolist(), what
    assert both[0].any()


@each_isa
@pytest.mark.parametrize("threads", [1, 3])
def test_sweep(isa: str, threads: int) -> None:
    with running(isa, threads):
        for seed, master in enumerate(MASTERS):
            check_steps("e4m3", master, "e4m3", "fp16", seed)
        for seed, exp_avg_sq in enumerate(("fp32", "bf16", "e4m3", "e5m2")):
            check_steps("fp32", "fp16", "e5m2", exp_avg_sq, seed)
        for seed, exp_avg in enumerate(("fp32", "bf16", "fp16")):
            check_steps("bf16", "fp32", exp_avg, "fp16", seed)


@each_isa
@pytest.mark.parametrize("gradient", ["e4m3, fp32 scales", "e5m2, fp32 scales"])
def test_sweep_over_gradients_that_were_added_in_fp8(isa: str, gradient: str) -> None:
    with running(isa, 2):
        for seed in range(4):
            check_steps(gradient, "fp16", "e4m3", "fp16", seed)


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    state = AdamState(
        quantized(512, FP16, 128, 0), quantized(512, E4M3, 128, 1), quantized(512, FP16, 128, 2), rooted=False
    )
    before = [to(each, CPU) for each in (state.master, state.exp_avg, state.exp_avg_sq)]
    weights = torch.ones(4, 128, dtype=torch.bfloat16)
    scalars = AdamScalars(1, 1e-2, 0.9, 0.95, 1e-8, 0.1, True, True, None)
    plan = OURS.plan(segments_of([4]), 4, 128, CPU)
    gradient, control = quantized(512, E4M3, 128, 3), torch.tensor([1.0, 0.0])
    OURS.adam_step(state, gradient, weights, plan, scalars, control, rounding=Rounding(0))
    for mine, theirs in zip((state.master, state.exp_avg, state.exp_avg_sq), before, strict=True):
        assert_same_blocks(mine, theirs, "a skipped step")
    assert (weights == 1).all()
