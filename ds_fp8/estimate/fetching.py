"""What ZeRO 3 keeps whole and what it fetches at a time, by DeepSpeed's rules, which count elements."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Fetching:
    """The keys of ZeRO 3 that decide bytes, with DeepSpeed's defaults."""

    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = sys.maxsize
    max_live_parameters: int = 10**9
    prefetch_bucket_size: int = 50_000_000
    sub_group_size: int = 10**9  # of stock DeepSpeed's step


def fetching_of(zero_config: Any) -> Fetching:
    """The keys as DeepSpeed has read them."""
    return Fetching(**{each.name: int(getattr(zero_config, each.name)) for each in fields(Fetching)})


def summary(keys: Fetching, itemsize: float | None) -> dict[str, Any]:
    """Entries of ZeRO 3 beside those of `memory.summary`. itemsize: of the weights, None if not known."""
    return {
        "wire_bytes_per_fetched_element": itemsize,
        "param_persistence_threshold": keys.param_persistence_threshold,
    }


def persistent(sizes: Sequence[int], fetching: Fetching) -> list[bool]:
    """Which parameters stay whole between steps: the small ones, in the model's order, up to a sum."""
    kept, total = [], 0
    for numel in sizes:
        fits = numel + total <= fetching.model_persistence_threshold
        kept.append(fits and numel <= fetching.param_persistence_threshold)
        total += numel * kept[-1]
    return kept


def whole(
    sizes: Sequence[int],
    kept: Sequence[int],
    gathered: Sequence[int],
    fetching: Fetching,
    itemsizes: Sequence[int],
) -> tuple[int, int]:
    """Bytes that are whole between steps, and the most that a step fetches beside them.

    kept, gathered: elements of each parameter if it is persistent, and if it is fetched. DeepSpeed counts
    elements; at most, what is fetched at a time are those of most bytes.
    """
    stays = persistent(sizes, fetching)
    always = sum(itemsize * each for each, itemsize, one in zip(kept, itemsizes, stays, strict=True) if one)
    fetched, left = 0, fetching.max_live_parameters + fetching.prefetch_bucket_size
    for wide in sorted(set(itemsizes), reverse=True):
        others = zip(gathered, itemsizes, stays, strict=True)
        elements = min(left, sum(each for each, itemsize, one in others if itemsize == wide and not one))
        fetched, left = fetched + wide * elements, left - elements
    return always, fetched
