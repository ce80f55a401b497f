"""What FP8 does in an engine, told to programs, to the log and to DeepSpeed's monitors."""

import math
from collections.abc import Mapping
from typing import Any

from deepspeed import comm as dist

import ds_fp8
from ds_fp8.config.refusals import refusal
from ds_fp8.estimate import memory
from ds_fp8.zero_fp8.handlers.stage12 import FP8ZeROOptimizer
from ds_fp8.zero_fp8.health import Health


def is_active(engine: Any) -> bool:
    """Whether this DeepSpeed engine trains with FP8 states and communication."""
    return isinstance(getattr(engine, "optimizer", None), FP8ZeROOptimizer)


def describe(engine: Any) -> dict[str, Any]:
    """What FP8 does in this engine: formats, bytes a parameter, wire bytes, kernels.

    Raises ValueError for an engine without FP8.
    """
    _require_active(engine)
    handler: FP8ZeROOptimizer = engine.optimizer
    recipe, several = handler.recipe, accumulating(engine)
    ranks = handler.buckets[0].world_size
    held = memory.rank_bytes(recipe, handler.buckets, accumulating=several)
    return {
        "version": ds_fp8.__version__,
        "opt_level": engine._config.ds_fp8.opt_level,
        "zero_stage": handler.settings.stage,
        "world_size": ranks,
        **memory.summary(recipe, ranks=ranks, accumulating=several),
        "rank_bytes_min": min(held),
        "rank_bytes_max": max(held),
        "overlap_comm": handler.settings.overlap,
        "bytes_in_flight": memory.in_flight_bytes(recipe, handler.buckets, overlap=handler.settings.overlap),
        "kernels": handler.backend.name,
    }


def stats(engine: Any) -> dict[str, Any] | None:
    """Health of the last measured step, over all ranks; None before the first.

    "total" and, for each param group, "groups" hold shares of all elements (gradient_underflow,
    gradient_saturated, exp_avg_clamped, exp_avg_underflow, exp_avg_sq_rescued), the count
    gradient_non_finite_blocks and gradient_snr_db. Raises ValueError for an engine without FP8 and where
    fp8.stats.interval is 0.
    """
    _require_active(engine)
    health: Health = engine.optimizer.health
    if not health.interval:
        raise refusal("fp8.stats.interval", 0, "1 or more, to measure every so many steps")
    return health.last


def write_events(engine: Any, measured: Mapping[str, Any]) -> None:
    """Health as events of DeepSpeed's monitors, `Train/FP8/...` over steps."""
    if not engine.monitor.enabled or dist.get_rank() != 0:
        return
    step = measured["step"]
    engine.monitor.write_events(
        [(f"Train/FP8/{name}", value, step) for name, value in by_name(measured).items()]
    )


def by_name(measured: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures of a measured step: in total and, where there are several param groups, of each."""
    places = {"": measured["total"]}
    if len(measured["groups"]) > 1:
        places |= {f"group{index}/": each for index, each in enumerate(measured["groups"])}
    return {
        place + name: value
        for place, figures in places.items()
        for name, value in figures.items()
        if math.isfinite(value)
    }


def _require_active(engine: Any) -> None:
    if not is_active(engine):
        raise ValueError(
            'this engine does not use ds_fp8: its config has no "fp8": {"enabled": true}, or '
            "ds_fp8.register() was not called before it was made"
        )


def banner(engine: Any) -> str:
    """One line of what `describe` says, for the log."""
    facts = describe(engine)
    rounding = ", rounded stochastically" if facts["rounding"] == "stochastic" else ""
    total = facts["state_bytes_per_parameter"] + facts["gradient_bytes_per_parameter"]
    scaled = f"block {facts['block_size']}" if facts["scaling"] == "block" else "a scale a tensor"
    how = f", added in fp8 with {facts['autoscale']} scaling" if facts["autoscale"] else ""
    ranks = "1 rank" if facts["world_size"] == 1 else f"{facts['world_size']} ranks"
    least, most = (facts[f"rank_bytes_{end}"] / 2**20 for end in ("min", "max"))
    hops = f"two hops, {facts['nodes']} nodes of {facts['intra_node_size']}, {facts['between_nodes']} between"
    return (
        f"ds_fp8 {facts['version']}: ON, {facts['opt_level']}, ZeRO {facts['zero_stage']}, "
        f"{ranks} | gradients {facts['gradients']}{how}, "
        f"reduced {facts['reduced_gradient']}, master {facts['master']}{rounding}, "
        f"exp_avg {facts['exp_avg']}, exp_avg_sq {facts['exp_avg_sq']}, {scaled} | "
        f"{total:.2f} bytes a parameter over the ranks, {least:.2f} to {most:.2f} MiB a rank, "
        f"{facts['wire_bytes_per_gradient_element']:.4f} wire bytes a gradient element, "
        f"{hops if facts['nodes'] > 1 else 'one hop'}, {'' if facts['overlap_comm'] else 'not '}overlapped | "
        f"kernels: {facts['kernels']}"
    )


def accumulating(engine: Any) -> bool:
    """Whether several micro-steps reach the reduced gradient before a step."""
    return bool(engine.zero_optimization_stage() == 2 and engine.gradient_accumulation_steps() > 1)
