"""FP8-LM's automatic scaling: mu of every tensor, moved by how much of the reduced gradient is saturated.

If more than 1e-5 of a tensor's values are at the largest code, its mu halves for the next step, else it grows
by 2^(1/1000), so that it doubles in a thousand (arXiv 2310.18313 section 2.1). It begins with 1. `pre` and
`post` are what the paper compares it with: dividing by the number of ranks before the sum, or after it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_fp8.zero_fp8.comm.collectives import sum_over_ranks

THRESHOLD = 1e-5
GROWTH = 2.0 ** (1 / 1000)


class GradientScales(Protocol):
    """A scaling policy: factors that may change from step to step."""

    def settle(self) -> None:
        """Called after a step that was taken."""

    def stats(self) -> dict[str, float]:
        """Its figures for `ds_fp8.stats`, after a step."""

    def state(self, names: Mapping[int, str]) -> dict[str, float]:
        """By parameter name, for a checkpoint."""

    def restore(self, saved: Mapping[str, float], names: Mapping[int, str]) -> None:
        """Restore what `state` returned."""


class FixedScales:
    """Scales follow from the values alone: nothing moves."""

    def settle(self) -> None:
        pass

    def stats(self) -> dict[str, float]:
        return {}

    def state(self, names: Mapping[int, str]) -> dict[str, float]:
        return {}

    def restore(self, saved: Mapping[str, float], names: Mapping[int, str]) -> None:
        pass


class Saturation(Protocol):
    """A sum that counts its saturated values."""

    @property
    def saturated(self) -> Iterable[tuple[int, Tensor]]:
        """Values of this rank's parameters at the largest code, by global index."""


class Autoscale:
    """mu of all trained tensors, the same on every rank."""

    def __init__(
        self,
        policy: str,
        sizes: Mapping[int, int],
        sums: Sequence[Saturation],
        group: ProcessGroup,
        mean: float,
        device: torch.device,
    ) -> None:
        """policy: dynamic, pre or post; sizes: elements of each parameter, by global index.

        sums: of this rank's buckets; mean: 1 / ranks.
        """
        self._sums = sums
        self._moves = policy == "dynamic"
        self._group = group
        self._places = {index: place for place, index in enumerate(sizes)}
        self._sizes = torch.tensor(list(sizes.values()), dtype=torch.float64, device=device)
        start = mean if policy == "pre" else 1.0
        self._mu = torch.full((len(sizes),), start, dtype=torch.float32, device=device)
        self._saturated = torch.zeros_like(self._sizes)  # of the last step, over all ranks

    def of(self, parameters: Sequence[int]) -> Tensor:
        """mu of some parameters, [parameters] float32."""
        return self._mu[[self._places[index] for index in parameters]]

    def settle(self) -> None:
        """Move mu, after a step that was taken."""
        self._saturated.zero_()
        for total in self._sums:
            for index, count in total.saturated:
                self._saturated[self._places[index]] = count
        sum_over_ranks(self._saturated, self._group)
        if self._moves:
            above = self._saturated / self._sizes > THRESHOLD
            self._mu = torch.where(above, self._mu / 2, self._mu * GROWTH)

    def stats(self) -> dict[str, float]:
        """The share of values at the largest code, and the range of mu."""
        share = self._saturated.sum() / self._sizes.sum()
        low, high = self._mu.aminmax()
        return {"reduced_saturated": float(share), "autoscale_min": float(low), "autoscale_max": float(high)}

    def state(self, names: Mapping[int, str]) -> dict[str, float]:
        """mu by parameter name, for a checkpoint."""
        values = self._mu.tolist()
        return {names[index]: values[place] for index, place in self._places.items()}

    def restore(self, saved: Mapping[str, float], names: Mapping[int, str]) -> None:
        """Go on from a checkpoint; a parameter that it lacks, and pre and post, keep theirs."""
        if self._moves:
            for index, place in self._places.items():
                self._mu[place] = saved.get(names[index], float(self._mu[place]))
