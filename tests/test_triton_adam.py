"""The Adam sweep as a Triton kernel equals the reference bit for bit, step after step.

Formats come from the configuration's own tables, so that what is built tomorrow is swept tomorrow. Pairs of
all dimensions are covered here, the full product by the slow test.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import sqrt
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_support import (
    CONVERSIONS,
    CPU,
    DEVICE,
    FINITE_KINDS,
    GARBAGE,
    GUARD,
    ROW_KINDS,
    assert_same,
    assert_same_blocks,
    conversion,
    cycled,
    dirty,
    garbage,
    guarded,
    inner,
    rows_of,
    to,
)

from ds_fp8.config import BUILT, FP8Config, Gradients, Optimizer
from ds_fp8.ops import adam, adam_triton, blocks_triton
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, next_clamp
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BY_NAME

BETAS = (0.9, 0.95)
STATES = ("master", "exp_avg", "exp_avg_sq")


def literals(annotation: Any) -> Iterator[Any]:
    """The values of `Literal[...] | None`."""
    for each in get_args(annotation):
        yield from literals(each) if get_args(each) else [] if each is type(None) else [each]


def built(key: str) -> list[str]:
    """The formats of an optimizer state that this version takes."""
    values = literals(Optimizer.model_fields[key].annotation)
    return [value for value in values if value in BUILT.get(f"optimizer.{key}", (value,))]


DIMENSIONS: dict[str, Sequence[Any]] = {
    "gradient": sorted(
        {x for key in ("dtype", "accum_dtype") for x in literals(Gradients.model_fields[key].annotation)}
    ),
    "master": built("master_dtype"),
    "exp_avg": built("exp_avg_dtype"),
    "exp_avg_sq": built("exp_avg_sq_dtype"),
    "block_size": list(literals(FP8Config.model_fields["block_size"].annotation)),
    "weights": ["bfloat16", "float16", "float32"],
    "decoupled": [True, False],
    "clamped": [True, False],
    "bias_correction": [True, False],
    "hardware": CONVERSIONS,
}


@dataclass(frozen=True)
class Case:
    """One value of each of DIMENSIONS."""

    gradient: str
    master: str
    exp_avg: str
    exp_avg_sq: str
    block_size: int
    weights: str
    decoupled: bool
    clamped: bool
    bias_correction: bool
    hardware: bool

    def __str__(self) -> str:
        switches = ("decoupled", "clamped", "bias_correction", "hardware")
        names = (self.gradient, self.master, self.exp_avg, self.exp_avg_sq, self.block_size, self.weights)
        return "-".join(map(str, [*names, *(each for each in switches if getattr(self, each))]))

    @property
    def states(self) -> list[str]:
        return [self.master, self.exp_avg, self.exp_avg_sq]

    def scalars(self, step: int) -> AdamScalars:
        clamp = sqrt(next_clamp(None, BETAS)) if self.clamped else None
        return AdamScalars(step, 1e-2, *BETAS, 1e-8, 0.1, self.decoupled, self.bias_correction, clamp)


def pairwise_cases() -> list[Case]:
    """Few cases in which every value of a dimension meets every value of every other; greedy."""
    names = list(DIMENSIONS)
    left = {
        frozenset([(a, x), (b, y)])
        for a, b in combinations(names, 2)
        for x, y in product(DIMENSIONS[a], DIMENSIONS[b])
    }
    draw, cases = random.Random(0), []
    while left:
        pair = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        trials = [{**{name: draw.choice(DIMENSIONS[name]) for name in names}, **pair} for _ in range(50)]
        covered = [{frozenset(each) for each in combinations(trial.items(), 2)} & left for trial in trials]
        best = max(range(len(trials)), key=lambda index: len(covered[index]))
        left -= covered[best]
        cases.append(Case(**trials[best]))
    return cases


class Twins:
    """The same states and weights twice, between guards: the reference's and the kernel's."""

    def __init__(
        self, case: Case, segments: Sequence[Segment], values: Sequence[Tensor], padding: int
    ) -> None:
        """values: of the states; rows after the segments, `padding` of them, hold zeros."""
        self.case, self.segments = case, segments
        self.rows = len(values[0]) + padding
        empty = torch.zeros(padding, case.block_size)
        self.padding = empty
        self.states = [
            guarded(torch.cat([x, empty]), BY_NAME[name]) for name, x in zip(case.states, values, strict=True)
        ]
        shape = (self.rows + 2 * GUARD, case.block_size)
        self.weights = garbage(*shape, dtype=getattr(torch, case.weights))
        self.weights[len(self.weights) - GUARD - padding : len(self.weights) - GUARD] = 0
        self.twin_states = [to(each, DEVICE) for each in self.states]
        self.twin_weights = self.weights.to(DEVICE, copy=True)

    def step(self, step: int, gradient: Tensor, control: Tensor, seed: int = 5) -> None:
        case, scalars = self.case, self.case.scalars(step)
        blocks = inner(guarded(torch.cat([gradient, self.padding]), BY_NAME[case.gradient]))
        plan = adam.plan(self.segments, self.rows, case.block_size, CPU)
        state = AdamState(*map(inner, self.states))
        adam.adam_step(state, blocks, self.weights[GUARD:-GUARD], plan, scalars, control, seed=seed)
        with conversion(case.hardware):
            table = adam_triton.plan(self.segments, self.rows, case.block_size, DEVICE)
            twin = AdamState(*map(inner, self.twin_states))
            weights, control = self.twin_weights[GUARD:-GUARD], control.to(DEVICE)
            adam_triton.adam_step(twin, to(blocks, DEVICE), weights, table, scalars, control, seed=seed)
        self.check(f"{case}, step {step}")

    def check(self, what: str) -> None:
        for name, expected, actual in zip(STATES, self.states, self.twin_states, strict=True):
            assert_same_blocks(to(actual, CPU), expected, f"{what}, {name}")
        assert_same(self.twin_weights, self.weights, f"{what}, weights")


def segments_of(lengths: Sequence[int], block_size: int) -> list[Segment]:
    """Consecutive segments; the first begins inside its parameter, where 2^32 elements are passed."""
    segments, row = [], 0
    for index, length in enumerate(lengths):
        first_element = 2**32 - 2 * block_size if index == 0 else 0
        segments.append(Segment(slice(row, row + length), (7 * index + 3) % 1000, first_element))
        row += length
    return segments


MASTERS = ("normal", "zero", "denormal", "tiny", "strong")
# On a GPU the root of v is right for 0 and from 2^-102 on, in the sweep's unit.
MOMENTS = ("normal", "zero", "weak", "sparse", "strong", *(["faint"] if blocks_triton.INTERPRETED else []))


def sweep(case: Case, lengths: Sequence[int], turn: int, padding: int, seed: int, steps: int) -> None:
    """Steps over rows of every kind; gradients meet the states' kinds in turn."""
    rows, size = sum(lengths), case.block_size
    p = rows_of(cycled(MASTERS, rows, turn), size, seed)
    m, v = (rows_of(cycled(MOMENTS, rows, turn * each), size, seed + each) for each in (1, 2))
    twins = Twins(case, segments_of(lengths, size), (p, m, v.abs().clamp(max=2.0**40)), padding)
    for step in range(1, steps + 1):
        gradient = rows_of(cycled(MOMENTS, rows, turn * step), size, seed + 10 * step)
        twins.step(step, gradient, torch.tensor([0.3, 1.0]))


LENGTHS = (5, 1, 1, 1, 2, 1, 7, 1, 3)


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_every_pair(case: Case) -> None:
    sweep(case, LENGTHS, turn=1, padding=2, seed=0, steps=3)
