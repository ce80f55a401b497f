"""Matrices that do not train, as LoRA's base: E4M3 codes on every rank, made once of the weights as they are.

Every rank has the same weights and so makes the same codes; nothing travels, and there are no masters. Codes
are a function of the values that they have: whoever encodes a decoded weight, as from a file, finds the same
bits.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.config.refusals import naming
from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.products import tiles
from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.ways import Way
from ds_fp8.zero_fp8.weights.home import MatrixHome

logger = logging.getLogger("ds_fp8")


def encode(matrix: Matrix, values: Tensor) -> None:
    """Make codes of values of the matrix's shape.

    Twice: a tile's largest value may be rounded down to one for which the next smaller scale is enough. Of
    the values that codes have, the second time finds that scale, as everybody will who reads them.
    """
    matrix.store(values)
    matrix.store(matrix.values())


class FrozenWeights:
    """The codes of a run's frozen matrices."""

    def __init__(self) -> None:
        """Of a run that has none yet."""
        self._parameters: list[tuple[Parameter, MatrixHome, Way]] = []
        self._logged = False

    def take_over(self, choice: Choice, names: Mapping[Parameter, str]) -> None:
        """Encode those of a run, one after the other. names: of every parameter of the model."""
        for index, parameter in enumerate(choice.frozen):
            home = MatrixHome(index, _room(names[parameter], parameter, choice))
            _encode_parameter(parameter, home.matrix, choice.way)
            self._parameters.append((parameter, home, choice.way))

    @property
    def exist(self) -> bool:
        """Whether there are some."""
        return bool(self._parameters)

    def matrices(self) -> Iterator[Matrix]:
        return (home.matrix for _, home, _ in self._parameters)

    def bring_home(self) -> str | None:
        """Encode what has replaced weights through .data. An objection, and nothing is done, if some cannot.

        For steps only: a merged adapter, which is there for a while, is saved as it is.
        """
        left = [each for each in self._parameters if each[1].was_left_by(each[0])]
        for parameter, home, _ in left:
            objection = home.objection(parameter)
            if objection:
                return f"{home.matrix.name}: {objection}"
        for parameter, home, way in left:
            _encode_parameter(parameter, home.matrix, way)
        if left and not self._logged:
            self._logged = True
            named = naming([home.matrix.name for _, home, _ in left])
            logger.warning("frozen weights replaced through .data are rounded to FP8 again: %s", named)
        return None

    def as_values(self) -> AbstractContextManager[None]:
        """While files are read or written: nothing, whoever reads has values."""
        return nullcontext()

    def set_writers(self) -> None:
        """Let load_state_dict write."""
        for matrix in self.matrices():
            matrix.writer = partial(encode, matrix)

    def unset_writers(self) -> None:
        """Nobody writes any more."""
        for matrix in self.matrices():
            matrix.writer = None


def _encode_parameter(parameter: Parameter, matrix: Matrix, way: Way) -> None:
    """Make codes of the values that a parameter has, which it then reads."""
    encode(matrix, parameter.detach())
    FP8Parameter.take_over(parameter, matrix, way)


def _room(name: str, parameter: Parameter, choice: Choice) -> Matrix:
    """A matrix of a parameter's shape, whose codes are not known yet."""
    rows, columns = parameter.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=parameter.device).view(E4M3.dtype)
    exponents = codes.new_empty(tiles(rows), tiles(columns), dtype=torch.uint8)
    return Matrix.of(name, codes, exponents, choice.kernels)
