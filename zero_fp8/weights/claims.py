"""Which engine a parameter belongs to: the last one created for it.

An engine that loses a parameter stops training; it releases all of its parameters before the next engine
changes anything.
"""

from collections.abc import Iterable
from typing import Protocol

from torch.nn import Parameter

from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter

HOLDER = "ds_fp8_holder"  # attribute of a parameter: the holder that has claimed it


class Holder(Protocol):
    """An engine's handler."""

    def give_up(self) -> None:
        """Release all parameters, because another engine claims one of them."""


def claim(parameters: Iterable[Parameter], holder: Holder) -> None:
    """Take parameters over from the engines that hold them."""
    for each in parameters:
        earlier = getattr(each, HOLDER, None)
        if earlier is not None:
            earlier.give_up()
        setattr(each, HOLDER, holder)


def release(parameters: Iterable[Parameter]) -> None:
    """Remove the holder of each parameter."""
    for each in parameters:
        each.__dict__.pop(HOLDER, None)


def make_plain(parameters: Iterable[Parameter]) -> None:
    """Give values of their own to parameters that read the codes of an engine before."""
    for each in parameters:
        if isinstance(each, FP8Parameter):
            FP8Parameter.give_back(each)
