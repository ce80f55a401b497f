"""The state of FP8 in an engine: `is_active`, `describe`, `stats`, the log line, events of monitors."""

import math
from collections.abc import Mapping
from typing import Any

from deepspeed import comm as dist

import ds_fp8
from ds_fp8.config.refusals import refusal
from ds_fp8.estimate import memory
from ds_fp8.estimate.engine_weights import weights_of
from ds_fp8.estimate.fetching import fetching_of, persistent, summary
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer
from ds_fp8.zero_fp8.health import Health
from ds_fp8.zero_fp8.placement.parameters import held_of


def is_active(engine: Any) -> bool:
    """Return whether a DeepSpeed engine trains with FP8 states and communication.

    Args:
        engine: what `deepspeed.initialize` returned; any other object gives False.

    Returns:
        True if the engine's optimizer is the one of ds_fp8.
    """
    return isinstance(getattr(engine, "optimizer", None), FP8ZeROOptimizer)


def describe(engine: Any) -> dict[str, Any]:
    """Describe what FP8 does in an engine.

    Args:
        engine: what `deepspeed.initialize` returned.

    Returns:
        A dict of plain values. Always: `version`, `opt_level`, `zero_stage`, `world_size`,
        `model_parallel_size` (ranks over which the model is split; bytes are then those of this rank's part),
        `sequence_parallel_size`, the formats, `state_bytes_per_parameter` and `gradient_bytes_per_parameter`
        over all ranks, `wire_bytes_per_gradient_element`, the hops, `overlap_comm`, `rank_bytes_min` and
        `rank_bytes_max` of states and reduced gradient, `kernels`; `grad_accum_dtype` is "fp32" if `.grad`
        adds up micro-steps in FP32 under ZeRO 1, else None.
        Under ZeRO 3: `persistent_bytes` of parameters that stay whole on every rank, `fetch_bytes` that a
        rank sends to fetch all others once, `wire_bytes_per_fetched_element`.
        With FP8 weights: `products` ("cublas", "emulated" or "decoded"); `products_instead`, the reason if
        they are not FP8 products; the names `fp8_weights`; `bf16_matrices` with the reason of each;
        `fp8_elements`, `fp8_share`; `weight_bytes` of a rank, and `gather_bytes` that it hands to a step's
        gathers.
        With offload, on this rank: `offload` (the executor), `offload_ratio`, `host_bytes` of states,
        `landing_bytes` of host memory for what crosses if the host sweeps, `pinned_bytes` of both,
        `ring_bytes` of buffers on the device.

    Raises:
        ValueError: the engine does not use FP8.
    """
    _require_active(engine)
    handler: FP8ZeROOptimizer = engine.optimizer
    recipe, several_micro_steps = handler.recipe, accumulating(engine)
    replicas = handler.parts.buckets[0].world_size
    buckets = handler.parts.buckets
    held = memory.rank_bytes(recipe, buckets, accumulating=several_micro_steps)
    return {
        "version": ds_fp8.__version__,
        "opt_level": engine._config.ds_fp8.opt_level,
        "zero_stage": handler.settings.stage,
        "world_size": handler.ranks.size,
        "model_parallel_size": handler.ranks.parts,
        "sequence_parallel_size": handler.settings.sequence_parallel_size,
        "grad_accum_dtype": "fp32" if handler.settings.accumulate_in_fp32 else None,
        **memory.summary(recipe, ranks=replicas, accumulating=several_micro_steps),
        "rank_bytes_min": min(held),
        "rank_bytes_max": max(held),
        "overlap_comm": handler.settings.overlap,
        "bytes_in_flight": memory.in_flight_bytes(recipe, buckets, overlap=handler.settings.overlap),
        **(_fetching(engine) if handler.settings.stage == 3 else {}),
        **weights_of(engine),
        **_offload(handler),
        "kernels": handler.parts.backend.name,
    }


def _offload(handler: FP8ZeROOptimizer) -> dict[str, Any]:
    """How offloaded states are stepped, and what they take on this rank; empty if there are none."""
    away, landing = handler.parts.residence.away, handler.parts.offloaded.landing
    if away is None:
        return {}
    return {
        "offload": away.executor.name,
        "offload_ratio": handler.parts.residence.ratio,
        "host_bytes": away.host_bytes,
        "landing_bytes": away.landing_bytes,
        "pinned_bytes": away.pinned_bytes,
        "ring_bytes": landing.nbytes if landing else away.executor.nbytes,
    }


def _fetching(engine: Any) -> dict[str, Any]:
    """Bytes that ZeRO 3 keeps whole on every rank, and that one fetch of all other parameters sends."""
    keys, handler = fetching_of(engine._config.zero_config), engine.optimizer
    block_size, fleet = handler.recipe.block_size, handler.parts.buckets[0].fleet
    parameters = list(engine.module.parameters())
    sizes = [int(getattr(each, "ds_numel", each.numel())) for each in parameters]
    kept = sent = whole = 0
    for each, numel, stays in zip(parameters, sizes, persistent(sizes, keys), strict=True):
        itemsize = held_of(each).element_size()
        whole += itemsize * numel
        if stays:
            kept += memory.persistent_bytes(itemsize, [numel], fleet)
        else:
            sent += memory.fetch_bytes(itemsize, [numel], block_size, fleet)
    return {**summary(keys, whole / sum(sizes)), "persistent_bytes": kept, "fetch_bytes": sent}


def stats(engine: Any) -> dict[str, Any] | None:
    """Return the health of the last measured step, over all ranks.

    Args:
        engine: what `deepspeed.initialize` returned.

    Returns:
        None before the first measured step. Then a dict: "step"; "total", and the same for each param group
        in the list "groups": the shares of all elements gradient_underflow, gradient_saturated,
        exp_avg_clamped, exp_avg_underflow and exp_avg_sq_rescued, the count gradient_non_finite_blocks, and
        gradient_snr_db. With FP8 weights also "products", by the name of each weight and as their mean
        "total": {x,dy,w}_underflow and {x,dy,w}_saturated, shares of the non-zero elements, and
        {x,dy,w}_amax_spread, in powers of two.

    Raises:
        ValueError: the engine does not use FP8, or fp8.stats.interval is 0.
    """
    _require_active(engine)
    health: Health = engine.optimizer.parts.health
    if not health.interval:
        raise refusal("fp8.stats.interval", 0, "1 or more, the steps from one measurement to the next")
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
    """The finite values of a measured step: in total and, if there are several param groups, of each.

    Of FP8 products only the means: a model has hundreds of matrices.
    """
    prefixed = {"": measured["total"], "products/": measured.get("products", {}).get("total", {})}
    if len(measured["groups"]) > 1:
        prefixed |= {f"group{index}/": shares for index, shares in enumerate(measured["groups"])}
    return {
        prefix + name: value
        for prefix, shares in prefixed.items()
        for name, value in shares.items()
        if math.isfinite(value)
    }


def _require_active(engine: Any) -> None:
    if not is_active(engine):
        raise ValueError(
            'this engine does not use ds_fp8: its config has no "fp8": {"enabled": true}, or '
            "ds_fp8.register() was not called before it was made"
        )


def banner(about: Mapping[str, Any]) -> str:
    """One line for the log, at most 120 characters with the logger's prefix.

    Args:
        about: what `describe` returned; it has everything that the line leaves out.
    """
    ranks = "1 rank" if about["world_size"] == 1 else f"{about['world_size']} ranks"
    if about["model_parallel_size"] > 1:
        ranks += f", model parallel {about['model_parallel_size']}"
    held = about["state_bytes_per_parameter"] + about["gradient_bytes_per_parameter"]
    offload = ", offload" if "offload" in about else ""
    products = f", products {about['products']}" if "products" in about else ""
    return (
        f"ds_fp8 {about['version']}: ON, {about['opt_level']}, ZeRO {about['zero_stage']}, {ranks} | "
        f"{held:.2f} bytes per parameter{offload}{products}, kernels {about['kernels']}"
    )


def idle(engine: Any) -> str:
    """One line for the log, of an engine that has no optimizer."""
    stage = engine.zero_optimization_stage()
    return f"ds_fp8 {ds_fp8.__version__}: IDLE, this engine's config has ZeRO {stage} and no optimizer"


def accumulating(engine: Any) -> bool:
    """Whether several micro-steps reach the reduced gradient before a step."""
    return bool(engine.zero_optimization_stage() >= 2 and engine.gradient_accumulation_steps() > 1)
