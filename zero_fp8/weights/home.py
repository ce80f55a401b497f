"""A parameter's place in a buffer, and whether the parameter is still there."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Home:
    """A parameter's place in a buffer."""

    parameter: int  # global index
    view: Tensor  # of the parameter's shape

    @cached_property
    def address(self) -> int:
        return self.view.data_ptr()

    def was_left_by(self, parameter: Parameter) -> bool:
        """Whether the parameter's values lie elsewhere, or in another order or sign."""
        return (
            parameter.data_ptr() != self.address or not parameter.is_contiguous() or bool(parameter.is_neg())
        )

    def has_room_for(self, values: Tensor) -> bool:
        """Whether values are of this shape, dtype and device."""
        view = self.view
        return values.dtype is view.dtype and values.shape == view.shape and values.device == view.device

    def take_in(self, parameter: Parameter) -> None:
        """Copy a parameter's values into the view, and make it the parameter's memory."""
        self.view.copy_(parameter.detach().contiguous())
        parameter.data = self.view

    def __str__(self) -> str:
        return f"{list(self.view.shape)} of {self.view.dtype} on {self.view.device}"
