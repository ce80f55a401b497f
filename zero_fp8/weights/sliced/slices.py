"""Weights under ZeRO 3: this rank's slice of every parameter of a bucket, in one buffer.

DeepSpeed keeps a parameter's slice in `ds_tensor` and cuts wherever the parameter's size divided by the
number of ranks falls. Here a slice is a whole number of blocks: `aligned` replaces the method in which
DeepSpeed rounds, for parameters that carry our attribute; for all others it changes nothing. Slices stay
equal, consecutive and in order, so that a gather yields the whole parameter. The sweep writes the slices, and
the next fetch of a parameter brings its new values.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.compat import ZeroParamStatus
from ds_fp8.zero_fp8.comm.collectives import NothingToGather
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.parameters import part_of, shape_of
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece, padding_of_slices
from ds_fp8.zero_fp8.weights.home import described, elements_of

BLOCK_SIZE = "ds_fp8_block_size"  # attribute of a parameter whose slices are whole blocks
CODES = "ds_fp8_codes"  # attribute of a parameter whose slices are codes: its `codes.SlicedMatrix`
FETCHED = "ds_fp8_fetched"  # attribute: address of the values that the last fetch brought
EDITED = "ds_fp8_edited"  # attribute: whether slices were written within GatheredParameters, unseen by `bind`


def aligned(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap Init._padding_size: the number of elements by which a parameter's slices exceed it."""

    @functools.wraps(original)
    def method(self: Any, parameter: Any) -> int:
        block_size = getattr(parameter, BLOCK_SIZE, None)
        if block_size is None:
            return original(self, parameter)
        return padding_of_slices(parameter.ds_numel, block_size, self._partition_world_size(parameter))

    return method


def cut(parameter: Any, block_size: int) -> None:
    """Cut a parameter anew, between blocks; padding after its end is zero. Collective."""
    if not parameter.ds_numel:
        return
    parameter.all_gather(param_list=[parameter])
    parameter.__dict__.pop(CODES, None)  # set by an earlier engine; the parameter has values now
    setattr(parameter, BLOCK_SIZE, block_size)
    parameter.ds_tensor = None
    parameter.partition(has_been_updated=True)
    held = parameter.ds_numel - parameter.ds_zero_partition_rank * parameter.ds_tensor.numel()
    parameter.ds_tensor[max(0, held) :].zero_()


@dataclass(frozen=True)
class SliceHome:
    """A slice's place in the buffer; DeepSpeed fills and empties the parameter itself."""

    parameter: int  # global index
    view: Tensor  # of the slice

    @cached_property
    def address(self) -> int:
        return self.view.data_ptr()

    def address_of(self, parameter: Parameter) -> int:
        return parameter.data_ptr()

    def objection(self, parameter: Any) -> str | None:
        """Return an objection to changes made without DeepSpeed's knowledge, which would be lost."""
        return objection_to(parameter)


def objection_to(parameter: Any) -> str | None:
    """Return an objection to changes made without DeepSpeed's knowledge, which would be lost."""
    held, codes = parameter.ds_tensor, getattr(parameter, CODES, None)
    if codes is not None and codes.is_read_by(parameter):
        return None
    dtype = dtype_of(parameter)
    if parameter.dtype is not dtype or parameter.device != held.device:
        received = f"{parameter.dtype} on {parameter.device}"
        return f"received {received} after deepspeed.initialize, allowed: {dtype} on {held.device}"
    left = parameter.numel() <= 1  # DeepSpeed leaves no element, or one, between uses
    whole = not is_away(parameter) and parameter.shape == shape_of(parameter)
    if not left and (not whole or _was_replaced(parameter)):
        return (
            f"received {described(parameter)} as .data, allowed under ZeRO 3: changes within "
            "deepspeed.zero.GatheredParameters(..., modifier_rank=0)"
        )
    return None


def _was_replaced(parameter: Any) -> bool:
    """Whether a whole parameter has other memory than its fetch gave it, with other values than its slice."""
    if parameter.data_ptr() == getattr(parameter, FETCHED, None):
        return False
    codes = getattr(parameter, CODES, None)
    held = parameter.ds_tensor if codes is None else codes.own_values()
    own = parameter.detach().reshape(-1)[part_of(parameter)]
    return not torch.equal(own, held[: len(own)])


def dtype_of(parameter: Any) -> torch.dtype:
    """Return the dtype that a parameter shows to users: BF16 for codes."""
    dtype: torch.dtype = torch.bfloat16 if hasattr(parameter, CODES) else parameter.ds_tensor.dtype
    return dtype


def is_away(parameter: Any) -> bool:
    """Whether only slices of the parameter are present."""
    return bool(parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE)


class SlicedWeights:
    """The slices of one bucket's parameters that this rank owns."""

    saved_with_states = True

    def __init__(self, bucket: Bucket, parameters: Mapping[int, Any], rank: int) -> None:
        """Copy the slices, which `cut` has made, into a new buffer; each `ds_tensor` is a view of it."""
        first = parameters[bucket.slots[0].parameter].ds_tensor
        shape = bucket.blocks_of(rank), bucket.block_size
        self._own = torch.zeros(shape, dtype=first.dtype, device=first.device)
        self.homes = []
        for slot in bucket.slots:
            held = parameters[slot.parameter].ds_tensor
            home = SliceHome(slot.parameter, self._own.view(-1)[bucket.offset(slot) :][: held.numel()])
            held.data = home.view.copy_(held)
            self.homes.append(home)

    def leads(self, index: int) -> bool:
        """Always true: a master is made from the parameter's values."""
        return True

    @property
    def own(self) -> Tensor:
        """The rows that this rank writes, [blocks, block size]."""
        return self._own

    room = own

    def given(self, piece: Piece) -> Tensor:
        """Return the memory for new values of this rank's part of a parameter, [elements]."""
        return elements_of(piece, self.own)

    def write(self, index: int, parameter: Parameter, values: Tensor) -> None:
        """Write a parameter if it is whole, [elements]; its slices are owned rows, written already."""
        if parameter.numel() == values.numel():
            parameter.data.view(-1).copy_(values)

    def gather(self, nodes: Nodes, control: Tensor | None) -> NothingToGather:
        """Gather nothing: DeepSpeed fetches a parameter where it is used."""
        return NothingToGather()

    @property
    def freed(self) -> bool:
        """Whether the memory was freed, by `untyped_storage().resize_(0)` on a slice."""
        return self._own.untyped_storage().nbytes() < self._own.nbytes

    def allocate(self) -> None:
        """Allocate memory again, uninitialised."""
        self._own.untyped_storage().resize_(self._own.nbytes)

    def bind(self, parameters: Mapping[int, Parameter]) -> Iterator[int]:
        """Yield the global index of each parameter that was written since; its slice is up to date."""
        for home in self.homes:
            if getattr(parameters[home.parameter], EDITED):
                setattr(parameters[home.parameter], EDITED, False)
                yield home.parameter
