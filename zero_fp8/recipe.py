"""The formats and rules of a run, as plain values: what the layers below see of the config."""

from dataclasses import dataclass

import torch

from ds_fp8.config import FP8Config
from ds_fp8.ops.adam import Rounding
from ds_fp8.ops.formats import BY_NAME, FP32, Format


@dataclass(frozen=True)
class Recipe:
    """The formats and rules of a run, as plain values."""

    block_size: int
    wire: Format  # gradients between ranks
    shard: Format  # the reduced gradient
    promote: bool  # a second micro-step turns the reduced gradient FP32
    master: Format
    stochastic: bool  # masters are rounded stochastically
    exp_avg: Format
    exp_avg_sq: Format
    clamp: bool
    seed: int

    @property
    def rounding(self) -> Rounding:
        """Of the sweep."""
        return Rounding(self.seed, self.stochastic)

    @property
    def clamped(self) -> bool:
        """Whether m is clamped: only a state below FP32 can need it."""
        return self.clamp and (self.exp_avg is not FP32 or self.exp_avg_sq is not FP32)


def recipe_of(config: FP8Config, *, accumulating: bool = False) -> Recipe:
    """The section as plain values; `accumulating`: several micro-steps reach the reduced gradient."""
    states, gradients = config.states, config.gradients
    wire = BY_NAME[gradients.dtype]
    shard = BY_NAME[gradients.accum_dtype] if gradients.accum_dtype else FP32 if accumulating else wire
    return Recipe(
        block_size=config.block_size,
        wire=wire,
        shard=shard,
        promote=gradients.accum_dtype is None,
        master=BY_NAME[states.master],
        stochastic=config.stochastic,
        exp_avg=BY_NAME[states.exp_avg],
        exp_avg_sq=BY_NAME[states.exp_avg_sq],
        clamp=config.optimizer.clamp,
        seed=config.optimizer.seed,
    )


def weight_dtypes(master: Format) -> tuple[torch.dtype, ...]:
    """Dtypes that a weight can have beside such a master."""
    if master.split:
        return (torch.bfloat16,)
    return (torch.bfloat16, torch.float32, torch.float16)
