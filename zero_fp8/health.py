"""Health of a run: errors of rounding in gradients and states, on measured steps.

The ops count while the values are at hand (`ops.health`), a param group at a time; one all-reduce then adds
the counts over the ranks. Other steps launch nothing for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.health import GRADIENT_COUNTS, STATE_COUNTS, GradientCounts, StateCounts
from ds_fp8.zero_fp8.comm.collectives import sum_over_ranks
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.product_health import ProductHealth

Listener = Callable[[Mapping[str, Any]], None]


class Counts:
    """Counts of one param group since the last step, on this rank.

    Without a device nothing is counted or allocated.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.measuring = False
        size = GRADIENT_COUNTS + STATE_COUNTS if device is not None else 0
        counts = torch.zeros(size, dtype=torch.float64, device=device)
        self._gradient, self._state = counts[:GRADIENT_COUNTS], counts[GRADIENT_COUNTS:]
        self._elements = [0, 0]  # of gradients that were quantised, and of states that were swept

    def of_gradient(self, numel: int) -> Tensor | None:
        """Count `numel` quantised elements; the kernel's counter vector, None on an unmeasured step."""
        self._elements[0] += numel
        return self._gradient if self.measuring else None

    def of_state(self, numel: int) -> Tensor | None:
        """Count `numel` swept elements; the kernel's counter vector, None on an unmeasured step."""
        self._elements[1] += numel
        return self._state if self.measuring else None

    def forget(self) -> None:
        """Reset: the gradients that were counted have been dropped."""
        self._elements[0] = 0
        if self.measuring:
            self._gradient.zero_()
        self.forget_sweep()

    def forget_sweep(self) -> None:
        self._elements[1] = 0
        if self.measuring:
            self._state.zero_()

    @property
    def row(self) -> Tensor:
        """All of them as one vector: of gradients, of states, elements of either."""
        elements = torch.tensor(self._elements, dtype=torch.float64, device=self._state.device)
        return torch.cat([self._gradient, self._state, elements])


class Health:
    """Counts of all param groups, and the figures made of them."""

    def __init__(
        self,
        interval: int,
        groups: int,
        device: torch.device,
        *,
        stores_sqrt: bool,
        products: ProductHealth,
    ) -> None:
        """interval: steps from one that is measured to the next; 0: none is. stores_sqrt: as `AdamState`."""
        self.interval = interval
        self._zeros = "exp_avg_sq_rescued" if stores_sqrt else "exp_avg_sq_underflow"
        self.counts = [Counts(device if interval else None) for _ in range(groups)]
        self._products = products
        self.last: dict[str, Any] | None = None  # of the last measured step
        self.listeners: list[Listener] = []

    def follow(self, groups: Sequence[int], counted: Sequence[bool]) -> None:
        """Count buckets of these param groups, but for those that a model-parallel peer counts."""
        pairs = zip(groups, counted, strict=True)
        self.by_bucket = [self.counts[group] if mine else Counts() for group, mine in pairs]

    def prepare(self, step: int) -> None:
        """Measure the coming step, counted from 1, or not."""
        measuring = self.interval > 0 and step % self.interval == 0
        for each in self.counts:
            each.measuring = measuring
        self._products.measure(measuring)

    def forget(self) -> None:
        """Reset: the counted gradients have been dropped."""
        for each in self.counts:
            each.forget()
        self._products.forget()

    def begin_sweep(self) -> None:
        """The sweeps of a step begin, maybe again."""
        for each in self.counts:
            each.forget_sweep()
        self._products.forget_weights()

    def collect(
        self, step: int, *, stepped: bool, ranks: Ranks, more: Callable[[], dict[str, float]]
    ) -> None:
        """Add up a measured step over the ranks and call the listeners.

        stepped: whether the step was taken. more: further figures of a step that was taken.
        """
        if not self.counts[0].measuring:
            return
        rows = torch.stack([each.row for each in self.counts])
        sum_over_ranks(rows, ranks)
        products = self._products.collect(ranks.group, stepped=stepped)
        groups = rows.tolist()
        total = [sum(column) for column in zip(*groups, strict=True)]
        self.last = {
            "step": step,
            "taken": stepped,
            "total": self._shares(total, stepped=stepped) | (more() if stepped else {}),
            "groups": [self._shares(each, stepped=stepped) for each in groups],
            **({"products": products} if products else {}),
        }
        for listener in self.listeners:
            listener(self.last)

    def _shares(self, row: Sequence[float], *, stepped: bool) -> dict[str, float]:
        """Shares of all elements, decibels, and a count of blocks; of the states where a step was taken."""
        gradient = GradientCounts(*row[:GRADIENT_COUNTS])
        state = StateCounts(*row[GRADIENT_COUNTS : GRADIENT_COUNTS + STATE_COUNTS])
        quantised, swept = (max(each, 1.0) for each in row[-2:])
        shares = {
            "gradient_underflow": gradient.underflows / quantised,
            "gradient_saturated": gradient.saturated / quantised,
            "gradient_non_finite_blocks": gradient.not_finite,
            "gradient_snr_db": _decibels(gradient.signal, gradient.noise),
        }
        if stepped:
            shares |= {
                "exp_avg_clamped": state.clamped / swept,
                "exp_avg_underflow": state.underflows / swept,
                self._zeros: state.zeros / swept,
            }
        return shares


def _decibels(signal: float, noise: float) -> float:
    if signal == 0 or noise == 0:
        return math.nan if signal == 0 else math.inf
    return 10 * math.log10(signal / noise)
