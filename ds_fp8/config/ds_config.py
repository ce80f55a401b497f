"""What becomes of the rest of a ds_config when FP8 is on.

The tables are in `rules`. A key that they lack is refused, too: an error is better than a setting that
silently does something else.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ds_fp8.config.refusals import refusal, validate
from ds_fp8.config.rule_kinds import NoEffect, Refused, rule_at
from ds_fp8.config.rules import SECTIONS, TOP_LEVEL, Rules
from ds_fp8.config.section import SECTION, FP8Config, parse

STAGES = (1, 2, 3)
OPTIMIZER_TYPES = ("Adam", "AdamW", "FP8AdamW")
NULLABLE = ("bf16", "fp16")  # sections that DeepSpeed takes as absent if they are null
COMMENTS = ("comment", "comments")
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class OptimizerParams(BaseModel):
    """The "params" of the "optimizer" section."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    lr: float = Field(default=1e-3, ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    bias_correction: bool = True
    adam_w_mode: bool = True
    torch_adam: bool = False
    amsgrad: Literal[False] = False


def optimizer_params(params: Mapping[str, Any]) -> OptimizerParams:
    """Checked hyperparameters of ds_config's optimizer. Raises ValueError."""
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in params.items()}
    return validate(OptimizerParams, known, "optimizer.params")


def check(ds_config: Mapping[str, Any]) -> list[str]:
    """Refuse, by a ValueError, what does not go with FP8; the keys that have no effect are returned."""
    stage = check_stage(ds_config)
    idle = _apply(TOP_LEVEL, ds_config, stage, prefix="")
    for name, rules in SECTIONS.items():
        idle += _apply(rules, _section(ds_config, name), stage, prefix=f"{name}.")
    if stage == 3:
        _refuse_whole_tensors(parse(ds_config) or FP8Config())
    _check_optimizer(_section(ds_config, "optimizer"))
    for name in BATCHES:
        _check_count(name, ds_config.get(name))
    clipping = ds_config.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not 0 <= clipping < math.inf:
        raise refusal("gradient_clipping", clipping, "a number, 0 or more")
    return idle


def check_stage(ds_config: Mapping[str, Any]) -> int:
    """The stage of ZeRO. Raises ValueError if it does not go with FP8."""
    stage = _stage(ds_config)
    if isinstance(stage, bool) or stage not in STAGES:
        raise refusal("zero_optimization.stage", stage, f"{', '.join(map(str, STAGES))} with fp8 enabled")
    return int(stage)


def check_before_engine(ds_config: Mapping[str, Any]) -> list[str]:
    """What `check` refuses, but for what an engine that turns out to have no optimizer may have."""
    if not may_be_frozen(ds_config):
        return check(ds_config)
    if never_trains(ds_config):
        return []
    unread = [key for key in ds_config if _has_a_dot(key)]
    idle = check({key: value for key, value in ds_config.items() if key not in unread})
    return [*(f"{key} (DeepSpeed reads no key with a dot)" for key in unread), *idle]


def check_trained(ds_config: Mapping[str, Any]) -> None:
    """Refuse what `check_before_engine` has let pass: there is an optimizer."""
    if may_be_frozen(ds_config):
        check(ds_config)


def may_be_frozen(ds_config: Mapping[str, Any]) -> bool:
    """Whether an engine of this config may have no optimizer, and so nothing to do in FP8.

    TRL makes its reference model's engine of the trained one's config without "optimizer". It has stage 0, or
    stage 3 and keys with a dot ("zero_optimization.reduce_bucket_size"), which DeepSpeed does not read.
    A client's optimizer shows later; then `check_trained` refuses.
    """
    stage = _stage(ds_config)
    return stage in (0, 3) and not isinstance(stage, bool) and "optimizer" not in ds_config


def never_trains(ds_config: Mapping[str, Any]) -> bool:
    """Whether an engine of this config has nothing to do in FP8 or, if it has an optimizer, is refused."""
    return may_be_frozen(ds_config) and _stage(ds_config) == 0


def _stage(ds_config: Mapping[str, Any]) -> Any:
    return _section(ds_config, "zero_optimization").get("stage", 0)


def _has_a_dot(key: Any) -> bool:
    """Whether this is a path, such as "zero_optimization.reduce_bucket_size", in place of a key."""
    name, dot, field = str(key).partition(".")
    return bool(dot) and field in SECTIONS.get(name, {})


def _refuse_whole_tensors(config: FP8Config) -> None:
    """One scale per tensor, and sums with it, require whole tensors on a rank."""
    beside = "with zero_optimization.stage 3, which cuts every tensor into slices"
    given = {"scaling": config.scaling, "gradients.reduction": config.gradients.reduction}
    allowed = {"scaling": "block", "gradients.reduction": "fp32"}
    mistakes = [
        str(refusal(f"{SECTION}.{key}", value, f'"{allowed[key]}" {beside}'))
        for key, value in given.items()
        if value != allowed[key]
    ]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _section(ds_config: Mapping[str, Any], name: str, path: str | None = None) -> Mapping[str, Any]:
    section = ds_config.get(name, {})
    if section is None and name in NULLABLE:
        return {}
    if not isinstance(section, Mapping):
        raise refusal(path or name, section, "an object")
    return section


def _apply(rules: Rules, section: Mapping[str, Any], stage: int, prefix: str) -> list[str]:
    idle = []
    for key, value in section.items():
        if str(key).startswith("_") or key in COMMENTS:
            continue
        path = f"{prefix}{key}"
        if key not in rules:
            dotted = f"; it goes into the section {key.rpartition('.')[0]}" if "." in str(key) else ""
            raise refusal(path, value, f"the key left out (ds_fp8 does not know it{dotted})")
        rule = rule_at(stage, rules[key])
        if isinstance(rule, Refused) and not rule.accepts(value):
            raise refusal(path, value, f"{rule.allowed(value)} ({key} {rule.why})")
        if isinstance(rule, NoEffect):
            idle.append(f"{path} ({rule.why})")
    return idle


def _check_count(name: str, value: Any) -> None:
    """DeepSpeed takes 1.5 micro-steps, and null as left out."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if value is not None and not (number >= 1 and number % 1 == 0):
        raise refusal(name, value, "an integer, 1 or more")


def _check_optimizer(section: Mapping[str, Any]) -> None:
    allowed = [name.lower() for name in OPTIMIZER_TYPES]
    kind = section.get("type")
    if kind is not None and str(kind).lower() not in allowed:
        raise refusal("optimizer.type", kind, f"{', '.join(OPTIMIZER_TYPES)} with fp8 enabled")
    optimizer_params(_section(section, "params", "optimizer.params"))


def initialize_params(original: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeedConfig._initialize_params: parse the section, refuse what the config alone shows."""

    @functools.wraps(original)
    def method(self: Any, param_dict: dict[str, Any]) -> None:
        config = parse(param_dict)
        enabled = config is not None and config.enabled
        idle = check_before_engine(param_dict) if enabled else []
        original(self, param_dict)
        self.ds_fp8, self.ds_fp8_idle_keys = config, idle
        if config is not None and config.enabled and str(self.optimizer_name).lower() == "fp8adamw":
            self.optimizer_name = (
                "adam"  # DeepSpeed does not know FP8AdamW; "adam" means AdamW unless adam_w_mode is false
            )

    return method
