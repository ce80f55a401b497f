"""What becomes of the rest of a ds_config when FP8 is on.

The tables are in `rules`. A key that they lack is refused too: better an error than a setting that
silently does something else.
"""

from collections.abc import Mapping
from typing import Any

from ds_fp8.config import refusal
from ds_fp8.rules import SECTIONS, TOP_LEVEL, NoEffect, Refused, Rule

OPTIMIZER_TYPES = ("Adam", "AdamW", "FP8AdamW")
OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode", "torch_adam")
STAGES = (1, 2)


def check(ds_config: Mapping[str, Any]) -> list[str]:
    """Refuse, by a ValueError, what does not go with FP8; the keys that have no effect are returned."""
    idle = _apply(TOP_LEVEL, ds_config, prefix="")
    zero = _section(ds_config, "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        raise refusal("zero_optimization.stage", stage, "1, 2 with fp8 enabled")
    for name, rules in SECTIONS.items():
        idle += _apply(rules, _section(ds_config, name), prefix=f"{name}.")
    _check_optimizer(_section(ds_config, "optimizer"))
    return idle


def _section(ds_config: Mapping[str, Any], name: str, path: str | None = None) -> Mapping[str, Any]:
    section = ds_config.get(name, {})
    if not isinstance(section, Mapping):
        raise refusal(path or name, section, "an object")
    return section


def _apply(rules: Mapping[str, Rule], section: Mapping[str, Any], prefix: str) -> list[str]:
    idle = []
    for key, value in section.items():
        path, rule = prefix + key, rules.get(key)
        if rule is None:
            raise refusal(path, value, "the key left out (ds_fp8 does not know it)")
        if isinstance(rule, Refused) and not rule.accepts(value):
            raise refusal(path, value, f"{rule.allowed(value)} ({key} {rule.why})")
        if isinstance(rule, NoEffect):
            idle.append(f"{path} ({rule.why})")
    return idle


def _check_optimizer(section: Mapping[str, Any]) -> None:
    allowed = [each.lower() for each in OPTIMIZER_TYPES]
    kind = section.get("type")
    if kind is not None and str(kind).lower() not in allowed:
        raise refusal("optimizer.type", kind, f"{', '.join(OPTIMIZER_TYPES)} with fp8 enabled")
    for key, value in _section(section, "params", "optimizer.params").items():
        if key not in OPTIMIZER_PARAMS and value:
            raise refusal(f"optimizer.params.{key}", value, ", ".join(OPTIMIZER_PARAMS))
