"""The Adam sweep of kernels beside the reference's, for the tests of Triton and C++ both.

Formats come from the configuration's own tables, so that what is built tomorrow is swept tomorrow.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import sqrt
from typing import Any, get_args

import pytest
import torch
from hypothesis import strategies as st
from kernel_support import (
    BAD,
    CPU,
    GUARD,
    ROW_KINDS,
    Kernels,
    assert_same,
    assert_same_blocks,
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
from torch import Tensor

from ds_fp8.config.section import ROUNDED, FP8Config, GradientsSection, OptimizerSection
from ds_fp8.ops import adam
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep, next_clamp
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BF16, BY_NAME, FP32, Format
from ds_fp8.ops.health import STATE_COUNTS
from ds_fp8.ops.masters import store_masters
from ds_fp8.ops.rounding import Rounding

BETAS = (0.9, 0.95)
FORMATS = ("gradient", "master", "exp_avg", "exp_avg_sq")
STATES = FORMATS[1:]


def literals(annotation: Any) -> Iterator[Any]:
    """The values of `Literal[...] | None`."""
    for each in get_args(annotation):
        yield from literals(each) if get_args(each) else [] if each is type(None) else [each]


def built(key: str) -> list[str]:
    """The formats of an optimizer state that this version takes."""
    values = literals(OptimizerSection.model_fields[key].annotation)
    return [*values]


DIMENSIONS: dict[str, Sequence[Any]] = {
    "gradient": sorted(
        {
            x
            for key in ("dtype", "accum_dtype")
            for x in literals(GradientsSection.model_fields[key].annotation)
        }
    ),
    "master": [*built("master_dtype"), *(f"{name}, stochastic" for name in ROUNDED)],
    "exp_avg": built("exp_avg_dtype"),
    "exp_avg_sq": built("exp_avg_sq_dtype"),
    "block_size": list(literals(FP8Config.model_fields["block_size"].annotation)),
    "weights": ["bfloat16", "float16", "float32"],
    "decoupled": [True, False],
    "clamped": [True, False],
    "bias_correction": [True, False],
    "counted": [False, True],
    "spread": [False, True],
}


@dataclass(frozen=True)
class Case:
    """One value of each of DIMENSIONS; weights beside a split master are BF16 all the same."""

    gradient: str
    master: str
    exp_avg: str
    exp_avg_sq: str
    block_size: int
    weights: str
    decoupled: bool = True
    clamped: bool = True
    bias_correction: bool = True
    counted: bool = False
    spread: bool = False
    weight_decay: float = 0.1
    betas: tuple[float, float] = BETAS

    def __str__(self) -> str:
        switches = ("decoupled", "clamped", "bias_correction", "counted", "spread")
        names = (self.gradient, self.master, self.exp_avg, self.exp_avg_sq, self.block_size, self.weights)
        return "-".join(map(str, [*names, *(each for each in switches if getattr(self, each))]))

    @property
    def states(self) -> list[Format]:
        return [BY_NAME[getattr(self, name).split(",")[0]] for name in STATES]

    @property
    def stochastic(self) -> bool:
        return self.master.endswith("stochastic")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.states[0].split else getattr(torch, self.weights)  # type: ignore[no-any-return]

    def scalars(self, step: int) -> AdamScalars:
        clamp = sqrt(next_clamp(None, self.betas)) if self.clamped else None
        decay = self.weight_decay
        return AdamScalars(step, 1e-2, *self.betas, 1e-8, decay, self.decoupled, self.bias_correction, clamp)


CASES = st.builds(Case, **{name: st.sampled_from(values) for name, values in DIMENSIONS.items()})


each_first_format = pytest.mark.parametrize("gradient", DIMENSIONS["gradient"])


def products(gradient: str) -> Iterator[tuple[str, ...]]:
    """Each format of the states beside one of the gradient."""
    return product([gradient], *(DIMENSIONS[name] for name in FORMATS[1:]))


def combinations_of(formats: Sequence[str]) -> Iterator[Case]:
    """Every block size, the other dimensions drawn at random: all pairs of them are tried elsewhere."""
    draw = random.Random("-".join(formats))
    others = [name for name in DIMENSIONS if name not in (*FORMATS, "block_size")]
    for block_size in DIMENSIONS["block_size"]:
        drawn = {name: draw.choice(DIMENSIONS[name]) for name in others}
        yield Case(**dict(zip(FORMATS, formats, strict=True)), block_size=block_size, **drawn)


class Twins:
    """The same states and weights twice, between guards: the reference's and the kernels'."""

    def __init__(
        self,
        kernels: Kernels,
        case: Case,
        segments: Sequence[Segment],
        values: Sequence[Tensor],
        padding: int = 0,
    ) -> None:
        """values: of the states; rows after the segments, `padding` of them, hold zeros."""
        self.kernels, self.case, self.segments = kernels, case, segments
        self.rows = len(values[0]) + padding
        empty = torch.zeros(padding, case.block_size)
        self.padding = empty
        self.weights = garbage(self.rows + 2 * GUARD, case.block_size, dtype=case.dtype)
        self.weights[len(self.weights) - GUARD - padding : len(self.weights) - GUARD] = 0
        self.states = [
            self._start(torch.cat([x, empty]), fmt) for fmt, x in zip(case.states, values, strict=True)
        ]
        self.twin_states = [to(each, kernels.device) for each in self.states]
        self.twin_weights = self.weights.to(kernels.device, copy=True)

    def _start(self, values: Tensor, fmt: Format) -> Blocks:
        if not fmt.split:
            return guarded(values, fmt)
        outer = dirty(len(values), values.shape[1], fmt)
        store_masters(values.view(-1), inner(outer), self.weights[GUARD:-GUARD])
        return outer

    def step(self, step: int, gradient: Tensor, control: Tensor, seed: int = 5) -> None:
        case, kernels = self.case, self.kernels
        blocks = inner(guarded(torch.cat([gradient, self.padding]), BY_NAME[case.gradient]))
        plan = adam.plan(self.segments, self.rows, case.block_size, CPU)
        state = AdamState(*map(inner, self.states))
        counts = torch.zeros(STATE_COUNTS, dtype=torch.float64) if case.counted else None
        sweep = Sweep(
            state=state,
            gradient=blocks,
            weights=self.weights[GUARD:-GUARD],
            plan=plan,
            scalars=case.scalars(step),
            control=control,
            rounding=Rounding(seed, case.stochastic, case.spread),
            counts=counts,
        )
        adam.adam_step(sweep)
        twin = replace(
            sweep,
            state=AdamState(*map(inner, self.twin_states)),
            gradient=to(blocks, kernels.device),
            weights=self.twin_weights[GUARD:-GUARD],
            plan=kernels.ops.plan(self.segments, self.rows, case.block_size, kernels.device),
            control=control.to(kernels.device),
            counts=None if counts is None else torch.zeros_like(counts, device=kernels.device),
        )
        kernels.ops.adam_step(twin)
        self.check(f"{case}, step {step}")
        if counts is not None and twin.counts is not None:
            found, expected = twin.counts.tolist(), counts.tolist()
            assert found == expected, f"{case}, step {step}: counts {found}, expected {expected}"

    def check(self, what: str) -> None:
        for name, expected, actual in zip(STATES, self.states, self.twin_states, strict=True):
            assert_same_blocks(actual, expected, f"{what}, {name}")
        assert_same(self.twin_weights, self.weights, f"{what}, weights")


def segments_of(lengths: Sequence[int], block_size: int) -> list[Segment]:
    """Consecutive segments; the first begins inside its parameter, where 2^32 elements are passed."""
    segments, row = [], 0
    for index, length in enumerate(lengths):
        first_element = 2**32 - 2 * block_size if index == 0 else 0
        segments.append(Segment(slice(row, row + length), (7 * index + 3) % 1000, first_element))
        row += length
    return segments


MASTERS = ("normal", "zero", "strong", "denormal", "tiny")
MOMENTS = (*MASTERS, "weak", "sparse", "faint")
LENGTHS = (5, 1, 1, 1, 2, 1, 7, 1, 3)  # blocks of segments; many begin within one tile
TAKEN = torch.tensor([0.3, 1.0])


@dataclass(frozen=True)
class Steps:
    """Steps over rows of every kind, after which come rows of padding; kinds meet in turn."""

    lengths: Sequence[int]
    turn: int
    padding: int
    seed: int
    steps: int = 1
    masters: Sequence[str] = MASTERS
    moments: Sequence[str] = MOMENTS

    def initial(self, case: Case) -> list[Tensor]:
        """Rows of the states."""
        rows, size = sum(self.lengths), case.block_size
        p = rows_of(cycled(self.masters, rows, self.turn), size, self.seed)
        m, v = (rows_of(cycled(self.moments, rows, self.turn * i), size, self.seed + i) for i in (1, 2))
        # v ends where FP32 does, in the sweep's unit; a root in the middle
        return [p, m, v.abs().clamp(max=2.0**40)]

    def gradient(self, case: Case, step: int) -> Tensor:
        kinds = cycled(self.moments, sum(self.lengths), self.turn * step)
        return rows_of(kinds, case.block_size, self.seed + 10 * step)


def check_sweep(kernels: Kernels, case: Case, sweep: Steps) -> None:
    segments = segments_of(sweep.lengths, case.block_size)
    twins = Twins(kernels, case, segments, sweep.initial(case), sweep.padding)
    for step in range(1, sweep.steps + 1):
        twins.step(step, sweep.gradient(case, step), TAKEN, sweep.seed)


def sweeps(moments: Sequence[str]) -> st.SearchStrategy[Steps]:
    """No segment at all, many in a tile, over several tiles; padding of more than a tile."""
    return st.builds(
        Steps,
        lengths=st.lists(st.one_of(st.just(1), st.integers(1, 20)), max_size=12),
        turn=st.integers(0, 5),
        padding=st.integers(0, 20),
        seed=st.integers(0, 1000),
        moments=st.just(moments),
    )


def check_every_nasty_master(kernels: Kernels, fmt: Format, gradient: str) -> None:
    """Midpoints, denormals and what is not finite become weights, in a step that moves no master."""
    values = torch.cat([nasty_values(fmt)[::7], special_values(), torch.tensor(BAD)])
    masters = values[: len(values) // 256 * 256].view(-1, 256)
    zeros = torch.zeros_like(masters)
    weights = str(fmt.dtype).removeprefix("torch.")
    case = Case(gradient, "fp32", "fp32", "fp32", 256, weights, weight_decay=0.0)
    twins = Twins(kernels, case, segments_of([len(masters)], 256), [masters, zeros, zeros])
    twins.step(1, zeros, TAKEN)
    assert_same(inner(twins.states[0]).codes, masters, "masters")


def check_every_nasty_split_master(kernels: Kernels, master: str, every: int = 1) -> None:
    """Midpoints of the weights and of what is kept, in a step that moves no master, nearest or not.

    every: one value in `every` is taken.
    """
    fmt = BY_NAME[master.split(",", maxsplit=1)[0]]
    kept = torch.arange(0, 1 << 24, 4093, dtype=torch.int32) << 7  # half a code of SPLIT8 is 1 << 7
    values = [*map(nasty_values, (BF16, FP32)), kept.view(torch.float32), torch.tensor(BAD)]
    masters = torch.cat(values)[::every]
    masters = masters[: len(masters) // 256 * 256].view(-1, 256)
    zeros = torch.zeros_like(masters)
    case = Case("fp32", master, "fp32", "fp32", 256, "bfloat16", weight_decay=0.0)
    twins = Twins(kernels, case, segments_of([len(masters)], 256), [masters, zeros, zeros])
    before = inner(twins.states[0]).codes.clone()
    twins.step(1, zeros, TAKEN)
    finite = twins.weights[GUARD:-GUARD].isfinite()
    assert torch.equal(inner(twins.states[0]).codes[finite], before[finite]), f"{fmt.name} masters moved"


def check_every_weight_beside_every_lower_half(kernels: Kernels, master: str, every: int = 1) -> None:
    """Every BF16 weight and lower halves of each class, as edits of weights leave them.

    every: one weight in `every` is taken, and all of those next to zero.
    """
    fmt = BY_NAME[master.split(",", maxsplit=1)[0]]
    top = 1 << 8 * fmt.itemsize - 1
    low = torch.tensor([0, 1, 5, top - 1, -top, 1 - top, -5, -1]).to(fmt.dtype)
    high = torch.arange(1 << 16)
    high = high[(high % every == 0) | (high & 0x7FFF < 64)].to(torch.int16).view(torch.bfloat16)
    high = high[: len(high) // 32 * 32]
    codes, weights = low.repeat(len(high)).view(-1, 256), high.repeat_interleave(len(low)).view(-1, 256)
    zeros = torch.zeros(weights.shape)
    case = Case("fp32", master, "fp32", "fp32", 256, "bfloat16", weight_decay=0.0)
    twins = Twins(kernels, case, segments_of([len(weights)], 256), [zeros] * 3)
    for states, held in ((twins.states, twins.weights), (twins.twin_states, twins.twin_weights)):
        inner(states[0]).codes.copy_(codes)
        held[GUARD:-GUARD] = weights
    twins.step(1, zeros, TAKEN)
    stepped = twins.weights[GUARD:-GUARD]
    largest = weights.abs() == torch.finfo(torch.bfloat16).max  # may round up
    assert stepped[weights.isfinite() & ~largest].isfinite().all()


def check_a_skipped_step(kernels: Kernels, case: Case) -> None:
    """Garbage in the states, NaN in the weights; and a step that is taken leaves nothing as it was."""
    size = case.block_size
    outer = [to(dirty(40, size, fmt), kernels.device) for fmt in case.states]
    weights = torch.full((40, size), torch.nan, dtype=case.dtype, device=kernels.device)
    tensors = [weights, *(x for each in outer for x in (each.codes, each.scales) if x is not None)]
    before = [raw(each).clone() for each in tensors]
    values = rows_of(cycled(ROW_KINDS, 40), size, seed=0)
    gradient = to(inner(guarded(values, BY_NAME[case.gradient])), kernels.device)
    plan = kernels.ops.plan(segments_of([20, 1, 1, 18], size), 40, size, kernels.device)
    for go in (0.0, 1.0):
        control = torch.tensor([0.3, go], device=kernels.device)
        state = AdamState(*map(inner, outer))
        kernels.ops.adam_step(Sweep(state, gradient, weights, plan, case.scalars(1), control, Rounding(0)))
        same = [torch.equal(raw(each), was) for each, was in zip(tensors, before, strict=True)]
        assert same == [not go] * len(tensors)


def with_bad(kernels: Kernels, value: float, place: str, case: Case) -> tuple[Twins, Tensor]:
    """Normal rows with one element that is not, in the gradient or in a state."""
    size = case.block_size
    names = [*STATES, "gradient"]
    values = {name: rows_of(["normal"] * 4, size, seed) for seed, name in enumerate(names)}
    values["exp_avg_sq"].abs_()
    values[place][1, 3] = value
    states = [values[name] for name in STATES]
    return Twins(kernels, case, segments_of([4], size), states), values["gradient"]


def check_a_bad_master(kernels: Kernels, master: str, bad: float) -> None:
    case = Case("bf16", master, "e4m3", "fp16", 32, "bfloat16")
    twins, gradient = with_bad(kernels, bad, "master", case)
    twins.step(1, gradient, TAKEN)
    assert not twins.weights[GUARD + 1, 3].isfinite()
    assert twins.weights[GUARD].isfinite().all()


def check_nan_stays_nan(
    kernels: Kernels, fmt: str, place: str, *, clamped: bool, nans: Sequence[float] = (torch.nan, -torch.nan)
) -> None:
    """Of either sign, in two steps: a CPU makes negative ones."""
    for bad, gradient_format in product(nans, (fmt, "fp32")):
        case = Case(gradient_format, "fp32", fmt, fmt, 32, "bfloat16", clamped=clamped)
        twins, gradient = with_bad(kernels, bad, place, case)
        twins.step(1, gradient, TAKEN)
        twins.step(2, gradient, TAKEN)


def check_a_denormal_exp_avg(kernels: Kernels) -> None:
    case = Case("fp32", "fp32", "fp16", "fp32", 32, "bfloat16", clamped=False)
    p, m, v = (rows_of(["normal"] * 4, 32, seed) for seed in range(3))
    twins = Twins(kernels, case, segments_of([4], 32), [p, m * 2.0**-138, v.abs()])
    twins.step(1, torch.zeros(4, 32), TAKEN)
