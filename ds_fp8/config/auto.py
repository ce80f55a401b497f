"""Values that are "auto": the Hugging Face Trainer and accelerate fill them in, except in the fp8 section.

accelerate does so after it has made a model of ZeRO 3, so in DeepSpeed's zero.Init they count as left out.
"""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from ds_fp8.config.refusals import cut
from ds_fp8.config.section import SECTION

AUTO = "auto"
_in_zero_init = ContextVar("in_zero_init", default=False)


def zero_init(original: Callable[..., None]) -> Callable[..., None]:
    """Init.__init__: mark what reads a config inside."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _in_zero_init.set(True)
        try:
            original(self, *args, **kwargs)
        finally:
            _in_zero_init.reset(token)

    return method


def known_now(config: dict[str, Any]) -> dict[str, Any]:
    """The config, in zero.Init without the keys that are "auto"."""
    return without_auto(config)[0] if _in_zero_init.get() else config


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
