"""exp_avg over the root of exp_avg_sq in INT8, and draws that spread from step to step."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adam import CPU, SCALARS, Trial, blocks_of, normal
from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import NOT_FINITE, Blocks, decode
from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP16, FP32, INT8, UE4M4, Format
from ds_fp8.ops.moments import encode_quotient, quotient, square_root
from ds_fp8.ops.rounding import (
    EXP_AVG_SQ,
    FEWER_BITS,
    PERIOD,
    Rounding,
    fewer_bits,
    key,
    random_bits,
    random_words,
    stream,
    upper_bits,
)

SQUARES = (FP32, FP16, BF16, UE4M4, E4M3, E5M2)
each_square = pytest.mark.parametrize("square", SQUARES, ids=lambda fmt: fmt.name)


def codes_of(values: Tensor, bits: Tensor | None = None) -> Blocks:
    out = Blocks.zeros(*values.shape, INT8, CPU)
    encode_quotient(values, out, bits)
    return out


def state_of(m: Tensor, v: Tensor, square: Format = UE4M4) -> AdamState:
    """Moments of one vector, rounded to nearest."""
    rows = m.numel() // 32
    state = AdamState(*(Blocks.zeros(rows, 32, fmt, CPU) for fmt in (FP32, INT8, square)))
    m, v = m.view(rows, 32), v.view(rows, 32)
    state.set_second_moment(v, square_root(v))
    state.set_first_moment(m, square_root(v))
    return state


def test_quotients_are_whole_numbers_times_the_smallest_scale_that_holds_them() -> None:
    values = normal(32 * 50, seed=0).view(50, 32) * torch.exp2(torch.arange(50.0) - 25)[:, None]
    blocks = codes_of(values)
    largest = blocks.codes.abs().amax(dim=1)
    assert ((largest >= 64) & (largest <= 127)).all()
    assert ((decode(blocks) - values).abs().amax(dim=1) <= values.abs().amax(dim=1) / 126).all()


@pytest.mark.parametrize(
    ("largest", "code"), [(127.0, 127), (127.25, 64), (128.0, 64), (64.0, 64), (63.0, 126)]
)
def test_the_scale_is_that_of_the_largest(largest: float, code: int) -> None:
    values = torch.zeros(1, 32)
    values[0, 5] = -largest
    assert codes_of(values).codes[0, 5] == -code


@pytest.mark.parametrize("bits", [0, 1 << FEWER_BITS - 1, (1 << FEWER_BITS) - 1])
def test_zeros_stay_zeros_with_every_draw(bits: int) -> None:
    blocks = codes_of(torch.zeros(2, 32), torch.full((2, 32), bits, dtype=torch.int32))
    assert not blocks.codes.any()
    assert (blocks.scales == 1).all()


@pytest.mark.parametrize("value", [1e-45, 2.0**-126, 2.0**-110, 1e30, 2.0**127])
def test_quotients_of_every_size(value: float) -> None:
    """Nearest and with any draw: no code turns over, and below 2^-104 what is lost is lost towards 0."""
    values = torch.tensor([[value, -value, value / 2, 0.0] * 8])
    most = (1 << FEWER_BITS) - 1
    for bits in (None, torch.zeros(1, 32, dtype=torch.int32), torch.full((1, 32), most, dtype=torch.int32)):
        stored = decode(codes_of(values, bits))
        assert ((stored - values).abs() <= max(value / 63, 2.0**-104)).all()
        assert (stored.abs() <= value * 65 / 64 + 2.0**-126).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite(bad: float) -> None:
    values = torch.ones(2, 32)
    values[1, 3] = bad
    blocks = codes_of(values)
    assert blocks.scales is not None
    assert blocks.scales.tolist() == [codes_of(torch.ones(1, 32)).scales[0], NOT_FINITE]  # type: ignore[index]
    assert not decode(blocks)[1].isfinite().any()


def test_draws_round_up_with_the_probability_of_the_remainder() -> None:
    count = 1 << 14
    for remainder in (0.0, 1e-3, 0.25, 0.6, 0.999):
        for sign in (1, -1):
            values = torch.full((count // 32, 32), sign * (40 + remainder))
            values[:, 0] = 127.0
            words = random_words(key(stream(1, 1, EXP_AVG_SQ), 0), 0, count, CPU)
            codes = codes_of(values, fewer_bits(words).view(-1, 32)).codes[:, 1:].float()
            sigma = math.sqrt(remainder * (1 - remainder) / codes.numel())
            assert abs(float(codes.mean()) - sign * (40 + remainder)) <= 4 * sigma + 2.0**-FEWER_BITS
            assert codes.unique().numel() <= 2


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 4.0]), square=st.sampled_from(SQUARES))
def test_moments_that_were_read_are_written_back_to_the_bit(seed: int, spread: float, square: Format) -> None:
    size = torch.exp(spread * normal(320, seed + 1))
    state = state_of(normal(320, seed) * size, size.square(), square)
    state.exp_avg.codes[:, 0] = 127  # of which a little more would take the next scale
    before = [state.exp_avg.codes.clone(), state.exp_avg.scales.clone()]  # type: ignore[union-attr]
    state.set_first_moment(state.first_moment(), state.root())
    assert torch.equal(state.exp_avg.codes, before[0])
    assert torch.equal(state.exp_avg.scales, before[1])  # type: ignore[arg-type]


@each_square
def test_what_rounding_changes_in_v_it_changes_in_m(square: Format) -> None:
    """The quotient that the next step divides out is that of before, to a code."""
    m, size = normal(3200, seed=0), torch.exp(2 * normal(3200, seed=1))
    m, v = m * size, size.square()
    state = state_of(m, v, square)
    found, exact = quotient(state.first_moment(), state.root()), quotient(m, square_root(v)).view(-1, 32)
    assert ((found - exact).abs() <= exact.abs().amax(dim=1, keepdim=True) / 126).all()


@each_square
def test_m_of_zero_beside_v_of_zero(square: Format) -> None:
    m, v = normal(64, seed=0), torch.rand(64)
    m[::3], v[::3] = 0.0, 0.0
    state = state_of(m, v, square)
    assert not state.first_moment().view(-1)[::3].any()
    assert state.first_moment().isfinite().all()


@each_square
def test_m_where_v_is_gone_is_stored_as_zero(square: Format) -> None:
    """It would be the whole block's scale."""
    m, v = torch.full((32,), 0.5), torch.ones(32)
    m[3], v[3] = 1e-22, 0.0
    state = state_of(m, v, square)
    assert state.first_moment()[0, 3] == 0
    assert ((state.first_moment()[0, 4:] - 0.5).abs() < 0.01).all()


@each_square
@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.5, 0.0])
def test_m_decays_by_beta1_whatever_beta2_is(square: Format, beta2: float) -> None:
    """Without a gradient, in the mean over 4,096 elements; a block's elements are apart by a factor of 8."""
    trial = Trial(torch.zeros(4096), (FP32, INT8, square))
    size = torch.exp2(torch.arange(4096) % 4)
    scalars = replace(SCALARS, beta2=beta2)
    trial.step(size, replace(scalars, beta2=0.95))
    begin = trial.state.first_moment().view(-1)
    trial.step(torch.zeros(4096), replace(scalars, step=2))
    kept = trial.state.first_moment().view(-1) / begin
    assert abs(float(kept.mean()) / 0.9 - 1) < (0.01 if square is not E5M2 else 0.03)


def test_a_step_divides_the_quotient_out_of_both() -> None:
    """Against exact Adam the error of 100 steps is less than half of that with m in E4M3."""
    errors = {}
    size = torch.exp(normal(8192, seed=99))
    for m in (INT8, E4M3, FP32):
        trial = Trial(torch.zeros(8192), (FP32, m, UE4M4 if m is not FP32 else FP32))
        for step in range(1, 101):
            gradient = (normal(8192, seed=0) * 0.3 + normal(8192, seed=step)) * size
            trial.step(gradient, replace(SCALARS, step=step, clamp=1.165))
        errors[m] = trial.master
    exact = errors.pop(FP32)
    int8, e4m3 = (float((each - exact).norm() / exact.norm()) for each in (errors[INT8], errors[E4M3]))
    assert int8 < 0.5 * e4m3


# Draws


def draws(rounding: Rounding, first: int, steps: int, *, elements: int = 256, fewer: bool = False) -> Tensor:
    """[steps, elements] in [0, 1)."""
    rows = []
    for step in range(first, first + steps):
        word = key(rounding.stream(step, EXP_AVG_SQ), 3)
        words = random_words(word, 0, elements, CPU, rounding.multiplier(step), int(rounding.spread))
        rows.append(fewer_bits(words) / 2.0**FEWER_BITS if fewer else upper_bits(words) / 2.0**24)
    return torch.stack(rows)


def largest_gap(values: Tensor) -> Tensor:
    """Of each column of [steps, elements], round the circle."""
    ordered = values.sort(dim=0).values
    around = (ordered[:1] + 1 - ordered[-1:]).view(1, -1)
    return torch.cat([ordered.diff(dim=0), around]).amax(dim=0)


each_draw = pytest.mark.parametrize("fewer", [False, True], ids=["24 bits", "16 bits"])


@each_draw
@pytest.mark.parametrize("steps", [2, 4, 16, 128, PERIOD])
def test_spread_draws_fill_the_interval_evenly(steps: int, fewer: bool) -> None:
    """From a multiple of their number on; independent ones do so by accident."""
    for first in (0, steps, 5 * steps):
        gaps = largest_gap(draws(Rounding(7, spread=True), first, steps, fewer=fewer))
        assert ((gaps - 1 / steps).abs() <= 2.0**-15).all()
    independent = largest_gap(draws(Rounding(7), 0, steps, fewer=fewer))
    assert ((independent - 1 / steps).abs() > 2.0**-15).float().mean() > 0.99


@each_draw
@pytest.mark.parametrize("step", [1, 100, PERIOD - 1, PERIOD, 10 * PERIOD + 3])
def test_draws_of_a_step_are_uniform_over_the_elements(step: int, fewer: bool) -> None:
    count = 1 << 16
    values = draws(Rounding(7, spread=True), step, 1, elements=count, fewer=fewer)[0]
    observed = torch.histc(values, 64, 0, 1)
    chi_square = float(((observed - count / 64) ** 2 / (count / 64)).sum())
    assert abs(chi_square - 63) / math.sqrt(2 * 63) < 4
    assert abs(float((values[1:] * values[:-1]).mean()) - 0.25) < 4 * math.sqrt(7 / 144 / count)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(((one - 0.5) * (other - 0.5)).mean()) * 12


@pytest.mark.parametrize("spread", [False, True])
def test_what_is_rounded_with_both_draws_of_a_word_goes_up_together_as_often_as_apart(spread: bool) -> None:
    """Over all pairs of remainders; with one draw for both the correlation is 1."""
    both = [
        draws(Rounding(7, spread=spread), 1, 1, elements=1 << 16, fewer=each)[0] for each in (False, True)
    ]
    assert abs(correlation(*both)) < 4 / math.sqrt(1 << 16)


@pytest.mark.parametrize("apart", [16, 34, 128])
def test_steps_that_are_alike_for_one_element_are_not_for_another(apart: int) -> None:
    """What the odd numbers are for: between two steps elements turn by angles of their own."""
    values = draws(Rounding(7, spread=True), 0, apart + 1, elements=1 << 14)
    turns = (values[apart] - values[0]) % 1.0
    assert turns.mul(PERIOD).round().unique().numel() >= 16


def test_starts_are_drawn_anew_after_a_period() -> None:
    rounding = Rounding(7, spread=True)
    before, after = (draws(rounding, step, 1, elements=1 << 14)[0] for step in (0, PERIOD))
    assert abs(correlation(before, after)) < 4 / math.sqrt(1 << 14)


def test_independent_draws_are_those_of_before() -> None:
    rounding = Rounding(7)
    for step in (1, PERIOD):
        word = rounding.stream(step, EXP_AVG_SQ)
        assert word == stream(7, step, EXP_AVG_SQ)
        words = random_words(word, 0, 64, CPU, rounding.multiplier(step), int(rounding.spread))
        assert torch.equal(upper_bits(words), random_bits(word, 0, 64, CPU))


def test_blocks_of_helpers_hold_quotients() -> None:
    held = blocks_of(torch.linspace(-1, 1, 64), INT8)
    assert (decode(held).view(-1) - torch.linspace(-1, 1, 64)).abs().max() < 1 / 100
