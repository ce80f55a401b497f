"""No kernel takes raw pointers of tensors that do not belong together: C++ and Triton refuse them by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cpu_support import CPP
from kernel_support import CPU, Kernels
from torch import Tensor
from triton_support import TRITON

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import cpu_tensor_backend, triton_tensor_backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import E4M3, FP16, FP32, SPLIT16, UE4M4, Format
from ds_fp8.ops.product_backend import Products, cpu_products, triton_products
from ds_fp8.ops.rounding import Rounding
from ds_fp8.ops.weight_runs import Grid, Run

ROWS, BLOCK = 6, 64
KERNELS = {
    "cpu": CPP,
    "triton": TRITON,
    "cpu, tensors": replace(CPP, ops=cpu_tensor_backend()),
    "triton, tensors": replace(TRITON, ops=triton_tensor_backend()),
}

each_backend = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)


def blocks(fmt: Format, rows: int = ROWS, size: int = BLOCK) -> Blocks:
    return Blocks.zeros(rows, size, fmt, CPU)


def strided(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(rows, 2 * size, dtype=dtype)[:, ::2]


@dataclass(frozen=True)
class Step:
    """What a sweep is given; all of it fits together."""

    master: Blocks
    exp_avg: Blocks
    exp_avg_sq: Blocks
    gradient: Blocks
    weights: Tensor
    control: Tensor
    rows: int = ROWS
    stochastic: bool = False
    counts: Tensor | None = None

    def run(self, kernels: Kernels) -> None:
        state = AdamState(self.master, self.exp_avg, self.exp_avg_sq)
        plan = kernels.ops.plan([Segment(slice(0, self.rows), 0, 0)], self.rows, BLOCK, CPU)
        scalars = AdamScalars(1, 1e-2, 0.9, 0.95, 1e-8, 0.1, True, True, None)
        operands = (state, self.gradient, self.weights, plan, scalars, self.control)
        kernels.ops.adam_step(Sweep(*operands, Rounding(0, self.stochastic), self.counts))


def step() -> Step:
    states = (blocks(SPLIT16), blocks(E4M3), blocks(FP16))
    weights = torch.zeros(ROWS, BLOCK, dtype=torch.bfloat16)
    return Step(*states, blocks(E4M3), weights, torch.tensor([1.0, 1.0]))


def without_scales(given: Blocks) -> Blocks:
    return replace(given, scales=None)


WRONG_STEPS: dict[str, tuple[str, Callable[[Step], Any]]] = {
    "a smaller master": ("master", lambda _: blocks(SPLIT16, ROWS - 1)),
    "a larger exp_avg": ("exp_avg", lambda _: blocks(E4M3, ROWS + 1)),
    "other blocks": ("exp_avg_sq", lambda _: blocks(FP16, ROWS // 2, 2 * BLOCK)),
    "a smaller gradient": ("gradient", lambda _: blocks(E4M3, ROWS - 1)),
    "codes of another dtype": ("exp_avg", lambda _: Blocks(blocks(FP32).codes, blocks(E4M3).scales, E4M3)),
    "no scales": ("exp_avg_sq", lambda each: without_scales(each.exp_avg_sq)),
    "scales that are too few": (
        "exp_avg",
        lambda each: replace(each.exp_avg, scales=each.exp_avg.scales[1:]),  # type: ignore[index]
    ),
    "FP32 scales of a state": (
        "exp_avg",
        lambda each: replace(each.exp_avg, scales=torch.ones(ROWS)),
    ),
    "codes with gaps": ("gradient", lambda _: Blocks(strided(ROWS, BLOCK, FP32.dtype), None, FP32)),
    "recast weights": ("weights", lambda _: torch.zeros(ROWS, BLOCK)),
    "resized weights": ("weights", lambda _: torch.zeros(ROWS - 1, BLOCK, dtype=torch.bfloat16)),
    "weights with gaps": ("weights", lambda _: strided(ROWS, BLOCK, torch.bfloat16)),
    "weights elsewhere": ("weights", lambda each: each.weights.to("meta")),
    "float64 control": ("control", lambda each: each.control.double()),
    "short control": ("control", lambda each: each.control[:1]),
    "another plan": ("rows", lambda _: ROWS + 1),
    "float32 counts": ("counts", lambda _: torch.zeros(3)),
    "short counts": ("counts", lambda _: torch.zeros(1, dtype=torch.float64)),
    "an unsigned exp_avg": ("exp_avg", lambda _: blocks(UE4M4)),
    "a split gradient": ("gradient", lambda _: blocks(SPLIT16)),
    "a master that loses no bits": ("stochastic", lambda _: True),
}


@each_backend
@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_sweep_refuses_what_does_not_fit(kernels: Kernels, wrong: str) -> None:
    """By a ValueError that says what was received and what is allowed, before anything is read or written."""
    name, value_of = WRONG_STEPS[wrong]
    given = step()
    with pytest.raises(ValueError, match=r": received .*, allowed: ") as caught:
        replace(given, **{name: value_of(given)}).run(kernels)
    assert {"rows": "plan", "stochastic": "master"}.get(name, name) in str(caught.value) or name == "weights"


@each_backend
def test_a_plan_refuses_segments_beyond_the_blocks(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match=r"segment: received blocks 2 to 7, allowed: 0 to 6"):
        kernels.ops.plan([Segment(slice(2, ROWS + 1), 0, 0)], ROWS, BLOCK, CPU)


@each_backend
def test_conversions_refuse_what_does_not_fit(kernels: Kernels) -> None:
    vector, ops = torch.zeros(ROWS * BLOCK), kernels.ops
    for call in (
        lambda: ops.quantize(torch.zeros(ROWS * BLOCK + 1), blocks(E4M3)),
        lambda: ops.quantize(vector.double(), blocks(E4M3)),
        lambda: ops.quantize(torch.zeros(2 * ROWS * BLOCK)[::2], blocks(E4M3)),
        lambda: ops.quantize(vector, without_scales(blocks(E4M3))),
        lambda: ops.quantize(vector, blocks(UE4M4)),
        lambda: ops.quantize(vector.to("meta"), blocks(E4M3)),
        lambda: ops.quantize(vector, blocks(E4M3), torch.zeros(2, dtype=torch.float64)),
        lambda: ops.quantize_vectors([vector, vector], [blocks(E4M3), blocks(E4M3, 1)]),
        lambda: ops.dequantize(blocks(E4M3), vector.to(torch.int32)),
        lambda: ops.dequantize(blocks(SPLIT16), vector),
        lambda: ops.dequantize(blocks(E4M3, ROWS, 48), vector),
    ):
        with pytest.raises(ValueError, match=r": received .*, allowed: "):
            call()


@each_backend
def test_sums_refuse_what_does_not_fit(kernels: Kernels) -> None:
    piece = blocks(E4M3)
    for pieces, shard in (
        ([], blocks(E4M3)),
        ([piece], blocks(E4M3, ROWS + 1)),
        ([piece, blocks(FP32)], blocks(E4M3)),
        ([without_scales(piece)], blocks(E4M3)),
        ([piece], blocks(SPLIT16)),
    ):
        with pytest.raises(ValueError, match=r": received .*, allowed: "):
            kernels.ops.accumulate(pieces, shard, overwrite=True)


@pytest.mark.parametrize(
    "kernels", [KERNELS["triton"], KERNELS["triton, tensors"]], ids=["blocks", "tensors"]
)
def test_pieces_at_unequal_distances_are_refused(kernels: Kernels) -> None:
    """The kernel goes from one to the next by a constant step."""
    buffer = blocks(E4M3, 5 * ROWS)
    at = [buffer[first * ROWS : (first + 1) * ROWS] for first in (0, 1, 3)]
    for pieces in (at, [blocks(E4M3), blocks(E4M3)]):
        with pytest.raises(ValueError, match=r"pieces\[\d\]: received .*, allowed: .*(distances|one buffer)"):
            kernels.ops.accumulate(pieces, blocks(FP32), overwrite=True)


WEIGHTS = {"cpu": cpu_products(), "triton": triton_products()}
BF16, CODES, BYTES = torch.bfloat16, torch.float8_e4m3fn, torch.uint8


def matrix(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("ours", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_products_refuse_what_does_not_fit(ours: Products) -> None:
    """A matrix of 256 x 208 has 2 x 2 tiles."""
    values, exponents, codes = matrix(BF16, 208), matrix(BYTES, 2, 2), matrix(CODES, 256, 208)
    for call in (
        lambda: ours.find_exponents(values.float(), 0, 208, exponents),
        lambda: ours.find_exponents(matrix(BF16, 416)[::2], 0, 208, exponents),
        lambda: ours.find_exponents(values, 0, 208, exponents.int()),
        lambda: ours.find_exponents(values, 0, 300, exponents),
        lambda: ours.find_exponents(values, -1, 208, exponents),
        lambda: ours.find_exponents(values, 255 * 208 + 1, 208, exponents),
        lambda: ours.encode_weight(values, 0, 208, exponents, matrix(CODES, 207)),
        lambda: ours.encode_weight(values, 0, 208, exponents, matrix(BYTES, 208)),
        lambda: ours.encode_weight(values.to("meta"), 0, 208, exponents, matrix(CODES, 208)),
        lambda: ours.decode_weight(codes, matrix(BYTES, 2, 1), matrix(BF16, 256, 208)),
        lambda: ours.decode_weight(codes, exponents, matrix(BF16, 208, 256)),
        lambda: ours.decode_weight(codes, exponents, matrix(torch.float16, 256, 208)),
        lambda: ours.decode_weight(codes.t(), exponents, matrix(BF16, 208, 256)),
    ):
        with pytest.raises(ValueError, match=r": received .*, allowed: "):
            call()


def test_many_weights_refuse_what_does_not_fit() -> None:
    """A matrix of 256 x 208 has 2 x 2 tiles."""
    ours = triton_products()
    grid = Grid(208, (2, 2), slice(0, 4))
    for run in (
        Run(Grid(300, (2, 2), slice(0, 4)), 0, 208, 0, 0),
        Run(Grid(208, (2, 2), slice(0, 3)), 0, 208, 0, 0),
        Run(grid, 255 * 208 + 1, 208, 0, 0),
        Run(grid, 0, 208, -1, 0),
    ):
        with pytest.raises(ValueError, match=r": received .*, allowed: "):
            ours.weight_runs(ours, [run])
    together = ours.weight_runs(ours, [Run(grid, 0, 208, 8, 16)])
    values, exponents, codes = matrix(BF16, 216), matrix(BYTES, 4), matrix(CODES, 224)
    for call in (
        lambda: together.find_exponents(values[1:], exponents),
        lambda: together.find_exponents(values.float(), exponents),
        lambda: together.find_exponents(values, exponents[1:]),
        lambda: together.encode(values, exponents, codes[1:]),
        lambda: together.encode(values, exponents, codes.view(torch.uint8)),
        lambda: together.find_exponents(values, exponents.int()),
    ):
        with pytest.raises(ValueError, match=r": received .*, allowed: "):
            call()


def test_casts_of_products_refuse_what_does_not_fit() -> None:
    ours, exponents = triton_products(), matrix(BYTES, 2, 3)
    for call in (
        lambda: ours.cast_input(matrix(torch.float32, 4, 32), wgrad=True),
        lambda: ours.cast_input(matrix(BF16, 32), wgrad=True),
        lambda: ours.cast_input(matrix(BF16, 4, 24), wgrad=True),
        lambda: ours.cast_gradient(matrix(BF16, 32, 16).t(), dgrad=True, wgrad=True, bias=True),
        lambda: ours.transpose(matrix(BYTES, 256, 384), exponents),
        lambda: ours.transpose(matrix(CODES, 384, 256).t(), exponents),
        lambda: ours.transpose(matrix(CODES, 256), exponents),
        lambda: ours.transpose(matrix(CODES, 384, 256), exponents),
        lambda: ours.expand(matrix(CODES, 256, 384), exponents.int()),
        lambda: ours.expand(matrix(CODES, 256, 384), exponents.t()),
        lambda: ours.expand(matrix(CODES, 384, 256), exponents),
    ):
        with pytest.raises(ValueError, match=r": received .*, allowed: "):
            call()
