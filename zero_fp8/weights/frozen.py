"""Matrices that do not train, such as LoRA's base: E4M3 codes on every rank, made once from the weights.

Every rank has the same weights and so makes the same codes; nothing travels, and there are no masters.
Encoding is idempotent: encoding a decoded weight, for example one read from a file, gives the same bits.
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
    """Encode values of the matrix's shape.

    Encode twice: a tile's largest value may be rounded down to one for which the next smaller scale will do.
    The second pass, over the decoded values, finds that scale, as will any reader that encodes them again.
    """
    matrix.store(values)
    matrix.store(matrix.values())


class FrozenWeights:
    """The codes of a run's frozen matrices."""

    def __init__(self) -> None:
        """Start without frozen matrices."""
        self._parameters: list[tuple[Parameter, MatrixHome, Way]] = []
        self._logged = False

    def take_over(self, choice: Choice, names: Mapping[Parameter, str]) -> None:
        """Encode a run's frozen matrices one after the other. names: of every parameter of the model."""
        for index, parameter in enumerate(choice.frozen):
            home = MatrixHome(index, _room(names[parameter], parameter, choice))
            _encode_parameter(parameter, home.matrix, choice.way)
            self._parameters.append((parameter, home, choice.way))

    @property
    def exist(self) -> bool:
        """Whether there are frozen matrices."""
        return bool(self._parameters)

    def matrices(self) -> Iterator[Matrix]:
        return (home.matrix for _, home, _ in self._parameters)

    def bring_home(self) -> str | None:
        """Encode values that replaced weights through .data. If some cannot be encoded, return an objection.

        In that case nothing is done. For steps only: an adapter that is merged for a while is saved as it is.
        """
        self._share()
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

    def _share(self) -> None:
        """Take over the codes of a later engine that has encoded the same base."""
        for place, (parameter, home, way) in enumerate(self._parameters):
            if isinstance(parameter, FP8Parameter) and home.was_left_by(parameter):
                self._parameters[place] = parameter, MatrixHome(home.parameter, parameter.matrix), way

    def as_values(self) -> AbstractContextManager[None]:
        """Do nothing while files are read or written: readers of these parameters get values."""
        return nullcontext()

    def set_writers(self) -> None:
        """Let load_state_dict write."""
        self._share()
        for matrix in self.matrices():
            matrix.writer = partial(encode, matrix)

    def unset_writers(self) -> None:
        """Stop load_state_dict from writing."""
        for matrix in self.matrices():
            matrix.writer = None


def _encode_parameter(parameter: Parameter, matrix: Matrix, way: Way) -> None:
    """Encode the values of a parameter, which from then on reads the codes."""
    encode(matrix, parameter.detach())
    FP8Parameter.take_over(parameter, matrix, way)


def _room(name: str, parameter: Parameter, choice: Choice) -> Matrix:
    """Create a matrix of a parameter's shape; its codes are undefined."""
    rows, columns = parameter.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=parameter.device).view(E4M3.dtype)
    exponents = codes.new_empty(tiles(rows), tiles(columns), dtype=torch.uint8)
    return Matrix(name, codes, exponents, choice.kernels)
