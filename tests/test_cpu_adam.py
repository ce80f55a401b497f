"""The Adam sweep in C++ equals the reference bit for bit, step after step, whatever the instruction set.

Pairs of all dimensions are covered here, the full product of formats by the slow test.
"""

from itertools import combinations, product

import pytest
import torch
from cpu_support import CPP, ISAS, each_isa, running
from grids import pairwise
from hypothesis import given, settings
from kernel_support import BAD, ROW_KINDS, cycled, each_decoded_format, in_rows, nasty_values, rows_of
from sweep_checks import (
    CASES,
    DIMENSIONS,
    LENGTHS,
    MOMENTS,
    TAKEN,
    Case,
    Steps,
    Twins,
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
    segments_of,
    sweeps,
)

from ds_fp8.config.section import LEVELS, ROUNDED
from ds_fp8.ops.adam import Segment
from ds_fp8.ops.formats import BF16, FP16, Format

PAIRS = [Case(**choice) for choice in pairwise(DIMENSIONS)]
PRESETS = [
    (f"{level.master}{', stochastic' * (level.master in ROUNDED)}", level.exp_avg, level.exp_avg_sq)
    for level in LEVELS.values()
]
SPLIT = [name for name in DIMENSIONS["master"] if name.startswith("split")]
WEIGHTS = ("bfloat16", "float32")  # in place, and by pointer

KINDS = tuple(dict.fromkeys([*ROW_KINDS, *MOMENTS]))

each_state = pytest.mark.parametrize("states", PRESETS, ids="-".join)


@each_isa
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_every_pair(case: Case, isa: str) -> None:
    with running(isa):
        check_sweep(CPP, case, Steps(LENGTHS, turn=1, padding=2, seed=0, steps=3))


@pytest.mark.slow
@each_isa
@each_first_format
def test_every_combination(gradient: str, isa: str) -> None:
    with running(isa):
        for formats in products(gradient):
            for case in combinations_of(formats):
                check_sweep(CPP, case, Steps((5, 1, 1, 9), turn=1, padding=1, seed=1, steps=2))


@each_isa
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gradient", DIMENSIONS["gradient"])
@each_state
def test_presets(states: tuple[str, str, str], gradient: str, weights: str, isa: str) -> None:
    """What runs in place and the same by pointer, with every count of rows that a batch may be left with."""
    with running(isa):
        for block_size in DIMENSIONS["block_size"]:
            case = Case(gradient, *states, block_size, weights)
            check_sweep(CPP, case, Steps(range(1, 18), turn=1, padding=0, seed=2))


@each_isa
@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
@each_state
def test_rows_of_every_kind(states: tuple[str, str, str], weights: str, clamped: bool, isa: str) -> None:
    """In two places at a time, each kind meets each: not finite ones, and those too large to be squared.

    But for v where m is clamped, which then ends where its square does; and for a scaled m beside a master
    without a scale: what is read as NaN by one may be inf for another.
    """
    case, rows = Case("fp32", *states, 32, weights, clamped=clamped), len(KINDS) ** 2
    for one, other in combinations(range(4), 2):
        kinds = [["normal"] * rows] * 4
        kinds[one] = cycled(KINDS, rows)
        kinds[other] = sorted(kinds[one])
        p, m, v, gradient = (rows_of(each, 32, seed) for seed, each in enumerate(kinds))
        v = v.abs().nan_to_num(0).clamp(max=2.0**40) if clamped else v.abs()
        if case.states[1].scaled and not case.states[0].scaled:
            m = m.nan_to_num(0, 0, 0)
        with running(isa):
            Twins(CPP, case, segments_of([rows], 32), [p, m, v]).step(1, gradient, TAKEN)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(case=CASES, sweep=sweeps(MOMENTS))
def test_any_segments(case: Case, sweep: Steps) -> None:
    for isa in ISAS:
        with running(isa):
            check_sweep(CPP, case, sweep)


@each_isa
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (40, 3, 1, 25), (1,) * 30], ids=len)
def test_threads_share_the_rows(lengths: tuple[int, ...], threads: int, isa: str) -> None:
    """Also where there are fewer rows than threads."""
    with running(isa, threads):
        for states, weights in product(PRESETS, WEIGHTS):
            case = Case("e4m3", *states, 32, weights)
            check_sweep(CPP, case, Steps(lengths, turn=1, padding=1, seed=3, steps=2))


@each_isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weights", WEIGHTS)
@each_state
def test_rows_outside_segments_are_kept(
    states: tuple[str, str, str], weights: str, threads: int, isa: str
) -> None:
    """Before the first, between two, after the last; whatever they hold."""
    case, sweep = Case("bf16", *states, 64, weights), Steps([40], turn=1, padding=0, seed=4)
    rows = [slice(2, 5), slice(5, 6), slice(9, 20), slice(31, 32)]
    segments = [Segment(each, parameter, 64 * parameter) for parameter, each in enumerate(rows)]
    with running(isa, threads):
        Twins(CPP, case, segments, sweep.initial(case)).step(1, sweep.gradient(case, 1), TAKEN)


@each_isa
@pytest.mark.parametrize("others", [("fp32", "fp32"), ("fp16", "e4m3")], ids="-".join)
@each_decoded_format
def test_every_nasty_root_is_rounded_stochastically(fmt: Format, others: tuple[str, str], isa: str) -> None:
    """With betas of 0 the root is the gradient's magnitude; each value meets many random bits."""
    values = nasty_values(fmt).abs()
    values = values.repeat(-(-(1 << 17) // len(values)))
    rows = in_rows(values, 256, fmt.max if fmt.scaled else 1.0)
    case = Case("fp32", *others, fmt.name, 256, "bfloat16", clamped=False, betas=(0.0, 0.0))
    zeros = torch.zeros_like(rows)
    with running(isa):
        Twins(CPP, case, segments_of([len(rows)], 256), [zeros, zeros, zeros]).step(1, rows, torch.ones(2))


@each_isa
@pytest.mark.parametrize("gradient", ["fp32", "e5m2"])
@pytest.mark.parametrize("fmt", [BF16, FP16], ids=lambda fmt: fmt.name)
def test_every_nasty_master_is_rounded_to_a_weight(fmt: Format, gradient: str, isa: str) -> None:
    with running(isa):
        check_every_nasty_master(CPP, fmt, gradient)


@each_isa
@pytest.mark.parametrize("master", SPLIT)
def test_every_nasty_master_is_split(master: str, isa: str) -> None:
    with running(isa):
        check_every_nasty_split_master(CPP, master)


@each_isa
@pytest.mark.parametrize("master", SPLIT)
def test_every_weight_beside_every_lower_half(master: str, isa: str) -> None:
    """Zeros among them, beside a negative one: nothing to borrow from."""
    with running(isa):
        check_every_weight_beside_every_lower_half(CPP, master)


@each_isa
@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("exp_avg_sq", DIMENSIONS["exp_avg_sq"])
def test_a_skipped_step_leaves_every_byte(exp_avg_sq: str, clamped: bool, isa: str) -> None:
    with running(isa):
        check_a_skipped_step(CPP, Case("e4m3", "fp16", "e4m3", exp_avg_sq, 64, "bfloat16", clamped=clamped))


@each_isa
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("master", DIMENSIONS["master"])
def test_a_master_that_is_not_finite(master: str, bad: float, isa: str) -> None:
    with running(isa):
        check_a_bad_master(CPP, master, bad)


@each_isa
@pytest.mark.parametrize(
    ("place", "clamped"),
    # Where a stored v is NaN, which no step that is taken makes, a clamped m may be NaN or not.
    [*product(["gradient", "exp_avg"], [True, False]), ("exp_avg_sq", False)],
)
@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_nan_stays_nan(fmt: str, place: str, clamped: bool, isa: str) -> None:
    """Also one with every bit set, which noise or half a code would carry to -0."""
    every_bit = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
    nans = (torch.nan, -torch.nan, every_bit, -every_bit)
    with running(isa):
        check_nan_stays_nan(CPP, fmt, place, clamped=clamped, nans=nans)


@each_isa
def test_a_denormal_exp_avg(isa: str) -> None:
    with running(isa):
        check_a_denormal_exp_avg(CPP)
