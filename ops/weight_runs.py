"""The weights of a bucket's matrices at once, each as `ops.products` finds and encodes it.

The matrices have their exponents in one vector; a rank has runs of their elements, in one vector of values
and one of codes. None of these places changes between steps, so that a GPU needs one launch for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Functions(Protocol):
    """Those of `ops.products` that a weight needs, by one implementation."""

    @property
    def find_exponents(self) -> Callable[[Tensor, int, int, Tensor], None]: ...

    @property
    def encode_weight(self) -> Callable[..., None]: ...


@dataclass(frozen=True)
class Grid:
    """The tiles of one matrix."""

    columns: int  # of the matrix
    shape: tuple[int, int]  # in tiles
    place: slice  # of its exponents

    def of(self, exponents: Tensor) -> Tensor:
        """Return its exponents, [tiles(rows), tiles(columns)], out of those of all matrices."""
        return exponents[self.place].view(self.shape)


@dataclass(frozen=True)
class Run:
    """Consecutive elements of one matrix."""

    grid: Grid
    first: int  # place in the matrix
    count: int
    values: int  # place among the values
    codes: int  # place among the codes


class WeightRuns:
    """All runs, one by one. No two runs of a matrix reach the same tile."""

    def __init__(self, functions: Functions, runs: Sequence[Run]) -> None:
        self._functions, self._runs = functions, runs

    def find_exponents(self, values: Tensor, exponents: Tensor) -> None:
        """Raise all exponents to what the values need.

        values: [elements] bfloat16. exponents: [tiles] uint8, 0 where nothing is known.
        """
        for run in self._runs:
            own = values[run.values :][: run.count]
            self._functions.find_exponents(own, run.first, run.grid.columns, run.grid.of(exponents))

    def encode(self, values: Tensor, exponents: Tensor, codes: Tensor, control: Tensor | None = None) -> None:
        """Round all values to codes, [elements] float8_e4m3fn.

        control: as in `ops.products.encode_weight`.
        """
        for run in self._runs:
            own, made = values[run.values :][: run.count], codes[run.codes :][: run.count]
            tiles = run.grid.columns, run.grid.of(exponents)
            self._functions.encode_weight(own, run.first, *tiles, made, control)
