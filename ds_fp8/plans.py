"""What a ds_config asks for, read from its file without an engine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_fp8 import ds_config
from ds_fp8.config import SECTION, FP8Config, parse
from ds_fp8.estimates import BUCKET_ELEMENTS, Run
from ds_fp8.refusals import refusal
from ds_fp8.zero_fp8.recipe import Recipe, check_nodes, recipe_of

FASTER_FROM = 16_000_000  # elements of a bucket, on one node with NVLink; docs/communication.md
AUTO = "auto"  # a value that the Hugging Face Trainer and accelerate fill in


@dataclass(frozen=True)
class Plan:
    """An accepted ds_config with FP8 enabled, for so many GPUs."""

    fp8: FP8Config
    run: Run
    recipe: Recipe
    weights: str | None  # bf16, fp16; None: as the model has them
    idle: tuple[str, ...]  # keys without effect
    filled_in: tuple[str, ...]  # keys that are "auto"


def read(path: Path) -> dict[str, Any]:
    """A ds_config. Raises ValueError, OSError."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: received {json.dumps(loaded)[:40]}, allowed: an object")
    return loaded


def plan(config: Mapping[str, Any], *, gpus: int, micro_steps: int | None = None) -> Plan | None:
    """What ds_fp8 would do; None where FP8 is off. Raises ValueError with the refusal.

    micro_steps: instead of the config's. Keys that are "auto" count as left out, but in the section they are
    refused. What only the model or a client's optimizer shows is not looked at.
    """
    fp8 = parse(config)
    if fp8 is None or not fp8.enabled:
        return None
    known, filled_in = without_auto(config)
    idle = ds_config.check(known)
    zero = known.get("zero_optimization", {})
    run = Run(
        gpus=gpus,
        stage=zero["stage"],
        micro_steps=micro_steps or _micro_steps(known, gpus),
        bucket_elements=_count(zero, "reduce_bucket_size", BUCKET_ELEMENTS, "zero_optimization."),
        overlap=bool(zero.get("overlap_comm")),
    )
    recipe = recipe_of(fp8, accumulating=run.accumulating, ranks=gpus)
    check_nodes(recipe.intra_node_size, gpus)
    return Plan(fp8, run, recipe, _weights(config, recipe), tuple(idle), tuple(filled_in))


def advice(plan: Plan) -> list[str]:
    """What would make the exchange faster, as measured."""
    alone, size = plan.run.gpus == 1, plan.run.bucket_elements
    if alone or not plan.recipe.wire.scaled or plan.recipe.two_hops(plan.run.gpus) or size >= FASTER_FROM:
        return []
    return [
        f"with buckets of {size:,} elements stock DeepSpeed's BF16 all-reduce may be faster where all GPUs "
        f"share NVLink: set reduce_bucket_size to {FASTER_FROM:,} or more"
    ]


def without_auto(config: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """The config without the keys that are "auto", and their paths."""
    known: dict[str, Any] = {}
    filled_in: list[str] = []
    for key, value in config.items():
        if value == AUTO:
            filled_in.append(prefix + key)
        elif isinstance(value, Mapping) and prefix + key != SECTION:
            known[key], inner = without_auto(value, f"{prefix}{key}.")
            filled_in += inner
        else:
            known[key] = value
    return known, filled_in


def _micro_steps(config: Mapping[str, Any], gpus: int) -> int:
    """As DeepSpeed infers them where the config gives the batch sizes only."""
    if "gradient_accumulation_steps" in config:
        return _count(config, "gradient_accumulation_steps", 1)
    whole = _count(config, "train_batch_size", 1)
    micro = _count(config, "train_micro_batch_size_per_gpu", 1)
    if "train_batch_size" not in config or "train_micro_batch_size_per_gpu" not in config:
        return 1
    if whole % (micro * gpus):
        raise refusal("train_batch_size", whole, f"multiples of {micro} a micro-step on {gpus} GPUs")
    return whole // (micro * gpus)


def _count(section: Mapping[str, Any], key: str, left_out: int, prefix: str = "") -> int:
    value = section.get(key, left_out)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1 != 0:
        raise refusal(prefix + key, value, "an integer, 1 or more")
    return int(value)


def _weights(config: Mapping[str, Any], recipe: Recipe) -> str | None:
    """The dtype that DeepSpeed gives the model; of two that are "auto" the first."""
    names = ("bf16", "bfloat16", "fp16")
    on = [name for name in names if (config.get(name) or {}).get("enabled") in (True, AUTO)]
    if on == ["fp16"] and recipe.master.split:
        allowed = f"false: beside a master {recipe.master.name} weights are BF16"
        raise refusal("fp16.enabled", True, allowed)
    return on[0].replace("bfloat16", "bf16") if on else None
