"""Checks of "offload_optimizer" and of the section's own "offload"."""

from collections.abc import Mapping
from typing import Any

from ds_fp8.config.refusals import refusal
from ds_fp8.config.rule_kinds import Honoured, NoEffect, Refused
from ds_fp8.config.section import SECTION, FP8Config

PATH = "zero_optimization.offload_optimizer"
DEVICES = ("none", "cpu")
NO_FILE = NoEffect("states are not written to files", (None,))
ALWAYS = NoEffect("states always travel while others are swept", (False,))

OFFLOAD: Mapping[str, Honoured | NoEffect | Refused] = {
    "device": Honoured(),
    "pin_memory": Honoured(),
    "nvme_path": NO_FILE,
    "buffer_count": NoEffect("three chunks of states are on the device at a time"),
    "pipeline_read": ALWAYS,
    "pipeline_write": ALWAYS,
    "fast_init": NoEffect("states are made where they live", (False,)),
    "ratio": Refused("is replaced by fp8.offload.ratio, at every stage", (1.0,)),
    "super_offload": Refused("does not work with fp8 enabled", (False,)),
    "cpuadam_cores_perc": NoEffect("a key of super_offload"),
}


def section_of(zero: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section "offload_optimizer" if it asks for something. Raises ValueError for an unknown device."""
    if zero.get("cpu_offload") is True and zero.get("offload_optimizer") is None:
        return {"device": "cpu"}  # of old configs, which DeepSpeed reads so
    section = zero.get("offload_optimizer")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise refusal(PATH, section, "an object")
    device = section.get("device", "none")
    if device == "nvme":
        allowed = '"cpu", "none" (nvme is not built yet with fp8 enabled)'
        raise refusal(f"{PATH}.device", device, allowed)
    if device not in DEVICES:
        raise refusal(f"{PATH}.device", device, '"cpu", "none"')
    return None if device == "none" else section


def check_offload(fp8: FP8Config, *, offloaded: bool) -> None:
    """Raise ValueError for keys that contradict offload or its absence. offloaded: whether states are."""
    given = fp8.offload
    if not offloaded:
        for key in sorted(given.model_fields_set):
            value, default = getattr(given, key), type(given).model_fields[key].default
            if value != default:
                allowed = f'the key left out, or {PATH} {{"device": "cpu"}} beside it'
                raise refusal(f"{SECTION}.offload.{key}", value, allowed)
        return
    if fp8.scaling != "block":
        allowed = f'"block" with {PATH}: a scale per tensor takes two sweeps over it'
        raise refusal(f"{SECTION}.scaling", fp8.scaling, allowed)
    if given.executor == "host" and given.ratio < 1:
        allowed = f'1.0 with {SECTION}.offload.executor "host"'
        raise refusal(f"{SECTION}.offload.ratio", given.ratio, allowed)
    if given.executor == "stream" and given.threads is not None:
        allowed = f'the key left out with {SECTION}.offload.executor "stream", which sweeps on the device'
        raise refusal(f"{SECTION}.offload.threads", given.threads, allowed)
