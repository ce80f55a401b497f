"""The formats and rules of a run, as plain values: what the layers below see of fp8 section and ds_config."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ds_fp8.config.section import FP8Config
from ds_fp8.ops.formats import BF16, BY_NAME, FP32, Format
from ds_fp8.ops.rounding import Rounding


@dataclass(frozen=True)
class Recipe:
    """The formats and rules of a run, as plain values."""

    block_size: int
    wire: Format  # gradients between ranks
    reduced: Format  # the reduced gradient
    promote: bool  # a second micro-step turns the reduced gradient FP32
    master: Format
    rounding: Rounding
    exp_avg: Format
    exp_avg_sq: Format
    clamp: bool
    by_tensor: bool = False  # one scale per tensor and whole tensors on a rank, else one scale per block
    autoscale: str | None = None  # of gradients that are added in FP8; None: they are added in FP32
    intra_node_size: int = 1  # ranks per node of the two-hop exchange; 1 = one hop
    inter_node: Format | None = None  # gradients between nodes; None = as wire
    weights: Format | None = None  # of matrices that only products read; None = as the model

    def two_hops(self, ranks: int) -> bool:
        """Whether the ranks make several nodes of several ranks."""
        return 1 < self.intra_node_size < ranks

    @property
    def gradient_scale_bytes(self) -> int:
        """Bytes of the scale of a block of the reduced gradient; 0 without scales."""
        return 1 if self.autoscale is None else 4

    @property
    def wire_scale_bytes(self) -> int:
        """Bytes of the scale that travels with a block; 0 if the ranks agree on scales beforehand."""
        return 1 if self.autoscale is None else 0

    @property
    def between_nodes(self) -> Format:
        """Format of gradients on the second hop."""
        return self.inter_node or self.wire

    @property
    def clamped(self) -> bool:
        """Whether m is clamped: only a state below FP32 can need it."""
        return self.clamp and (self.exp_avg is not FP32 or self.exp_avg_sq is not FP32)


@dataclass(frozen=True)
class Offload:
    """States in host memory, as plain values."""

    executor: str = "auto"  # or stream, host
    pinned: bool = True  # if CUDA lets it
    ratio: float = 1.0  # share of the states, by rows
    threads: int | None = None  # of the host executor; None: as many as there are cores for a rank


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of the ds_config that the handler uses, as plain values."""

    stage: int  # 1, 2 or 3
    bucket_elements: int  # reduce_bucket_size
    overlap: bool  # exchanges run while backward goes on
    gradient_clipping: float  # largest global norm; 0 = off
    average: bool  # over the data-parallel ranks; else their sum
    max_consecutive_skips: int
    save_fp32_master: bool
    stats_interval: int
    masters_in_model_files: bool = False  # of FP8 weights; else the values of their codes
    sequence_parallel_size: int = 1  # ranks that share a sequence; each has the gradient of its part
    micro_steps: int = 1  # before a step, as the config says
    accumulate_in_fp32: bool = False  # the micro-steps of ZeRO 1, in `.grad`
    # In norm and health: what model-parallel peers hold alike, one of them counts.
    counts_replicated: bool = True
    offload: Offload | None = None  # None: states live on the device


def offload_from(config: FP8Config, zero_config: Any) -> Offload | None:
    """The settings of offload from section and ds_config. zero_config: DeepSpeed's "zero_optimization"."""
    optimizer = zero_config.offload_optimizer
    if optimizer is None or optimizer.device == "none":
        return None
    given = config.offload
    return Offload(given.executor, bool(optimizer.pin_memory), given.ratio, given.threads)


def recipe_of(config: FP8Config, *, accumulating: bool = False, ranks: int = 1) -> Recipe:
    """The section as plain values; `accumulating`: several micro-steps reach the reduced gradient.

    The reduced gradient has `accum_dtype`, if given. Else it is FP32 if several micro-steps reach it, BF16 if
    two hops have rounded it to 8 bits twice (a third time would take a parameter's gradient further from
    stock's than one hop ever does), and as the wire otherwise.
    """
    states, gradients = config.states, config.gradients
    recipe = Recipe(
        block_size=config.block_size,
        wire=BY_NAME[gradients.dtype],
        reduced=BY_NAME[gradients.accum_dtype or gradients.dtype],
        promote=gradients.accum_dtype is None,
        master=BY_NAME[states.master],
        rounding=Rounding(config.optimizer.seed, config.stochastic, config.spread),
        exp_avg=BY_NAME[states.exp_avg],
        exp_avg_sq=BY_NAME[states.exp_avg_sq],
        clamp=config.optimizer.clamp and config.scaling == "block",
        by_tensor=config.scaling == "tensor",
        autoscale=(gradients.autoscale or "dynamic") if gradients.reduction == "fp8" else None,
        intra_node_size=gradients.intra_node_size or 1,
        inter_node=BY_NAME[gradients.inter_node_dtype] if gradients.inter_node_dtype else None,
        weights=BY_NAME[states.weights] if states.weights else None,
    )
    if recipe.promote and accumulating:
        return replace(recipe, reduced=FP32)
    if recipe.promote and recipe.two_hops(ranks) and recipe.wire.scaled and recipe.between_nodes.scaled:
        return replace(recipe, reduced=BF16)
    return recipe


def weight_dtypes(master: Format) -> tuple[torch.dtype, ...]:
    """Dtypes that a weight can have beside such a master."""
    if master.split:
        return (torch.bfloat16,)
    return (torch.bfloat16, torch.float32, torch.float16)
