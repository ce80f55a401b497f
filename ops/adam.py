"""Adam on low-precision states: one sweep a step.

Gradient, master weight, exp_avg (m) and exp_avg_sq (v) and their scales are read once, computed in
FP32, written once, and the model weight is written in the same sweep. Block scales make that
possible: a block's new amax is known as soon as the block is computed. (FP8-LM, arXiv 2310.18313
section 2.2, keeps one scale a tensor and so needs two sweeps.)

What keeps a small v from breaking the update (v flushed to zero while m survives is a division by
eps): below FP32 the square root of v is stored, rounded stochastically and never from non-zero to
zero; and m is clamped to what exact Adam obeys anyway, |m| <= C sqrt(v) (Cauchy-Schwarz over the
same decaying sum, `next_clamp`).

Adam does not notice the unit of the gradient, so the sweep takes it 2^24 times smaller: then the square
of a gradient of 1e-20 is still a normal FP32 number. v saturates where FP32 ends.

Masters and weights are stored together (`ops.masters`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks, chunks, decode, encode, fit, scale_down, to_float32
from ds_fp8.ops.formats import FP32
from ds_fp8.ops.masters import decode_masters, encode_masters
from ds_fp8.ops.rounding import (
    EXP_AVG_SQ,
    HALF,
    MASTER,
    key,
    random_bits,
    round_stochastically,
    round_up_from_zero,
    stream,
)

LOG_UNIT = 24
UNIT = 2.0**LOG_UNIT  # of the gradient, inside the sweep


@dataclass(frozen=True)
class AdamState:
    """States of consecutive blocks; exp_avg_sq holds v in FP32 and sqrt(v) in any other format."""

    master: Blocks
    exp_avg: Blocks
    exp_avg_sq: Blocks

    def __getitem__(self, rows: slice) -> "AdamState":
        return AdamState(self.master[rows], self.exp_avg[rows], self.exp_avg_sq[rows])


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks of one parameter inside a shard."""

    blocks: slice  # rows of the shard
    parameter: int  # global index of the parameter
    first_element: int  # element of the parameter with which the rows begin


@dataclass(frozen=True)
class AdamScalars:
    """What a sweep multiplies with; each is rounded to FP32 where it meets a tensor."""

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
        """What turns sqrt(v) into its bias-corrected value."""
        return 1 / math.sqrt(1 - self.beta2**self.step) if self.bias_correction else 1.0


@dataclass(frozen=True)
class Rounding:
    """The seed of a run's random bits, and whether masters are rounded by them too."""

    seed: int
    stochastic: bool = False


def next_clamp(previous: float | None, betas: tuple[float, float]) -> float:
    """C_t^2 from C_{t-1}^2, or its fixed point where `previous` is None; inf: no bound, ever after.

    C_t^2 = (beta1^2 / beta2) C_{t-1}^2 + (1 - beta1)^2 / (1 - beta2), by Cauchy-Schwarz on
    m_t = beta1 m + (1 - beta1) g and v_t = beta2 v + (1 - beta2) g^2; it needs beta1^2 < beta2.
    """
    beta1, beta2 = betas
    if beta1**2 >= beta2 or previous == math.inf:
        return math.inf
    fresh = (1 - beta1) ** 2 / (1 - beta2)
    ratio = beta1**2 / beta2
    return fresh / (1 - ratio) if previous is None else ratio * previous + fresh


def plan(
    segments: Sequence[Segment], blocks: int, block_size: int, device: torch.device
) -> tuple[Segment, ...]:
    """What `adam_step` needs to know of a shard of so many blocks, made once; here the segments."""
    return tuple(segments)


def adam_step(
    state: AdamState,
    gradient: Blocks,  # sum over ranks, of the same rows as the state
    weights: Tensor,  # [rows, block size] model dtype, written; read where the master is split
    plan: Sequence[Segment],
    scalars: AdamScalars,
    control: Tensor,  # [2] float32
    *,
    rounding: Rounding,
    counts: Tensor | None = None,
) -> None:
    """One sweep over the segments of a shard, in the order of its rows.

    control: what the gradient is multiplied with (1 / world size, loss scale and clip factor in one),
    and 1 where the step is taken, 0 where every byte stays as it is. Both are read where the tensor is,
    so that a GPU does not wait for the host. Rows outside every segment hold zeros and keep them.
    counts: `ops.health.StateCounts` as a float64 vector on the device of the weights, added to.
    """
    if not control[1]:
        return
    for segment in plan:
        start, size = segment.blocks.start, gradient.block_size
        for part in chunks(segment.blocks.stop - start, size):
            rows = slice(start + part.start, start + part.stop)
            g = decode(gradient[rows], control[0] * UNIT)
            first = segment.first_element + part.start * size
            noise = partial(_noise, rounding.seed, scalars.step, segment.parameter, first, g)
            found = _sweep(state[rows], g, weights[rows], scalars, noise, rounding.stochastic)
            if counts is not None:
                counts += _count(found, state[rows], noise(EXP_AVG_SQ))


def _noise(seed: int, step: int, parameter: int, first: int, like: Tensor, state: int) -> Tensor:
    """24 random bits for each element of a state's rows, int32; `first` is the first element's index."""
    word = key(stream(seed, step, state), parameter)
    return random_bits(word, first, like.numel(), like.device).view_as(like)


def _sweep(
    state: AdamState,
    g: Tensor,
    weights: Tensor,
    s: AdamScalars,
    noise: Callable[[int], Tensor],
    stochastic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a segment; g, m, v and eps are in the unit of the gradient times UNIT.

    Returns m before the clamp and after it, and the root of v.
    """
    if s.decoupled:
        p = decode_masters(state.master, weights, 1 - s.lr * s.weight_decay)
    else:
        p = decode_masters(state.master, weights)
        g = g + p * (s.weight_decay * UNIT)
    m = fresh = decode(state.exp_avg, s.beta1 * UNIT) + g * (1 - s.beta1)
    v = decode_second_moment(state.exp_avg_sq, s.beta2) + g * g * (1 - s.beta2)
    v = v.clamp(max=FP32.max)
    root = square_root(v)
    if s.clamp is not None:
        m = torch.copysign(torch.minimum(fresh.abs(), root * s.clamp), fresh)
    p = p - m / (root * s.root_correction + s.eps * UNIT) * s.step_size
    encode_masters(p, state.master, weights, noise(MASTER) if stochastic else None)
    encode(m, state.exp_avg, LOG_UNIT)
    encode_second_moment(v * UNIT**-2, root * UNIT**-1, state.exp_avg_sq, noise(EXP_AVG_SQ))
    return fresh, m, root


def _count(found: tuple[Tensor, Tensor, Tensor], state: AdamState, bits: Tensor) -> Tensor:
    """`StateCounts` of what `_sweep` returned and the state that it left."""
    fresh, m, root = found
    clamped = (fresh.abs() > m.abs()).sum()
    underflows = (m.bool() & (to_float32(state.exp_avg.codes, state.exp_avg.format) == 0)).sum()
    rescued, v = torch.zeros_like(clamped), state.exp_avg_sq
    if v.format is not FP32:
        root = root * UNIT**-1 if v.scales is None else scale_down(root * UNIT**-1, v.scales.to(torch.int32))
        rescued = (root.bool() & (round_stochastically(root, bits, v.format) == 0)).sum()
    return torch.stack([clamped, underflows, rescued]).to(torch.float64)


def square_root(v: Tensor) -> Tensor:
    """FP32 square roots, correctly rounded: torch's own on a CPU may be off by one in the last place.

    A float64 root has more than twice the digits, so rounding it again changes nothing.
    """
    return v.to(torch.float64).sqrt().to(torch.float32)


def decode_second_moment(blocks: Blocks, factor: float = 1.0) -> Tensor:
    """v of a chunk times UNIT^2 and a factor, [rows, block size] float32.

    A stored root takes the root of the factor, before it is squared: so nothing leaves FP32's range.
    """
    if blocks.format is FP32:
        return decode(blocks, UNIT**2 * factor)
    return decode(blocks, UNIT * math.sqrt(factor)).square()


def encode_second_moment(v: Tensor, root: Tensor, out: Blocks, bits: Tensor | None = None) -> None:
    """Store v in FP32, or sqrt(v), non-zero values never as zero.

    bits: 24 random bits an element, int32, for stochastic rounding; None rounds to nearest.
    """
    if out.format is FP32:
        encode(v, out)
        return
    if bits is None:
        bits = torch.full_like(root, HALF, dtype=torch.int32)
    out.codes.copy_(round_up_from_zero(fit(root, out), bits, out.format))
