"""The "fp8" section out of a ds_config, and the combinations of its values that do not work."""

import re
from collections.abc import Mapping
from typing import Any

from ds_fp8.config.refusals import refusal, show, validate
from ds_fp8.config.section import LEVELS, ROUNDED, SECTION, WHOLE, FP8Config, GradientsSection


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
        allowed = f'"nearest" with the master {config.states.master}, which is never rounded; '
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
    """Refuse what does not work with one scale per tensor."""
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
    """Refuse keys that have no effect if no weight is FP8."""
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
    """Refuse what does not work with FP8 weights, which are made from masters, tile by tile."""
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
