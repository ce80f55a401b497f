"""Which engine a parameter belongs to: the last one created for it.

An engine that loses a parameter stops training; it releases all of its parameters before the next engine
changes anything.

An FP8 weight outlives its engine as codes, with masters beside them: each rank's part, rounded to BF16, which
only a collective can put together. The next engine does that when it is made.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.zero_fp8.comm.collectives import sum_over_ranks
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter

HOLDER = "ds_fp8_holder"  # attribute of a parameter: the holder that has claimed it
LEFT = "ds_fp8_left"  # attribute of an FP8 weight: what its engine has left beside its codes, of the type
Left = list[tuple[slice, Tensor]]  # the elements that this rank owned, and their masters in bfloat16


class Holder(Protocol):
    """An engine's handler."""

    def give_up(self) -> None:
        """Release all parameters, because another engine claims one of them."""

    def leave_masters(self) -> None:
        """Give FP8 weights what `make_plain` takes."""


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


def make_plain(parameters: Iterable[Parameter], group: ProcessGroup) -> None:
    """Give values of their own to FP8 weights of an engine before. Collective if there are any.

    These are its masters, rounded to BF16, as another level would have left them; of weights without masters,
    such as a frozen base, the values of codes.
    """
    coded = [each for each in parameters if isinstance(each, FP8Parameter)]
    if not coded:
        return
    holders = [getattr(each, HOLDER, None) for each in coded]
    for holder in dict.fromkeys(each for each in holders if each is not None):
        holder.leave_masters()
    left: list[Left] = [each.__dict__.pop(LEFT, []) for each in coded]
    owned = [sum(values.numel() for _, values in each) for each in left]
    elements = torch.tensor(owned, device=coded[0].device)
    sum_over_ranks(elements, group)
    for parameter, own, there in zip(coded, left, elements.tolist(), strict=True):
        if there != parameter.numel():
            FP8Parameter.give_back(parameter)
            continue
        FP8Parameter.take_off(parameter, put_together(parameter.shape, own, parameter.device, group))
        own.clear()


def put_together(shape: torch.Size, own: Left, device: torch.device, group: ProcessGroup) -> Tensor:
    """Return a weight of which each rank has a part, bfloat16. Collective."""
    whole = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    for place, values in own:
        whole.view(-1)[place] = values
    sum_over_ranks(whole.view(torch.uint8), group)  # each byte is on one rank, the others have zeros
    return whole
