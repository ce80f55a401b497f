"""The Adam sweep against torch and against exact Adam in float64, the clamp, and what stays untouched."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import round_to_nearest
from test_blocks import LargestTemporary
from test_masters import bf16_of
from torch import Tensor

from ds_fp8.ops import blocks as blocks_module
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep, adam_step, next_clamp, plan
from ds_fp8.ops.blocks import Blocks, decode, dequantize, quantize
from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP16, FP32, SPLIT8, SPLIT16, UE4M4, Format
from ds_fp8.ops.masters import decode_masters, load_masters, store_masters
from ds_fp8.ops.moments import UNIT, decode_second_moment, encode_second_moment, square_root
from ds_fp8.ops.rounding import EXP_AVG_SQ, Rounding, key, random_bits, round_up_from_zero, stream

CPU = torch.device("cpu")
EXP_AVGS = (FP32, BF16, FP16, E4M3, E5M2)
ROOTS = (BF16, FP16, E4M3, E5M2, UE4M4)  # of exp_avg_sq; FP32 holds the square
EXP_AVG_SQS = (FP32, *ROOTS)
MASTERS = (FP32, FP16, BF16, SPLIT16, SPLIT8)
O1, O2, O2_PLUS = (FP32, FP32, FP32), (FP16, E4M3, FP16), (SPLIT16, E4M3, UE4M4)
CODE_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
BETAS = (0.9, 0.95)
SCALARS = AdamScalars(
    step=1,
    lr=1e-3,
    beta1=BETAS[0],
    beta2=BETAS[1],
    eps=1e-8,
    weight_decay=0.0,
    decoupled=True,
    bias_correction=True,
    clamp=None,
)
Formats = tuple[Format, Format, Format]  # of master, exp_avg, exp_avg_sq

each_level = pytest.mark.parametrize("formats", [O1, O2, O2_PLUS], ids=["O1", "O2", "O2+"])


def names(formats: object) -> str:
    if isinstance(formats, Format):
        return formats.name
    return "-".join(each.name for each in formats) if isinstance(formats, tuple) else str(formats)


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def blocks_of(values: Tensor, fmt: Format, block_size: int = 32) -> Blocks:
    out = Blocks.zeros(-(-values.numel() // block_size), block_size, fmt, CPU)
    rows = torch.zeros(len(out), block_size)
    rows.view(-1)[: values.numel()] = values
    round_to_nearest(rows, out)
    return out


def values_of(blocks: Blocks, count: int) -> Tensor:
    out = torch.empty(count)
    dequantize(blocks, out)
    return out


def raw(state: AdamState) -> list[Tensor]:
    """Copies of every byte of a state."""
    kept = []
    for each in (state.master, state.exp_avg, state.exp_avg_sq):
        kept.append(each.codes.view(torch.uint8).clone())
        if each.scales is not None:
            kept.append(each.scales.clone())
    return kept


def assert_same_bytes(actual: AdamState, expected: AdamState) -> None:
    for index, (a, b) in enumerate(zip(raw(actual), raw(expected), strict=True)):
        wrong = (a != b).nonzero()
        assert not len(wrong), f"tensor {index} differs first at {wrong[0].tolist()}"


class Trial:
    """One parameter alone in a shard."""

    def __init__(
        self,
        parameter: Tensor,
        formats: Formats = O1,
        *,
        block_size: int = 32,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        master, exp_avg, exp_avg_sq = formats
        self.count = parameter.numel()
        zeros = torch.zeros(self.count)
        blocks = Blocks.zeros(-(-self.count // block_size), block_size, master, CPU)
        self.state = AdamState(
            blocks, blocks_of(zeros, exp_avg, block_size), blocks_of(zeros, exp_avg_sq, block_size)
        )
        dtype = torch.bfloat16 if master.split else weight_dtype
        self.weights = torch.full((len(blocks), block_size), torch.nan, dtype=dtype)
        store_masters(parameter, blocks, self.weights)
        self.segments: Sequence[Segment] = (Segment(slice(0, len(self.state.master)), 0, 0),)

    def step(
        self,
        gradient: Tensor | Blocks,
        scalars: AdamScalars,
        *,
        factor: float = 1.0,
        taken: bool = True,
        seed: int = 0,
    ) -> None:
        block_size = self.weights.shape[1]
        if isinstance(gradient, Tensor):
            gradient = blocks_of(gradient, FP32, block_size)
        segments = plan(self.segments, len(gradient), block_size, CPU)
        control = torch.tensor([factor, taken], dtype=torch.float32)
        adam_step(Sweep(self.state, gradient, self.weights, segments, scalars, control, Rounding(seed)))

    @property
    def master(self) -> Tensor:
        out = torch.empty(self.count)
        load_masters(self.state.master, self.weights, out)
        return out

    @property
    def exp_avg(self) -> Tensor:
        return values_of(self.state.exp_avg, self.count)

    @property
    def exp_avg_sq(self) -> Tensor:
        stored = values_of(self.state.exp_avg_sq, self.count)
        return stored if self.state.exp_avg_sq.format is FP32 else stored * stored


class Exact:
    """Adam in float64, from its definition."""

    def __init__(self, parameter: Tensor) -> None:
        self.p = parameter.to(torch.float64)
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)

    def step(self, gradient: Tensor, s: AdamScalars, *, factor: float = 1.0) -> None:
        g = gradient.to(torch.float64) * factor
        if s.decoupled:
            self.p = self.p - s.lr * s.weight_decay * self.p
        else:
            g = g + s.weight_decay * self.p
        self.m = s.beta1 * self.m + (1 - s.beta1) * g
        self.v = s.beta2 * self.v + (1 - s.beta2) * g**2
        m, v = self.m, self.v
        if s.bias_correction:
            m, v = m / (1 - s.beta1**s.step), v / (1 - s.beta2**s.step)
        self.p = self.p - s.lr * m / (v.sqrt() + s.eps)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.99)])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_fp32_states_step_as_torch_does(
    optimizer: Callable[..., torch.optim.Optimizer], betas: tuple[float, float], weight_decay: float
) -> None:
    peer = torch.nn.Parameter(normal(1000, seed=0))
    other = optimizer([peer], lr=1e-2, betas=betas, eps=1e-8, weight_decay=weight_decay)
    trial = Trial(peer.detach().clone(), O1)
    scalars = replace(SCALARS, lr=1e-2, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay)
    scalars = replace(scalars, decoupled=optimizer is torch.optim.AdamW)
    size = torch.logspace(-6, 2, 1000)
    for step in range(1, 51):
        gradient = normal(1000, seed=step) * size
        peer.grad = gradient.clone()
        other.step()
        trial.step(gradient, replace(scalars, step=step))
    state, ulp = other.state[peer], 2.0**-24
    through_gradient = 0.0 if scalars.decoupled else weight_decay  # L2: the weight's error enters m and v
    ulps = 32 if through_gradient else 6
    assert ((trial.exp_avg - state["exp_avg"]).abs() <= ulps * ulp * (size + through_gradient)).all()
    torch.testing.assert_close(trial.exp_avg_sq, state["exp_avg_sq"], rtol=ulps * ulp, atol=0)
    torch.testing.assert_close(trial.master, peer.detach(), rtol=6 * ulp, atol=6 * ulp)
    assert torch.equal(trial.weights.view(-1)[:1000], trial.master)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_fp32_states_step_as_exact_adam_does(bias_correction: bool, decoupled: bool, eps: float) -> None:
    trial, exact = Trial(normal(500, seed=0)), Exact(normal(500, seed=0))
    scalars = replace(SCALARS, decoupled=decoupled, bias_correction=bias_correction, eps=eps)
    scalars = replace(scalars, weight_decay=0.1, lr=1e-2)
    for step in range(1, 51):
        gradient = 3 * normal(500, seed=step)
        trial.step(gradient, replace(scalars, step=step), factor=1 / 3)
        exact.step(gradient, replace(scalars, step=step), factor=1 / 3)
    for actual, expected in ((trial.master, exact.p), (trial.exp_avg, exact.m), (trial.exp_avg_sq, exact.v)):
        error = (actual.to(torch.float64) - expected).abs()
        assert (error <= 2.0**-18 * (expected.abs() + expected.abs().mean())).all()


def mild_error(formats: Formats, *, steps: int = 100, count: int = 1 << 16) -> float:
    """Relative error of the whole update in the mild regime of `research/numerics.md`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = count // 1024
    size = 1e-4 * torch.exp(0.5 * draw(rows, 1)) * torch.exp(0.5 * draw(rows, 1024))
    live = torch.rand(rows, 1024, generator=generator) >= 0.05
    mean = draw(rows, 1024)
    trial = Trial(0.02 * draw(count), formats, block_size=128, weight_dtype=torch.bfloat16)
    start = trial.master
    exact, square = Exact(start), None
    for step in range(1, steps + 1):
        gradient = (size * (mean + draw(rows, 1024)) * live).view(-1)
        square = next_clamp(square, BETAS)
        scalars = replace(SCALARS, step=step, clamp=math.sqrt(square) if formats != O1 else None)
        trial.step(gradient, scalars)
        exact.step(gradient, scalars)
    assert torch.equal(trial.master[~live.view(-1)], start[~live.view(-1)]), "drift without a gradient"
    wanted = (exact.p - start)[live.view(-1)]
    return float(((trial.master - start)[live.view(-1)] - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("formats", "bound"),
    [
        (O1, 1e-5),
        ((FP32, FP32, FP16), 1e-3),
        (O2, 0.03),
        ((FP32, E5M2, FP16), 0.06),
        ((FP32, E4M3, E4M3), 0.06),
    ],
    ids=names,
)
def test_error_in_the_mild_regime(formats: Formats, bound: float) -> None:
    assert mild_error(formats) < bound


@pytest.mark.parametrize("formats", list(product(MASTERS, EXP_AVGS, EXP_AVG_SQS)), ids=names)
def test_every_combination_of_formats_steps_the_same_way(formats: Formats) -> None:
    trial, exact = Trial(0.02 * normal(500, seed=0), formats), Exact(0.02 * normal(500, seed=0))
    for step in range(1, 6):
        scalars = replace(SCALARS, step=step, lr=1e-2, clamp=math.sqrt(next_clamp(None, BETAS)))
        trial.step(normal(500, seed=step), scalars)
        exact.step(normal(500, seed=step), scalars)
    moved = trial.master - 0.02 * normal(500, seed=0)
    wanted = (exact.p - 0.02 * normal(500, seed=0)).to(torch.float32)
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.98
    assert (moved - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("master_format", MASTERS, ids=names)
def test_weights_are_the_rounded_masters_as_stored(dtype: torch.dtype, master_format: Format) -> None:
    trial = Trial(normal(500, seed=0), (master_format, E4M3, FP16), weight_dtype=dtype)
    for step in range(1, 4):
        trial.step(normal(500, seed=step), replace(SCALARS, step=step, lr=1e-2))
        master = decode_masters(trial.state.master, trial.weights)
        expected = master.to(trial.weights.dtype)
        if trial.weights.dtype is torch.bfloat16:
            bits = [bf16_of(each & 0xFFFFFFFF) for each in master.view(torch.int32).view(-1).tolist()]
            expected = torch.tensor(bits).to(torch.int16).view(torch.bfloat16).view_as(master)
        assert torch.equal(trial.weights, expected)


@pytest.mark.parametrize("formats", list(product(MASTERS, EXP_AVGS, EXP_AVG_SQS)), ids=names)
@pytest.mark.parametrize("decoupled", [True, False])
def test_no_gradient_ever_leaves_everything_as_it_was(formats: Formats, decoupled: bool) -> None:
    trial = Trial(normal(500, seed=0), formats, weight_dtype=torch.bfloat16)
    master, weights, moments = trial.master, trial.weights.clone(), raw(trial.state)[-2:]
    for step in range(1, 4):
        scalars = replace(SCALARS, step=step, decoupled=decoupled, clamp=1.165)
        trial.step(torch.zeros(500), scalars)
    assert torch.equal(trial.master, master)
    assert torch.equal(trial.weights, weights)
    assert not trial.exp_avg.any()
    assert not trial.exp_avg_sq.any()
    assert all(torch.equal(a, b) for a, b in zip(raw(trial.state)[-2:], moments, strict=True))


def test_an_element_without_a_gradient_does_not_drift_beside_others() -> None:
    trial = Trial(normal(512, seed=0), (FP32, E4M3, FP16))
    start, live = trial.master, torch.arange(512) % 3 != 0
    for step in range(1, 21):
        trial.step(normal(512, seed=step) * live, replace(SCALARS, step=step, clamp=1.165))
    assert torch.equal(trial.master[~live], start[~live])
    assert (trial.master[live] != start[live]).all()


@each_level
def test_the_padding_of_a_short_block_stays_zero(formats: Formats) -> None:
    trial = Trial(normal(33, seed=0), formats)
    for step in range(1, 6):
        trial.step(normal(33, seed=step), replace(SCALARS, step=step, weight_decay=0.1, clamp=1.165))
    assert not decode_masters(trial.state.master, trial.weights).view(-1)[33:].any()
    for each in (trial.state.exp_avg, trial.state.exp_avg_sq):
        assert not decode(each).view(-1)[33:].any()
    assert not trial.weights.view(-1)[33:].any()


@pytest.mark.parametrize("formats", [O1, O2, (BF16, E5M2, E4M3)], ids=names)
def test_rows_outside_the_segments_are_left_alone(formats: Formats) -> None:
    trial = Trial(normal(320, seed=0), formats)
    trial.step(normal(320, seed=1), SCALARS)
    trial.segments = (Segment(slice(2, 4), 0, 0), Segment(slice(7, 9), 1, 64))
    outside = torch.tensor([0, 1, 4, 5, 6, 9])
    written = torch.cat([torch.arange(64, 128), torch.arange(224, 288)])
    before, weights = raw(trial.state), trial.weights.clone()
    trial.step(torch.full((320,), torch.nan).index_fill_(0, written, 1.0), replace(SCALARS, step=2))
    for old, new in zip(before, raw(trial.state), strict=True):
        assert torch.equal(new[outside], old[outside])
    assert torch.equal(trial.weights[outside], weights[outside])
    assert (trial.weights != weights).any(dim=1)[[2, 3, 7, 8]].all()


def test_the_clamp_bounds_the_fresh_exp_avg() -> None:
    """By C sqrt(v) exactly in FP32; where both are rounded, within their rounding."""
    limit = math.sqrt(next_clamp(None, BETAS))
    for exp_avg, exp_avg_sq in product((FP32, E4M3, E5M2, FP16), (FP32, FP16, E4M3)):
        trial = Trial(normal(512, seed=0), (FP32, exp_avg, exp_avg_sq))
        quantize(normal(512, seed=1), trial.state.exp_avg)  # far above what v allows
        old_v = trial.exp_avg_sq.clone()
        gradient = normal(512, seed=2) * 1e-2
        trial.step(gradient, replace(SCALARS, step=9, clamp=limit))
        fresh_v = old_v * BETAS[1] + gradient * gradient * (1 - BETAS[1])
        bound = limit * fresh_v.sqrt()
        rows = bound.view(-1, 32)
        step = rows.amax(dim=1, keepdim=True) * 2 / exp_avg.max * exp_avg.smallest
        room = (
            (rows * 2.0 ** -(exp_avg.mantissa_bits + 1)).maximum(step / 2) if exp_avg.scaled else rows * 1e-6
        )
        assert (trial.exp_avg.abs().view(-1, 32) <= rows + room).all(), (exp_avg.name, exp_avg_sq.name)
        assert (trial.exp_avg.abs() > 0.9 * bound - step.expand(-1, 32).reshape(-1)).sum() > 400
        unclamped = Trial(normal(512, seed=0), (FP32, exp_avg, exp_avg_sq))
        quantize(normal(512, seed=1), unclamped.state.exp_avg)
        unclamped.step(gradient, replace(SCALARS, step=9))
        assert unclamped.exp_avg.abs().max() > 100 * bound.max()


@pytest.mark.parametrize("exp_avg", [FP32, BF16, E4M3], ids=names)
@pytest.mark.parametrize("v", [0.0, 1e-6])
def test_the_clamp_keeps_the_sign(exp_avg: Format, v: float) -> None:
    """Also where nothing is left of exp_avg."""
    trial = Trial(normal(512, seed=0), (FP32, exp_avg, FP32))
    held = normal(512, seed=1)
    quantize(held, trial.state.exp_avg)
    quantize(torch.full((512,), v), trial.state.exp_avg_sq)
    trial.step(torch.zeros(512), replace(SCALARS, step=9, clamp=1.165))
    assert torch.equal(trial.exp_avg.signbit(), held.signbit())
    assert trial.exp_avg.abs().max() <= 1.165 * math.sqrt(v) * 1.07


def test_the_clamp_changes_nothing_in_exact_adam() -> None:
    clamped, free = Trial(normal(500, seed=0)), Trial(normal(500, seed=0))
    square = None
    for step in range(1, 31):
        square = next_clamp(square, BETAS)
        gradient = normal(500, seed=step) * (step % 7 == 1)
        clamped.step(gradient, replace(SCALARS, step=step, clamp=math.sqrt(square) * (1 + 1e-6)))
        free.step(gradient, replace(SCALARS, step=step))
    assert_same_bytes(clamped.state, free.state)


def test_the_clamp_removes_the_blow_up() -> None:
    """A code of exp_avg that rounds back to itself outlives v; the update m / sqrt(v) then grows."""
    largest = {}
    for clamp in (None, math.sqrt(next_clamp(None, BETAS))):
        trial = Trial(torch.zeros(32), (FP32, E4M3, FP16))
        largest[clamp], before = 0.0, trial.master
        for step in range(1, 201):
            gradient = torch.zeros(32)
            gradient[0] = 1.0
            gradient[1] = 2.0**-14 if step == 1 else 0.0
            trial.step(gradient, replace(SCALARS, step=step, clamp=clamp))
            update = (trial.master - before).abs()[1].item() / SCALARS.lr
            largest[clamp], before = max(largest[clamp], update), trial.master
    assert largest.pop(None) > 20
    assert max(largest.values()) < 1.3


def test_next_clamp_starts_at_its_fixed_point() -> None:
    for betas, expected in (((0.9, 0.95), 1.165), ((0.9, 0.999), 7.27)):
        square = next_clamp(None, betas)
        assert abs(math.sqrt(square) / expected - 1) < 1e-3
        closed = (1 - betas[0]) / math.sqrt(1 - betas[1]) / math.sqrt(1 - betas[0] ** 2 / betas[1])
        assert abs(math.sqrt(square) / closed - 1) < 1e-12
        assert abs(next_clamp(square, betas) / square - 1) < 1e-12


def test_next_clamp_follows_changing_betas() -> None:
    """The example of `research/numerics.md`: true 6.73, where the fixed point says 1.165."""
    square = next_clamp(next_clamp(None, (0.9, 0.999)), (0.9, 0.95))
    assert abs(math.sqrt(square) - 6.73) < 5e-3
    for _ in range(300):
        square = next_clamp(square, (0.9, 0.95))
    assert abs(math.sqrt(square) - 1.165) < 1e-3


@pytest.mark.parametrize("betas", [(0.9, 0.81), (0.9, 0.5), (0.99, 0.95), (0.5, 0.0), (0.0, 0.0)])
def test_next_clamp_is_infinite_where_no_bound_holds(betas: tuple[float, float]) -> None:
    assert next_clamp(None, betas) == math.inf
    assert next_clamp(1.0, betas) == math.inf


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.99)])
def test_next_clamp_stays_infinite(betas: tuple[float, float]) -> None:
    assert next_clamp(next_clamp(math.inf, betas), betas) == math.inf


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.95), st.floats(0.91, 0.9999), st.floats(-100, 100)), min_size=1, max_size=40
    )
)
def test_next_clamp_bounds_exact_adam_under_changing_betas(steps: list[tuple[float, float, float]]) -> None:
    m = v = 0.0
    square = None
    for beta1, beta2, gradient in steps:
        square = next_clamp(square, (beta1, beta2))
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        assert m**2 <= square * v * (1 + 1e-9) + 1e-290


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_next_clamp_is_tight(betas: tuple[float, float]) -> None:
    """Gradients in the ratio beta1 / beta2 of consecutive steps reach the bound."""
    m = v = 0.0
    for age in range(2000, -1, -1):
        gradient = (betas[0] / betas[1]) ** age
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
    assert abs(m**2 / v / next_clamp(None, betas) - 1) < 1e-6


@pytest.mark.parametrize("formats", [O1, O2, (FP16, E5M2, BF16), (BF16, E4M3, E4M3)], ids=names)
@pytest.mark.parametrize("chunk", [1 << 16, 96])
def test_a_parameter_may_be_cut_between_shards(
    formats: Formats, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at another world size: 20 blocks in one shard, or in three at other rows."""
    count, cuts = 20 * 32 - 5, ((0, 7), (7, 8), (8, 20))
    whole = Trial(normal(count, seed=0), formats, weight_dtype=torch.bfloat16)
    whole.segments = (Segment(slice(0, 20), 3, 0),)
    shards = []
    for offset, (first, end) in enumerate(cuts, start=1):
        part = Trial(torch.zeros((end - first + offset) * 32), formats, weight_dtype=torch.bfloat16)
        part.state[slice(offset, None)].master.copy_(whole.state[slice(first, end)].master)
        part.segments = (Segment(slice(offset, offset + end - first), 3, first * 32),)
        shards.append(part)
    for step in range(1, 6):
        gradient = blocks_of(normal(count, seed=step), E4M3)
        scalars = replace(SCALARS, step=step, clamp=1.165, weight_decay=0.1)
        monkeypatch.setattr(blocks_module, "CHUNK", 1 << 16)
        whole.step(gradient, scalars)
        monkeypatch.setattr(blocks_module, "CHUNK", chunk)
        for offset, ((first, end), part) in enumerate(zip(cuts, shards, strict=True), start=1):
            own = Blocks.zeros(len(part.state.master), 32, E4M3, CPU)
            own[offset:].copy_(gradient[first:end])
            part.step(own, scalars)
    for offset, ((first, end), part) in enumerate(zip(cuts, shards, strict=True), start=1):
        assert_same_bytes(part.state[slice(offset, None)], whole.state[slice(first, end)])
        assert torch.equal(part.weights[offset:], whole.weights[first:end])


@pytest.mark.parametrize("fmt", ROOTS, ids=names)
def test_exp_avg_sq_never_becomes_zero(fmt: Format) -> None:
    """Beside a neighbour that dwarfs it, and after the gradient has gone."""
    trial = Trial(torch.zeros(64), (FP32, E4M3, fmt))
    small = torch.full((64,), 1e-9)
    small[[0, 40]] = 1.0
    small[63] = 0.0
    trial.step(small, SCALARS)
    for step in range(2, 101):
        trial.step(torch.zeros(64), replace(SCALARS, step=step))
        assert (trial.exp_avg_sq[:63] > 0).all()
        assert trial.exp_avg_sq[63] == 0


@pytest.mark.parametrize(
    "formats", [O2, (BF16, E4M3, E4M3), (FP32, BF16, BF16), (FP16, E5M2, E5M2)], ids=names
)
@pytest.mark.parametrize("smaller", [2.0**-50, 2.0**-30, 2.0**30])
def test_the_unit_of_the_gradient_does_not_matter(formats: Formats, smaller: float) -> None:
    """To the bit, where eps is 0 and the unit a power of two."""
    one, other = Trial(normal(512, seed=0), formats), Trial(normal(512, seed=0), formats)
    for step in range(1, 11):
        scalars = replace(SCALARS, step=step, eps=0.0, weight_decay=0.1, clamp=1.165)
        one.step(normal(512, seed=step), scalars)
        other.step(normal(512, seed=step) * smaller, scalars)
        assert torch.equal(other.master, one.master), f"step {step}"
        assert torch.equal(other.exp_avg, one.exp_avg * smaller)


LARGEST_V = FP32.max / UNIT**2  # what FP32 holds in the unit of the sweep


@pytest.mark.parametrize("fmt", EXP_AVG_SQS, ids=names)
@pytest.mark.parametrize("clamp", [None, 1.165])
def test_v_saturates_where_fp32_ends(fmt: Format, clamp: float | None) -> None:
    trial = Trial(normal(512, seed=0), (FP32, FP32, fmt))
    start = trial.master
    size = torch.tensor([1e13, 1e15, 1e20, 1e30]).repeat(128)
    for step in range(1, 6):
        trial.step(normal(512, seed=step).sign() * size, replace(SCALARS, step=step, clamp=clamp))
        assert ((trial.exp_avg_sq / LARGEST_V - 1).abs() < 1e-6).all()
        assert trial.master.isfinite().all()
        if clamp is not None:
            assert (trial.exp_avg.abs() <= clamp * math.sqrt(LARGEST_V) * (1 + 1e-6)).all()
            reach = step * SCALARS.lr / (1 - BETAS[0]) * clamp
            assert (trial.master - start).abs().max() <= reach


@pytest.mark.parametrize("fmt", EXP_AVG_SQS, ids=names)
def test_a_saturated_v_comes_back(fmt: Format) -> None:
    trial = Trial(normal(512, seed=0), (FP32, FP32, fmt))
    trial.step(torch.full((512,), 1e15), SCALARS)
    for step in range(2, 102):
        trial.step(torch.zeros(512), replace(SCALARS, step=step))
    assert trial.exp_avg_sq.mean() < LARGEST_V / 10  # exactly .006 of it
    assert trial.master.isfinite().all()


@pytest.mark.parametrize("fmt", ROOTS, ids=names)
def test_the_root_of_v_is_stored_with_the_bits_of_its_place(fmt: Format) -> None:
    """Keyed by seed, step, parameter and element of the parameter; block maximum under the format's."""
    count, first, seed, step, parameter = 320, 96, 11, 5, 4
    trial = Trial(normal(count, seed=0), (FP32, E4M3, fmt))
    trial.segments = (Segment(slice(0, 10), parameter, first),)
    gradient = normal(count, seed=1)
    trial.step(gradient, replace(SCALARS, step=step), seed=seed)
    root = square_root(gradient * gradient * (1 - BETAS[1])).view(-1, 32)
    stored = trial.state.exp_avg_sq
    if stored.scales is not None:
        nearest = blocks_of(root.view(-1), fmt).scales
        assert nearest is not None
        assert torch.equal(stored.scales, nearest)
        root = root * torch.exp2(127.0 - nearest.to(torch.float32))[:, None]
    word = key(stream(seed, step, EXP_AVG_SQ), parameter)
    bits = random_bits(word, first, count, CPU).view(-1, 32)
    expected = round_up_from_zero(root, bits, fmt).view(CODE_DTYPE[fmt.itemsize])
    assert torch.equal(stored.codes.view(CODE_DTYPE[fmt.itemsize]), expected)


@pytest.mark.parametrize(("fmt", "bias"), [(FP16, 1e-3), (BF16, 2e-3), (E4M3, 0.02), (E5M2, 0.05)], ids=names)
def test_exp_avg_sq_follows_its_mean(fmt: Format, bias: float) -> None:
    """v moves 5 % of the way a step, less than half an 8-bit code: nearest rounding stands still."""
    trial, exact = Trial(torch.zeros(4096), (FP32, FP32, fmt)), 0.0
    for step in range(1, 121):
        size = 1.0 if step <= 40 else 0.75
        trial.step(torch.full((4096,), size), replace(SCALARS, step=step))
        exact = exact * BETAS[1] + size**2 * (1 - BETAS[1])
        assert abs(float(trial.exp_avg_sq.mean()) / exact - 1) < bias + 0.01, f"step {step}"


@pytest.mark.parametrize(
    ("fmt", "bad"), list(product(EXP_AVG_SQS, [torch.inf, torch.nan, -torch.nan])), ids=names
)
def test_a_second_moment_that_is_not_finite_is_not_stored_as_a_number(fmt: Format, bad: float) -> None:
    root = torch.ones(1, 32)
    root[0, 3] = bad  # arithmetic on x86 makes the negative NaN
    out = Blocks.zeros(1, 32, fmt, CPU)
    encode_second_moment(root * root, root, out, torch.zeros(1, 32, dtype=torch.int32))
    assert not decode_second_moment(out)[0, 3].isfinite()


@pytest.mark.parametrize("fmt", EXP_AVG_SQS, ids=names)
@pytest.mark.parametrize("factor", [1.0, BETAS[1], UNIT**-2])
def test_the_second_moment_is_read_in_the_unit_of_the_sweep(fmt: Format, factor: float) -> None:
    stored = blocks_of(normal(512, seed=0).abs() * 1e-3, fmt)
    held = values_of(stored, 512).to(torch.float64)
    expected = (held if fmt is FP32 else held**2) * UNIT**2 * factor
    actual = decode_second_moment(stored, factor).view(-1).to(torch.float64)
    torch.testing.assert_close(actual, expected, rtol=2.0**-21, atol=0)  # a root's rounding counts twice


def test_gradients_enter_as_they_are_stored() -> None:
    """A block-scaled gradient, a sum over four ranks, steps as the FP32 mean of the same values."""
    stored = blocks_of(normal(500, seed=1), E4M3)
    summed, mean = Trial(normal(500, seed=0), O2), Trial(normal(500, seed=0), O2)
    summed.step(stored, SCALARS, factor=0.25)
    mean.step(values_of(stored, 500) / 4, SCALARS)
    assert_same_bytes(summed.state, mean.state)


@each_level
@pytest.mark.parametrize("factor", [1.0, 0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("bad", [1.0, torch.nan], ids=["finite", "nan"])
def test_a_step_that_is_not_taken_leaves_every_byte(formats: Formats, factor: float, bad: float) -> None:
    trial = Trial(normal(500, seed=0), formats, weight_dtype=torch.bfloat16)
    trial.step(normal(500, seed=1), SCALARS)
    trial.weights.view(-1)[::7] = torch.nan  # not what the master says: a write would show
    before, weights = raw(trial.state), trial.weights.view(torch.int16).clone()
    trial.step(
        normal(500, seed=2) * bad, replace(SCALARS, step=2, weight_decay=0.1), factor=factor, taken=False
    )
    assert all(torch.equal(old, new) for old, new in zip(before, raw(trial.state), strict=True))
    assert torch.equal(trial.weights.view(torch.int16), weights)


@each_level
def test_a_step_after_one_that_was_not_taken_is_as_if_there_had_been_none(formats: Formats) -> None:
    once, twice = Trial(normal(500, seed=0), formats), Trial(normal(500, seed=0), formats)
    twice.step(torch.full((500,), torch.inf), SCALARS, taken=False)
    for trial in (once, twice):
        trial.step(normal(500, seed=1), SCALARS)
    assert_same_bytes(twice.state, once.state)
    assert torch.equal(twice.weights, once.weights)


@each_level
@pytest.mark.parametrize("factor", [0.0, 2.0**-20, 0.5, 64.0, -1.0])
def test_the_factor_multiplies_the_gradient_alone(formats: Formats, factor: float) -> None:
    """Powers of two, which are exact: not the weight decay, eps or what the moments hold."""
    for scalars in (replace(SCALARS, weight_decay=0.1), replace(SCALARS, weight_decay=0.1, decoupled=False)):
        outside, inside = Trial(normal(500, seed=0), formats), Trial(normal(500, seed=0), formats)
        for step in range(1, 4):
            gradient = normal(500, seed=step)
            outside.step(gradient, replace(scalars, step=step), factor=factor)
            inside.step(gradient * factor, replace(scalars, step=step))
        assert_same_bytes(outside.state, inside.state)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_plan_of_the_reference_is_the_segments(count: int) -> None:
    segments = [Segment(slice(row, row + 1), row, 32 * row) for row in range(count)]
    assert plan(segments, 5, 32, CPU) == tuple(segments)


@pytest.mark.parametrize(
    ("formats", "bound"),
    [(O1, 1e-4), ((FP32, FP32, FP16), 1e-3), ((FP32, FP32, BF16), 5e-3), ((FP32, E4M3, FP16), 0.05)],
    ids=names,
)
def test_tiny_gradients_step_as_exact_adam_does(formats: Formats, bound: float) -> None:
    """Their squares are no normal FP32 numbers, and eps does not hide it."""
    size = torch.logspace(-20, -19, 512)
    assert size.square().max() < torch.finfo(torch.float32).tiny
    trial, exact = Trial(torch.zeros(512), formats), Exact(torch.zeros(512))
    for step in range(1, 21):
        gradient = normal(512, seed=step) * size
        scalars = replace(SCALARS, step=step, eps=1e-30)
        trial.step(gradient, scalars)
        exact.step(gradient, scalars)
    error = trial.master.to(torch.float64) - exact.p
    assert error.norm() < bound * exact.p.norm()


def test_the_seed_changes_only_the_rounding_of_exp_avg_sq() -> None:
    states = []
    for seed in (0, 1):
        trial = Trial(normal(500, seed=0), O2)
        trial.step(normal(500, seed=1), SCALARS, seed=seed)
        states.append(trial.state)
    first, second = raw(states[0]), raw(states[1])
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert same == [True, True, True, True, False, True]


@each_level
def test_no_temporary_is_as_long_as_the_shard(formats: Formats) -> None:
    trial = Trial(torch.ones(1 << 20), formats, block_size=128, weight_dtype=torch.bfloat16)
    gradient = Blocks.zeros(1 << 13, 128, E4M3, CPU)
    with LargestTemporary() as largest:
        trial.step(gradient, replace(SCALARS, clamp=1.165))
    assert 0 < largest.nbytes <= 8 * blocks_module.CHUNK  # the widest: indices, int64


def test_roots_are_correctly_rounded() -> None:
    """The nearest float32 to the exact root: no neighbour is nearer, in exact arithmetic."""
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    v = torch.cat([uniform * scale for scale in (1e-30, 1e-12, 1e-6, 1.0, 1e10)])
    roots = square_root(v)
    for sign in (-torch.inf, torch.inf):
        neighbour = torch.nextafter(roots, torch.full_like(roots, sign))
        middle = (roots.double() + neighbour.double()) / 2  # exact: one bit more than float32
        beyond = middle * middle < v.double() if sign > 0 else middle * middle > v.double()
        assert not beyond.any()
