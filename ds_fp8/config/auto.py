"""Values that are "auto": the Hugging Face Trainer and accelerate fill them in, except in the fp8 section."""

from collections.abc import Mapping
from typing import Any

from ds_fp8.config.refusals import cut
from ds_fp8.config.section import SECTION

AUTO = "auto"


def without_auto(config: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """The config without the keys that are "auto", and their paths."""
    known: dict[str, Any] = {}
    filled_in: list[str] = []
    for key, value in config.items():
        if value == AUTO and f"{prefix}{key}" != SECTION:
            filled_in.append(cut(f"{prefix}{key}"))
        elif isinstance(value, Mapping) and f"{prefix}{key}" != SECTION:
            known[key], inner = without_auto(value, f"{prefix}{key}.")
            filled_in += inner
        else:
            known[key] = value
    return known, filled_in
