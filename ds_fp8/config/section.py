"""The "fp8" section of ds_config.json.

Strict and frozen: an unknown key, a value of another type, a combination that does not work, each is
a ValueError that gives the key's full path, the value received and what is allowed. "auto" is
no value of any key (accelerate raises on such a leaf); a key left out takes the value that its level
and the run imply.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ds_fp8.config.refusals import LEFT_OUT, refusal, show

SECTION = "fp8"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GradientsSection(_Strict):
    """How gradients travel and are kept."""

    dtype: Literal["e4m3", "e5m2", "bf16"] = "e4m3"
    """Between ranks, and of the reduced gradient unless `accum_dtype` is set."""
    reduction: Literal["fp32", "fp8"] = "fp32"
    """How the ranks' gradients are added; fp8: the paper's sum of codes, with `scaling` tensor."""
    autoscale: Literal["dynamic", "pre", "post"] | None = None
    """What keeps a sum in FP8 from overflow and underflow; left out: dynamic."""
    accum_dtype: Literal["fp32", "bf16", "e4m3"] | None = None
    """The reduced gradient; left out: as `dtype` with one micro-step per step, else fp32."""
    intra_node_size: int | None = Field(default=None, ge=1)
    """Consecutive ranks that make a node of the two-hop exchange; left out, 1, the world size: one hop."""
    inter_node_dtype: Literal["e4m3", "bf16"] | None = None
    """Between nodes; left out: as `dtype`."""


class OptimizerSection(_Strict):
    """Formats of the Adam states."""

    master_dtype: Literal["fp32", "fp16", "bf16", "split16", "split8"] | None = None
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "int8", "e4m3", "e5m2"] | None = None
    """int8: over the root of exp_avg_sq, rounded stochastically; else rounded to nearest."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "ue4m4", "e4m3", "e5m2"] | None = None
    rounding: Literal["nearest", "stochastic"] | None = None
    draws: Literal["independent", "spread"] | None = None
    """Random bits of stochastic rounding from step to step; left out: spread if exp_avg is int8."""
    clamp: bool = True
    seed: int = Field(default=0, ge=0)


class WeightsSection(_Strict):
    """Formats of the weights on every rank."""

    dtype: Literal["e4m3"] | None = None
    """Format of matrices that only matrix products read; left out: that of the level."""
    exclude: list[str] = []
    """Patterns of names that stay as the model; output head, embeddings and tied weights always do."""
    min_elements: int = Field(default=2**21, ge=1)
    """Elements of the smallest FP8 matrix; its shorter side squared is at least half of that."""
    frozen: Literal["bf16", "e4m3"] = "bf16"
    """Format of matrices that do not train."""


class ProductsSection(_Strict):
    """Formats of matrix products."""

    dtype: Literal["e4m3", "bf16"] | None = None
    """Format of the operands, with weights in e4m3; left out: e4m3 if the device has it, else bf16."""


class OffloadSection(_Strict):
    """How states in host memory are stepped."""

    executor: Literal["auto", "stream", "host"] = "auto"
    """stream: states visit the device; host: the host steps them; auto: whichever is faster here."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the host's sweep; left out: the cores available per rank."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the states that lives in host memory, by rows."""


class CheckpointSection(_Strict):
    """What checkpoints hold and which are loaded."""

    fp32_master: bool = True
    allow_conversion: bool = False
    weights: Literal["codes", "masters"] = "codes"
    """Values of FP8 weights in model files: those of their codes, or of their masters."""


class StatsSection(_Strict):
    """How often health is measured."""

    interval: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Level:
    """The states of an `opt_level`, and its weights."""

    master: str
    exp_avg: str
    exp_avg_sq: str
    weights: str | None = None  # of matrices that only products read; None: as the model


LEVELS = {
    "O1": Level("fp32", "fp32", "fp32"),
    "O2": Level("fp16", "int8", "fp16"),
    "O2+": Level("split16", "int8", "ue4m4"),
    "O3": Level("fp16", "int8", "ue4m4", "e4m3"),
}
PUBLISHED_EXP_AVG = "e4m3"  # of O2, O2+ and O3 with one scale per tensor
ROUNDED = ("fp16", "bf16", "split8")  # masters that can be rounded stochastically
WHOLE = ("fp32", "fp16", "bf16")  # masters that need nothing of the weight


class FP8Config(_Strict):
    """The "fp8" section of a ds_config, checked and frozen.

    A key left out takes the value that its level and the run imply. docs/options.md has a table.

    Args:
        enabled: whether FP8 is on; if it is not, DeepSpeed runs unchanged.
        opt_level: "O1", "O2", "O2+" or "O3".
        scaling: what shares a scale: "block", or "tensor" as FP8-LM publishes it.
        block_size: elements per scale: 32, 64, 128 or 256.
        gradients, optimizer, weights, products, offload, checkpoint, stats: the sections of these names.
        max_consecutive_skips: skipped steps in a row before an error.

    Raises:
        ValueError: an unknown key or a wrong value (pydantic's ValidationError), by
            `FP8Config.model_validate({...})`.
    """

    enabled: bool = False
    opt_level: Literal["O1", "O2", "O2+", "O3"] = "O2"
    scaling: Literal["block", "tensor"] = "block"
    block_size: Literal[32, 64, 128, 256] = 128
    gradients: GradientsSection = GradientsSection()
    optimizer: OptimizerSection = OptimizerSection()
    weights: WeightsSection = WeightsSection()
    products: ProductsSection = ProductsSection()
    offload: OffloadSection = OffloadSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stats: StatsSection = StatsSection()
    max_consecutive_skips: int = Field(default=50, ge=1)

    @field_validator("block_size", mode="before")
    @classmethod
    def _no_float(cls, value: Any) -> Any:
        """Refuse a float: 128.0 equals 128 and would be accepted."""
        if isinstance(value, float):
            raise ValueError("an integer")
        return value

    @property
    def states(self) -> Level:
        """Formats of states and weights: the level's, unless the section names others."""
        level, given = LEVELS[self.opt_level], self.optimizer
        by_tensor = self.scaling == "tensor" and level.exp_avg == "int8"
        return Level(
            given.master_dtype or level.master,
            given.exp_avg_dtype or (PUBLISHED_EXP_AVG if by_tensor else level.exp_avg),
            given.exp_avg_sq_dtype or level.exp_avg_sq,
            self.weights.dtype or level.weights,
        )

    @property
    def weights_key(self) -> tuple[str, str]:
        """The key that asks for FP8 weights, with its value."""
        if self.weights.dtype is not None:
            return f"{SECTION}.weights.dtype", self.weights.dtype
        if self.states.weights is None:
            return f"{SECTION}.weights.frozen", self.weights.frozen
        return f"{SECTION}.opt_level", self.opt_level

    @property
    def has_codes(self) -> bool:
        """Whether weights are FP8, of those that train or of frozen ones."""
        return self.states.weights is not None or self.weights.frozen == "e4m3"

    def refusal_of_weights(self, where: str) -> ValueError:
        """FP8 weights, which a run cannot have, refused by the key that asks for them."""
        path, value = self.weights_key
        levels = ", ".join(show(name) for name, level in LEVELS.items() if level.weights is None)
        return refusal(path, value, f"{levels if value in LEVELS else LEFT_OUT} {where}")

    @property
    def stochastic(self) -> bool:
        """Whether masters are rounded stochastically: if bits are lost, unless `rounding` is nearest.

        With one scale per tensor they are rounded to nearest, as published, unless `rounding` is stochastic.
        """
        left_out = "stochastic" if self.scaling == "block" else "nearest"
        return self.states.master in ROUNDED and (self.optimizer.rounding or left_out) == "stochastic"

    @property
    def draws_moments(self) -> bool:
        """Whether a moment is rounded stochastically."""
        return self.scaling == "block" and (self.states.exp_avg == "int8" or self.states.exp_avg_sq != "fp32")

    @property
    def spread(self) -> bool:
        """Whether an element's draws spread from step to step."""
        left_out = "spread" if self.states.exp_avg == "int8" else "independent"
        return (self.optimizer.draws or left_out) == "spread"
