"""Synthetic gradients of four kinds, for Adam to follow.

A tensor has rows of 1,024 elements, and one element in twenty never gets a gradient. A gradient is scale *
(mu + noise): mu = 0.3 * normal is fixed per element, noise is drawn anew at each step, and scale is 1e-4 *
exp(rows * normal of the row) * exp(elements * normal of the element).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 1024


@dataclass(frozen=True)
class Regime:
    """The spread of gradients over elements and rows, and the number of steps that Adam follows them."""

    elements: float
    rows: float
    beta2: float
    steps: int


REGIMES = {
    "mild": Regime(elements=0.5, rows=0.5, beta2=0.95, steps=100),
    "stress": Regime(elements=1.0, rows=1.5, beta2=0.95, steps=200),
    "slow": Regime(elements=1.0, rows=1.5, beta2=0.999, steps=400),
    "extreme": Regime(elements=2.0, rows=2.0, beta2=0.95, steps=200),
}


def gradients(regime: Regime, rows: int, seed: int) -> Iterator[Tensor]:
    """Yield one gradient per step, [rows, 1024]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    scale = 1e-4 * (regime.rows * normal(1)).exp() * (regime.elements * normal(COLUMNS)).exp()
    mu = 0.3 * normal(COLUMNS)
    scale *= torch.rand(rows, COLUMNS, generator=generator) >= 0.05
    for _ in range(regime.steps):
        yield scale * (mu + normal(COLUMNS))
