"""Figures of two kinds of runs, paired by seed: their differences, the mean and its standard error."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Figures of two configurations by seed; `spread` is the standard deviation of the baseline's."""

    differences: dict[int, float]
    spread: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences.values())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN with one seed."""
        if len(self.differences) < 2:
            return math.nan
        return statistics.stdev(self.differences.values()) / math.sqrt(len(self.differences))

    @property
    def at_most(self) -> float:
        """|mean| + 2 standard errors."""
        return abs(self.mean) + 2 * self.standard_error


def paired(ours: Mapping[int, float], stock: Mapping[int, float]) -> Paired:
    """Pair figures by the seeds that both have; at least one.

    Raises:
        ValueError: they have no seed in common.
    """
    seeds = sorted(ours.keys() & stock.keys())
    if not seeds:
        raise ValueError(f"received seeds {sorted(ours)} and {sorted(stock)}, allowed: at least one of both")
    spread = statistics.stdev(stock[seed] for seed in seeds) if len(seeds) > 1 else math.nan
    return Paired({seed: ours[seed] - stock[seed] for seed in seeds}, spread)
