"""Adam on low-precision states: one sweep per step.

Gradient, master weight, exp_avg (m) and exp_avg_sq (v) and their scales are read once, computed in
FP32, written once, and the model weight is written in the same sweep. Block scales make that
possible: a block's new amax is known as soon as the block is computed. (FP8-LM, arXiv 2310.18313
section 2.2, keeps one scale per tensor and so needs two sweeps.)

What keeps a small v from breaking the update (v flushed to zero while m survives is a division by
eps): below FP32 the square root of v is stored, rounded stochastically and never from non-zero to
zero; and m is clamped to what exact Adam obeys anyway, |m| <= C sqrt(v) (Cauchy-Schwarz over the
same decaying sum, `next_clamp`).

Adam does not notice the unit of the gradient, so the sweep computes in a unit 2^24 times smaller: then the
square of a gradient of 1e-20 is still a normal FP32 number. v saturates at FP32's maximum.

Masters and weights are stored together (`ops.masters`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, chunks, decode, encode, scale_down, to_float32
from ds_fp8.ops.formats import FP32, INT8
from ds_fp8.ops.masters import decode_masters, encode_masters
from ds_fp8.ops.moments import (
    LEAST_BETA2,
    LOG_UNIT,
    UNIT,
    decode_second_moment,
    encode_quotient,
    encode_second_moment,
    quotient,
    square_root,
)
from ds_fp8.ops.rounding import (
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    Rounding,
    fewer_bits,
    key,
    random_words,
    round_stochastically,
    upper_bits,
)


@dataclass(frozen=True)
class AdamState:
    """States of consecutive blocks."""

    master: Blocks
    exp_avg: Blocks
    exp_avg_sq: Blocks
    stores_sqrt: bool = True  # exp_avg_sq holds sqrt(v), except in FP32; else v in any format

    def __getitem__(self, rows: slice) -> "AdamState":
        return replace(
            self, master=self.master[rows], exp_avg=self.exp_avg[rows], exp_avg_sq=self.exp_avg_sq[rows]
        )

    @property
    def stores_quotient(self) -> bool:
        """Whether exp_avg holds m over the root of v."""
        return self.exp_avg.format is INT8

    def moments(self, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
        """m times UNIT and beta1, v times UNIT^2 and beta2, of a chunk: [rows, block size] float32 each."""
        if not self.stores_quotient:
            return decode(self.exp_avg, UNIT * beta1), self.second_moment(beta2)
        beta2 = max(beta2, LEAST_BETA2)
        m, v = decode(self.exp_avg, beta1 / math.sqrt(beta2)), self.second_moment(beta2)
        if self.exp_avg_sq.format is FP32:
            return m * square_root(v), v
        return m * decode(self.exp_avg_sq, UNIT * math.sqrt(beta2)), v

    def first_moment(self) -> Tensor:
        """m of a chunk, [rows, block size] float32."""
        stored = decode(self.exp_avg)
        return stored * self.root() if self.stores_quotient else stored

    def root(self) -> Tensor:
        """sqrt(v) of a chunk, [rows, block size] float32."""
        v = decode(self.exp_avg_sq)
        return v if self.stores_sqrt and self.exp_avg_sq.format is not FP32 else square_root(v)

    def set_first_moment(self, m: Tensor, root: Tensor) -> None:
        """Store m, rounded to nearest. root: sqrt(v); a quotient where it is 0 is stored as 0."""
        if self.stores_quotient:
            encode_quotient(quotient(torch.where(root == 0, 0.0, m), root), self.exp_avg)
        else:
            encode(m, self.exp_avg)

    def second_moment(self, factor: float = 1.0) -> Tensor:
        """v of a chunk times UNIT^2 and a factor, [rows, block size] float32."""
        if self.stores_sqrt:
            return decode_second_moment(self.exp_avg_sq, factor)
        return decode(self.exp_avg_sq, UNIT**2 * factor)

    def set_second_moment(self, v: Tensor, root: Tensor, bits: Tensor | None = None, unit: int = 0) -> None:
        """Store v, rounded to nearest, or its root; v: 4^unit, root: 2^unit times what is stored."""
        if self.stores_sqrt:
            encode_second_moment(v * 4.0**-unit, root * 2.0**-unit, self.exp_avg_sq, bits)
        else:
            encode(v, self.exp_avg_sq, 2 * unit)


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks of one parameter inside a shard."""

    blocks: slice  # rows of the shard
    parameter: int  # global index of the parameter
    first_element: int  # element of the parameter with which the rows begin


@dataclass(frozen=True)
class AdamScalars:
    """The numbers of a step; each is rounded to FP32 when it is multiplied with a tensor."""

    step: int  # counted from 1
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # decay the weight (AdamW), not the gradient (L2)
    bias_correction: bool
    clamp: float | None  # C of |m| <= C sqrt(v); None leaves m alone

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step) if self.bias_correction else self.lr

    @property
    def root_correction(self) -> float:
        """Bias correction of sqrt(v): 1 / sqrt(1 - beta2^step)."""
        return 1 / math.sqrt(1 - self.beta2**self.step) if self.bias_correction else 1.0

    def factors(self, *, quotient: bool) -> dict[str, float]:
        """The factors that kernels are given, by their names there; quotient: `AdamState.stores_quotient`."""
        beta2 = max(self.beta2, LEAST_BETA2) if quotient else self.beta2
        return {
            "beta1": self.beta1,
            "one_minus_beta1": 1 - self.beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - self.beta2,
            "root_beta2": math.sqrt(beta2),
            "quotient_beta": self.beta1 / math.sqrt(beta2) if quotient else 0.0,
            "step_size": self.step_size,
            "root_correction": self.root_correction,
            "decay": 1 - self.lr * self.weight_decay if self.decoupled else self.weight_decay,
        }


@dataclass(frozen=True)
class Sweep:
    """One sweep over the rows of a shard: what it reads, what it writes, what it computes with.

    Whether the step is taken, and what the gradient is multiplied with, is read where the tensors are, so
    that a GPU does not wait for the host.
    """

    state: AdamState  # read and written
    gradient: Blocks  # sum over ranks, of the same rows as the state
    weights: Tensor  # [rows, block size] model dtype, written; read if the master is split
    plan: Any  # what the backend's `plan` returned for the shard's segments
    scalars: AdamScalars
    control: Tensor  # [2] float32: 1 / world size, loss scale and clip factor in one; 1: step, 0: skip it
    rounding: Rounding
    counts: Tensor | None = None  # `ops.health.StateCounts`, float64, on the weights' device, added to

    def __getitem__(self, rows: slice) -> "Sweep":
        """The sweep of some of the rows, with the plan of all rows."""
        return replace(self, state=self.state[rows], gradient=self.gradient[rows], weights=self.weights[rows])

    def noise(self, parameter: int, first: int, like: Tensor) -> "Noise":
        """Random bits for rows of a parameter, of which `first` is the first element's index."""
        return partial(noise_of, self.rounding, self.scalars.step, parameter, first, like)


Noise = Callable[[int], Tensor]  # random bits per element of a state's rows, int32: 24, of EXP_AVG 16


def next_clamp(previous: float | None, betas: tuple[float, float]) -> float:
    """C_t^2 from C_{t-1}^2, or its fixed point if `previous` is None; inf: no bound, now and from then on.

    C_t^2 = (beta1^2 / beta2) C_{t-1}^2 + (1 - beta1)^2 / (1 - beta2), by Cauchy-Schwarz on
    m_t = beta1 m + (1 - beta1) g and v_t = beta2 v + (1 - beta2) g^2; it needs beta1^2 < beta2.
    """
    beta1, beta2 = betas
    if beta1**2 >= beta2 or previous == math.inf:
        return math.inf
    new_term = (1 - beta1) ** 2 / (1 - beta2)
    ratio = beta1**2 / beta2
    return new_term / (1 - ratio) if previous is None else ratio * previous + new_term


def plan(
    segments: Sequence[Segment], blocks: int, block_size: int, device: torch.device
) -> tuple[Segment, ...]:
    """Tables that `adam_step` needs of a shard of `blocks` blocks, made once; here the segments."""
    return tuple(segments)


def adam_step(sweep: Sweep) -> None:
    """One sweep over the segments of a shard, in the order of its rows.

    A step that `control` skips leaves every byte as it is. Rows outside every segment hold zeros and keep
    them.
    """
    if not sweep.control[1]:
        return
    for segment in sweep.plan:
        start, size = segment.blocks.start, sweep.gradient.block_size
        for part in chunks(segment.blocks.stop - start, size):
            rows = sweep[start + part.start : start + part.stop]
            values = update(rows)
            noise = rows.noise(segment.parameter, segment.first_element + part.start * size, values.p)
            store(values, rows, noise)


def noise_of(rounding: Rounding, step: int, parameter: int, first: int, like: Tensor, state: int) -> Tensor:
    """Random bits for each element of a state's rows, int32; `first` is the first element's index.

    They are 24 of a word; exp_avg has 16 of exp_avg_sq's word.
    """
    word = key(rounding.stream(step, EXP_AVG_SQ if state == EXP_AVG else state), parameter)
    last = rounding.multiplier(step), int(rounding.spread)
    words = random_words(word, first, like.numel(), like.device, *last).view_as(like)
    return fewer_bits(words) if state == EXP_AVG else upper_bits(words)


@dataclass(frozen=True)
class Update:
    """Values of rows after a step, float32; m and root times UNIT, v times UNIT^2."""

    p: Tensor  # [rows, block size], as all
    m_unclamped: Tensor
    m: Tensor
    v: Tensor
    root: Tensor  # of v

    def as_one_row(self) -> "Update":
        """All rows as one, [1, elements]."""
        return Update(*(getattr(self, field.name).view(1, -1) for field in fields(self)))


def update(rows: Sweep) -> Update:
    """The arithmetic of a step."""
    s, state = rows.scalars, rows.state
    g = decode(rows.gradient, rows.control[0] * UNIT)
    if s.decoupled:
        p = decode_masters(state.master, rows.weights, 1 - s.lr * s.weight_decay)
    else:
        p = decode_masters(state.master, rows.weights)
        g = g + p * (s.weight_decay * UNIT)
    m, v = state.moments(s.beta1, s.beta2)
    m = m_unclamped = m + g * (1 - s.beta1)
    v = (v + g * g * (1 - s.beta2)).clamp(max=FP32.max)
    root = square_root(v)
    if s.clamp is not None:
        m = torch.copysign(torch.minimum(m_unclamped.abs(), root * s.clamp), m_unclamped)
    p = p - m / (root * s.root_correction + s.eps * UNIT) * s.step_size
    return Update(p, m_unclamped, m, v, root)


def store(values: Update, rows: Sweep, noise: Noise) -> None:
    """Round the values of a step into the states and the weights of their rows."""
    state = rows.state
    encode_masters(values.p, state.master, rows.weights, noise(MASTER) if rows.rounding.stochastic else None)
    if state.stores_quotient:
        encode_quotient(quotient(values.m, values.root), state.exp_avg, noise(EXP_AVG))
    else:
        encode(values.m, state.exp_avg, LOG_UNIT)
    bits = noise(EXP_AVG_SQ) if state.stores_sqrt else None
    state.set_second_moment(values.v, values.root, bits, LOG_UNIT)
    if rows.counts is not None:
        rows.counts.add_(_count(values, state, bits))


def _count(values: Update, state: AdamState, bits: Tensor | None) -> Tensor:
    """`StateCounts` of values and of the state that holds them; bits: those given to `set_second_moment`."""
    clamped = (values.m_unclamped.abs() > values.m.abs()).sum()
    m = quotient(values.m, values.root) if state.stores_quotient else values.m
    underflows = (m.bool() & (to_float32(state.exp_avg.codes, state.exp_avg.format) == 0)).sum()
    lost, v = torch.zeros_like(clamped), state.exp_avg_sq
    if bits is not None and v.format is not FP32:
        root = values.root * UNIT**-1
        root = root if v.scales is None else scale_down(root, v.scales.to(torch.int32))
        lost = (root.bool() & (round_stochastically(root, bits, v.format) == 0)).sum()
    elif bits is None:
        lost = (values.v.bool() & (to_float32(v.codes, v.format) == 0)).sum()
    return torch.stack([clamped, underflows, lost]).to(torch.float64)
