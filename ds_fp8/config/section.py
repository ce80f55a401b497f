"""The "fp8" section of ds_config.json.

Strict and frozen: an unknown key, a value of another type, a combination that does not work, each is
a ValueError that gives the key's full path, the value received and what is allowed. "auto" is
no value of any key (accelerate raises on such a leaf); a key left out takes the value that its level
and the run imply.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from ds_fp8.config.refusals import LEFT_OUT, refusal, show, validate
from ds_fp8.config.subsections import (
    CheckpointSection,
    OffloadSection,
    ProductsSection,
    StatsSection,
    Strict,
)

SECTION = "fp8"


class GradientsSection(Strict):
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


class OptimizerSection(Strict):
    """Formats of the Adam states."""

    master_dtype: Literal["fp32", "fp16", "bf16", "split16", "split8"] | None = None
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "int8", "e4m3", "e5m2"] | None = None
    """int8: over the root of exp_avg_sq, rounded stochastically; else rounded to nearest."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "ue4m4", "e4m3", "e5m2"] | None = None
    rounding: Literal["nearest", "stochastic"] | None = None
    draws: Literal["independent", "spread"] | None = None
    """Of stochastic rounding, from step to step; left out: spread beside exp_avg in int8."""
    clamp: bool = True
    seed: int = Field(default=0, ge=0)


class WeightsSection(Strict):
    """Formats of the weights on every rank."""

    dtype: Literal["e4m3"] | None = None
    """Of matrices that only products read; left out: as the level has it."""
    exclude: list[str] = Field(default=[])
    """Patterns of names that stay as the model; output head, embeddings and tied weights always do."""
    min_elements: int = Field(default=2**21, ge=1)
    """Of the smallest matrix; its shorter side squared is at least half of that."""
    frozen: Literal["bf16", "e4m3"] = "bf16"
    """Of matrices that do not train."""


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


class FP8Config(Strict):
    """The "fp8" section of a ds_config, checked and frozen.

    `FP8Config.model_validate({...})` raises pydantic's ValidationError, a ValueError, for an unknown key or a
    wrong value. A key left out takes the value that its level and the run imply. docs/options.md has a table.
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
        """128.0 equals 128, and so passes for the literal."""
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


def parse(ds_config: Mapping[str, Any]) -> FP8Config | None:
    """The section of a ds_config, or None if there is none. Raises ValueError."""
    _refuse_lookalikes(ds_config)
    if SECTION not in ds_config:
        return None
    config = validate(FP8Config, ds_config[SECTION], SECTION)
    if config.enabled:
        _refuse_idle_rounding(config)
        _refuse_without_nodes(config.gradients)
        _refuse_fp8_sum(config)
        if not config.has_codes:
            _refuse_without_codes(config)
        if config.states.weights is not None:
            _refuse_with_codes(config)
        if config.scaling == "tensor":
            _refuse_with_tensors(config)
    return config


def _refuse_lookalikes(ds_config: Mapping[str, Any]) -> None:
    for key in ds_config:
        letters = re.sub(r"[^a-z0-9]", "", str(key).lower())
        if key != SECTION and letters in ("fp8", "float8", "dsfp8", "fp8lm"):
            raise refusal(str(key), ds_config[key], f'the section is spelled "{SECTION}"')
    msamp = ds_config.get("msamp")
    if msamp.get("enabled") if isinstance(msamp, Mapping) else msamp:
        level = msamp.get("opt_level", "O1") if isinstance(msamp, Mapping) else "O1"
        section = {SECTION: {"enabled": True, "opt_level": level if level in LEVELS else "O2"}}
        raise refusal("msamp", msamp, f"MS-AMP's section is read by MS-AMP only; write {show(section)}")


def _refuse_idle_rounding(config: FP8Config) -> None:
    if config.optimizer.rounding == "stochastic" and config.states.master not in ROUNDED:
        allowed = f'"nearest" with the master {config.states.master}, of which nothing is rounded away; '
        raise refusal(
            f"{SECTION}.optimizer.rounding", "stochastic", f'{allowed}"stochastic" with {", ".join(ROUNDED)}'
        )
    draws = config.optimizer.draws
    if draws is not None and not config.stochastic and not config.draws_moments:
        allowed = "the key left out: no state of this run is rounded stochastically"
        raise refusal(f"{SECTION}.optimizer.draws", draws, allowed)


def _refuse_without_nodes(gradients: GradientsSection) -> None:
    if gradients.inter_node_dtype is not None and gradients.intra_node_size is None:
        allowed = "the key left out, or fp8.gradients.intra_node_size beside it"
        raise refusal(f"{SECTION}.gradients.inter_node_dtype", gradients.inter_node_dtype, allowed)


def _refuse_with_tensors(config: FP8Config) -> None:
    """What is not available with one scale per tensor, as published."""
    nodes, optimizer = config.gradients.intra_node_size, config.optimizer
    beside = f'with {SECTION}.scaling "tensor"'
    if nodes not in (None, 1):
        allowed = f"the key left out, or 1, {beside}: whole tensors travel in one hop"
        raise refusal(f"{SECTION}.gradients.intra_node_size", nodes, allowed)
    if config.states.exp_avg == "int8":
        allowed = f"fp32, bf16, fp16, e4m3, e5m2 {beside}, which stores exp_avg itself, rounded to nearest"
        raise refusal(f"{SECTION}.optimizer.exp_avg_dtype", "int8", allowed)
    if config.states.exp_avg_sq == "ue4m4":
        allowed = f"fp32, bf16, fp16, e4m3, e5m2 {beside}, which stores exp_avg_sq itself, rounded to nearest"
        raise refusal(f"{SECTION}.optimizer.exp_avg_sq_dtype", "ue4m4", allowed)
    if optimizer.clamp and "clamp" in optimizer.model_fields_set:
        raise refusal(f"{SECTION}.optimizer.clamp", True, f"false, or the key left out, {beside}")


def _refuse_without_codes(config: FP8Config) -> None:
    """Keys that say nothing if no weight is FP8."""
    weights, products = config.weights, config.products
    given = {f"weights.{key}": getattr(weights, key) for key in ("exclude", "min_elements")}
    idle = {path: value for path, value in given.items() if path.split(".")[1] in weights.model_fields_set}
    if products.dtype == "e4m3":
        idle["products.dtype"] = products.dtype
    for path, value in idle.items():
        allowed = (
            f'the key left out, or {SECTION}.weights.dtype "e4m3" beside it, which is that of O3, or '
            f'{SECTION}.weights.frozen "e4m3"'
        )
        raise refusal(f"{SECTION}.{path}", value, allowed)


def _refuse_with_codes(config: FP8Config) -> None:
    """What is not available with FP8 weights, which are made of masters, tile by tile."""
    path, value = config.weights_key
    if config.scaling != "block":
        allowed = f'"block" with {path} {show(value)}, whose weights have a scale per tile'
        raise refusal(f"{SECTION}.scaling", config.scaling, allowed)
    master, why = config.states.master, "a split master is what lies below a BF16 weight"
    if master not in WHOLE and config.optimizer.master_dtype is not None:
        allowed = f"{', '.join(map(show, WHOLE))} with {path} {show(value)}: {why}"
        raise refusal(f"{SECTION}.optimizer.master_dtype", master, allowed)
    if master not in WHOLE:
        raise config.refusal_of_weights(f"with {SECTION}.opt_level {show(config.opt_level)}: {why}")


def _refuse_fp8_sum(config: FP8Config) -> None:
    """`reduction` fp8 requires `scaling` tensor and an FP8 dtype; `autoscale` requires `reduction` fp8."""
    gradients, path = config.gradients, f"{SECTION}.gradients"
    if gradients.reduction == "fp32":
        if gradients.autoscale is not None:
            allowed = f'the key left out, or {path}.reduction "fp8" beside it'
            raise refusal(f"{path}.autoscale", gradients.autoscale, allowed)
        return
    if config.scaling != "tensor":
        raise refusal(f"{path}.reduction", "fp8", f'"fp32", or {SECTION}.scaling "tensor" beside it')
    if gradients.dtype == "bf16":
        raise refusal(f"{path}.dtype", "bf16", f'"e4m3", "e5m2" with {path}.reduction "fp8"')
