"""A parameter's place in a buffer, and whether the parameter is still there."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.placement.partition import Piece
from ds_fp8.zero_fp8.plain_tensors import ALLOWED, flaw_of
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.matrix import Matrix


def elements_of(piece: Piece, rows: Tensor) -> Tensor:
    """Return a piece's elements of its owner's rows of the bucket, [blocks, block size], as a vector."""
    return rows[piece.rows].view(-1)[: piece.numel]


class Home(Protocol):
    """The memory where the weights of a parameter belong."""

    @property
    def parameter(self) -> int:
        """Global index."""

    @property
    def address(self) -> int:
        """Address of the home's memory."""

    def objection(self, parameter: Parameter) -> str | None:
        """Return an objection to the parameter's current values if they cannot be copied home."""

    def address_of(self, parameter: Parameter) -> int:
        """Address of the memory that holds the parameter's current values."""


@dataclass(frozen=True)
class WholeHome:
    """A parameter's place in the buffer that it is a view of."""

    parameter: int  # global index
    view: Tensor  # of the parameter's shape

    @cached_property
    def address(self) -> int:
        return self.view.data_ptr()

    def address_of(self, parameter: Parameter) -> int:
        return parameter.data_ptr()

    def was_left_by(self, parameter: Parameter) -> bool:
        """Whether the parameter's values lie elsewhere, or in another order or sign."""
        return (
            parameter.data_ptr() != self.address or not parameter.is_contiguous() or bool(parameter.is_neg())
        )

    def objection(self, parameter: Parameter) -> str | None:
        """Return an objection to the parameter's current values if they cannot be copied home."""
        other = _another_kind(parameter, self.view, self.view.dtype)
        if other is not None:
            return other
        flaw = flaw_of(parameter.detach().resolve_neg()) if self.was_left_by(parameter) else None
        return None if flaw is None else f"received {flaw} as .data, {ALLOWED}"

    def take_in(self, parameter: Parameter) -> None:
        """Copy a parameter's values into the view, which becomes the parameter's memory."""
        self.view.copy_(parameter.detach().contiguous())
        parameter.data = self.view


@dataclass(frozen=True)
class MatrixHome:
    """A parameter whose values are those of a matrix."""

    parameter: int  # global index; of a frozen parameter its index among the frozen
    matrix: Matrix

    @property
    def address(self) -> int:
        return self.matrix.codes.data_ptr()

    def address_of(self, parameter: Parameter) -> int:
        return parameter.data_ptr() if self.was_left_by(parameter) else self.address

    def was_left_by(self, parameter: Parameter) -> bool:
        """Whether the parameter has its own values instead of the matrix's."""
        return not isinstance(parameter, FP8Parameter) or parameter.matrix is not self.matrix

    def objection(self, parameter: Parameter) -> str | None:
        """Return an objection to the parameter's current values if they cannot be encoded."""
        if not self.was_left_by(parameter):
            return None
        return _another_kind(parameter, self.matrix.codes, torch.bfloat16)


def _another_kind(parameter: Parameter, home: Tensor, dtype: torch.dtype) -> str | None:
    """Return an objection if a parameter's shape, dtype or device has changed."""
    if (parameter.shape, parameter.dtype, parameter.device) == (home.shape, dtype, home.device):
        return None
    allowed = described(home, dtype)
    return f"received {described(parameter)} after deepspeed.initialize, allowed: {allowed}"


def described(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """Describe a tensor, as if it had another dtype if one is given."""
    return f"{list(tensor.shape)} of {dtype or tensor.dtype} on {tensor.device}"
