"""The Adam sweep as a Triton kernel equals the reference bit for bit, step after step.

Pairs of all dimensions are covered here, the full product by the slow test.
"""

import random
from itertools import chain
from typing import Any

import pytest
import torch
from grids import pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import BAD
from sweep_checks import (
    CASES,
    DIMENSIONS,
    LENGTHS,
    MOMENTS,
    Case,
    Steps,
    check_a_bad_master,
    check_a_denormal_exp_avg,
    check_a_skipped_step,
    check_every_nasty_master,
    check_every_nasty_split_master,
    check_every_weight_beside_every_lower_half,
    check_nan_stays_nan,
    check_sweep,
    combinations_of,
    each_first_format,
    products,
    sweeps,
)
from triton_support import CONVERSIONS, TRITON, conversion

from ds_fp8.ops.adam import Segment
from ds_fp8.ops.formats import BF16, FP16, Format
from ds_fp8.ops.triton import adam as triton_adam
from ds_fp8.ops.triton.launching import INTERPRETED

# On a GPU the root of v is right for 0 and from 2^-102 on, in the sweep's unit; an interpreted one always is.
KINDS = MOMENTS if INTERPRETED else tuple(kind for kind in MOMENTS if kind != "faint")
SPLIT = [name for name in DIMENSIONS["master"] if name.startswith("split")]
DRAWN = 250  # of about 1,150: the interpreter takes a fifth of a second for each
PAIRS = pairwise({**DIMENSIONS, "hardware": CONVERSIONS})


@pytest.mark.parametrize("choice", PAIRS, ids=lambda choice: "-".join(map(str, choice.values())))
def test_every_pair(choice: dict[str, Any]) -> None:
    case = Case(**{name: choice[name] for name in DIMENSIONS})
    with conversion(choice["hardware"]):
        check_sweep(TRITON, case, Steps(LENGTHS, turn=1, padding=2, seed=0, steps=3, moments=KINDS))


@pytest.mark.slow
@each_first_format
def test_many_combinations(gradient: str) -> None:
    """Beside every pair some of all combinations. FP8 is converted by each format alone: one way per case."""
    draw = random.Random(gradient)
    cases = list(chain.from_iterable(map(combinations_of, products(gradient))))
    for case in draw.sample(cases, DRAWN):
        with conversion(draw.choice(CONVERSIONS)):
            check_sweep(TRITON, case, Steps((2, 1, 1, 3), turn=1, padding=1, seed=1, steps=2, moments=KINDS))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(case=CASES, sweep=sweeps(KINDS), hardware=st.sampled_from(CONVERSIONS))
def test_any_segments(case: Case, sweep: Steps, hardware: bool) -> None:
    with conversion(hardware):
        check_sweep(TRITON, case, sweep)


@pytest.mark.parametrize("fmt", [BF16, FP16], ids=lambda fmt: fmt.name)
def test_every_nasty_master_is_rounded_to_a_weight(fmt: Format) -> None:
    with conversion(hardware=False):
        check_every_nasty_master(TRITON, fmt, "fp32")


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("master", SPLIT)
def test_every_nasty_master_is_split(master: str, every: int) -> None:
    with conversion(hardware=False):
        check_every_nasty_split_master(TRITON, master, every)


@pytest.mark.parametrize("master", SPLIT)
def test_every_weight_beside_every_lower_half(master: str) -> None:
    """Zeros among them, beside a negative one: nothing to borrow from."""
    with conversion(hardware=False):
        check_every_weight_beside_every_lower_half(TRITON, master, every=31)


@pytest.mark.parametrize("exp_avg_sq", DIMENSIONS["exp_avg_sq"])
@pytest.mark.parametrize("clamped", [True, False])
def test_a_skipped_step_leaves_every_byte(exp_avg_sq: str, clamped: bool) -> None:
    with conversion(hardware=False):
        check_a_skipped_step(
            TRITON, Case("e4m3", "fp16", "e4m3", exp_avg_sq, 64, "bfloat16", clamped=clamped)
        )


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("master", DIMENSIONS["master"])
def test_a_master_that_is_not_finite(master: str, bad: float) -> None:
    with conversion(hardware=False):
        check_a_bad_master(TRITON, master, bad)


@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("place", ["gradient", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_nan_stays_nan(fmt: str, place: str, clamped: bool) -> None:
    with conversion(hardware=False):
        check_nan_stays_nan(TRITON, fmt, place, clamped=clamped)


def test_a_denormal_exp_avg() -> None:
    with conversion(hardware=False):
        check_a_denormal_exp_avg(TRITON)


def test_rows_before_the_first_segment_read_its_entry_of_the_table() -> None:
    """Padding, with which a rank's part of a bucket begins if it has none of the first parameters."""
    plan = triton_adam.plan([Segment(slice(40, 90), 3, 0)], 400, 128, torch.device("cpu"))
    assert plan.tile_segments.tolist() == [0] * len(plan.tile_segments)
