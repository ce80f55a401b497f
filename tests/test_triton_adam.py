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
    nasty_values,
    raw,
    rows_of,
    special_values,
    to,
)

from ds_fp8.config import BUILT, FP8Config, Gradients, Optimizer
from ds_fp8.ops import adam, adam_triton, blocks_triton
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, next_clamp
from ds_fp8.ops.formats import BF16, BY_NAME, FP16, Format

BETAS = (0.9, 0.95)
FORMATS = ("gradient", "master", "exp_avg", "exp_avg_sq")
STATES = FORMATS[1:]


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
    weight_decay: float = 0.1

    def __str__(self) -> str:
        switches = ("decoupled", "clamped", "bias_correction", "hardware")
        names = (self.gradient, self.master, self.exp_avg, self.exp_avg_sq, self.block_size, self.weights)
        return "-".join(map(str, [*names, *(each for each in switches if getattr(self, each))]))

    @property
    def states(self) -> list[str]:
        return [self.master, self.exp_avg, self.exp_avg_sq]

    def scalars(self, step: int) -> AdamScalars:
        clamp = sqrt(next_clamp(None, BETAS)) if self.clamped else None
        decay = self.weight_decay
        return AdamScalars(step, 1e-2, *BETAS, 1e-8, decay, self.decoupled, self.bias_correction, clamp)


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


# On a GPU the root of v is right for 0 and from 2^-102 on, in the sweep's unit; an interpreted one always is.
MASTERS = ("normal", "zero", "strong", "denormal", "tiny")
MOMENTS = (*MASTERS, "weak", "sparse", *(["faint"] if blocks_triton.INTERPRETED else []))
LENGTHS = (5, 1, 1, 1, 2, 1, 7, 1, 3)  # blocks of segments; many begin within one tile
TAKEN = torch.tensor([0.3, 1.0])


def initial(case: Case, rows: int, turn: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of every kind for the states."""
    p = rows_of(cycled(MASTERS, rows, turn), case.block_size, seed)
    m, v = (rows_of(cycled(MOMENTS, rows, turn * each), case.block_size, seed + each) for each in (1, 2))
    return (
        p,
        m,
        v.abs().clamp(max=2.0**40),
    )  # v ends where FP32 does, in the sweep's unit; a root in the middle


def sweep(case: Case, lengths: Sequence[int], turn: int, padding: int, seed: int, steps: int) -> None:
    """Steps over rows of every kind; gradients meet the states' kinds in turn."""
    rows = sum(lengths)
    twins = Twins(case, segments_of(lengths, case.block_size), initial(case, rows, turn, seed), padding)
    for step in range(1, steps + 1):
        gradient = rows_of(cycled(MOMENTS, rows, turn * step), case.block_size, seed + 10 * step)
        twins.step(step, gradient, TAKEN, seed)


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_every_pair(case: Case) -> None:
    sweep(case, LENGTHS, turn=1, padding=2, seed=0, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("formats", list(product(*(DIMENSIONS[name] for name in FORMATS))), ids="-".join)
def test_every_combination(formats: tuple[str, ...]) -> None:
    """The full product of formats, block sizes, kinds of decay and clamp.

    The others are independent of them and drawn at random: the weights' dtype is met by the stored master
    only, bias correction by two factors of the host, and the conversion of FP8 by each format alone.
    """
    draw = random.Random("-".join(formats))
    rotated = ("weights", "bias_correction", "hardware")
    for block_size, decoupled, clamped in product(
        *(DIMENSIONS[name] for name in ("block_size", "decoupled", "clamped"))
    ):
        drawn = {name: draw.choice(DIMENSIONS[name]) for name in rotated}
        chosen = dict(zip(FORMATS, formats, strict=True), block_size=block_size, decoupled=decoupled)
        sweep(Case(**chosen, clamped=clamped, **drawn), (2, 1, 1, 3), turn=1, padding=1, seed=1, steps=2)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    case=st.builds(Case, **{name: st.sampled_from(values) for name, values in DIMENSIONS.items()}),
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 20)), max_size=12),
    turn=st.integers(0, 5),
    padding=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_any_segments(case: Case, lengths: list[int], turn: int, padding: int, seed: int) -> None:
    """None at all, many in a tile, over several tiles; padding of more than a tile."""
    sweep(case, lengths, turn, padding, seed, steps=1)


@pytest.mark.parametrize("fmt", [BF16, FP16], ids=lambda fmt: fmt.name)
def test_every_nasty_master_is_rounded_to_a_weight(fmt: Format) -> None:
    """Midpoints, denormals and what is not finite, in a step that moves no master."""
    values = torch.cat(
        [nasty_values(fmt)[::7], special_values(), torch.tensor([torch.inf, -torch.inf, torch.nan])]
    )
    masters = values[: len(values) // 256 * 256].view(-1, 256)
    zeros = torch.zeros_like(masters)
    weights = str(fmt.dtype).removeprefix("torch.")
    case = Case("fp32", "fp32", "fp32", "fp32", 256, weights, True, True, True, False, weight_decay=0.0)
    twins = Twins(case, segments_of([len(masters)], 256), [masters, zeros, zeros], 0)
    twins.step(1, zeros, TAKEN)
    assert_same(inner(twins.states[0]).codes, masters, "masters")


@pytest.mark.parametrize("exp_avg_sq", DIMENSIONS["exp_avg_sq"])
@pytest.mark.parametrize("clamped", [True, False])
def test_a_skipped_step_leaves_every_byte(exp_avg_sq: str, clamped: bool) -> None:
    """Garbage in the states, NaN in the weights; and a step that is taken leaves nothing as it was."""
    case = Case("e4m3", "fp16", "e4m3", exp_avg_sq, 64, "bfloat16", True, clamped, True, False)
    outer = [to(dirty(40, 64, BY_NAME[name]), DEVICE) for name in case.states]
    weights = torch.full((40, 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    tensors = [weights, *(x for each in outer for x in (each.codes, each.scales) if x is not None)]
    before = [raw(each).clone() for each in tensors]
    gradient = to(inner(guarded(rows_of(cycled(ROW_KINDS, 40), 64, seed=0), BY_NAME["e4m3"])), DEVICE)
    plan = adam_triton.plan(segments_of([20, 1, 1, 18], 64), 40, 64, DEVICE)
    for go in (0.0, 1.0):
        control = torch.tensor([0.3, go], device=DEVICE)
        with conversion(case.hardware):
            state = AdamState(*map(inner, outer))
            adam_triton.adam_step(state, gradient, weights, plan, case.scalars(1), control, seed=0)
        same = [torch.equal(raw(each), was) for each, was in zip(tensors, before, strict=True)]
        assert same == [not go] * len(tensors)


def with_bad(value: float, place: str, case: Case) -> tuple[Twins, Tensor]:
    """Normal rows with one element that is not, in the gradient or in a state."""
    values = {
        name: rows_of(["normal"] * 4, case.block_size, seed)
        for seed, name in enumerate([*STATES, "gradient"])
    }
    values["exp_avg_sq"].abs_()
    values[place][1, 3] = value
    return Twins(case, segments_of([4], case.block_size), [values[name] for name in STATES], 0), values[
        "gradient"
    ]


BAD = [torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("master", DIMENSIONS["master"])
def test_a_master_that_is_not_finite(master: str, bad: float) -> None:
    case = Case("bf16", master, "e4m3", "fp16", 32, "bfloat16", True, True, True, False)
    twins, gradient = with_bad(bad, "master", case)
    twins.step(1, gradient, TAKEN)
    assert not twins.weights[GUARD + 1, 3].isfinite()
    assert twins.weights[GUARD].isfinite().all()


@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("place", ["gradient", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_nan_stays_nan(fmt: str, place: str, clamped: bool) -> None:
    """Of either sign, in two steps: a CPU makes negative ones."""
    for bad in (torch.nan, -torch.nan):
        case = Case(fmt, "fp32", fmt, fmt, 32, "bfloat16", True, clamped, True, False)
        twins, gradient = with_bad(bad, place, case)
        twins.step(1, gradient, TAKEN)
        twins.step(2, gradient, TAKEN)


def test_a_denormal_exp_avg() -> None:
    case = Case("fp32", "fp32", "fp16", "fp32", 32, "bfloat16", True, False, True, False)
    p, m, v = (rows_of(["normal"] * 4, 32, seed) for seed in range(3))
    Twins(case, segments_of([4], 32), [p, m * 2.0**-138, v.abs()], 0).step(1, torch.zeros(4, 32), TAKEN)
