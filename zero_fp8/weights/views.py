"""The model's weights, a flat buffer a bucket, whose views are the parameters.

The sweep writes a rank's own rows, the gather brings the others', while the next bucket is swept. Nobody
else writes weights: what the parameters are made of (views of their own dtype today) is known here only.
A user's `parameter.data = ...` takes a parameter out of its buffer; `binding.py` brings it back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.ops.blocks import Blocks, chunks, decode
from ds_fp8.ops.masters import write_weights
from ds_fp8.zero_fp8.comm.collectives import Gather, Spread
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Bucket


@dataclass(frozen=True)
class Home:
    """A parameter's place in a buffer."""

    parameter: int  # global index
    view: Tensor  # of the parameter's shape

    @cached_property
    def address(self) -> int:
        return self.view.data_ptr()

    def was_left_by(self, parameter: Parameter) -> bool:
        """Whether the parameter's values lie elsewhere, or otherwise."""
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


class Weights:
    """The flat weight buffer of one bucket."""

    def __init__(self, bucket: Bucket, parameters: Mapping[int, Parameter], rank: int) -> None:
        """Copy the bucket's parameters into a new buffer and make them views of it."""
        first = parameters[bucket.slots[0].parameter]
        self.buffer = torch.zeros(bucket.blocks * bucket.block_size, dtype=first.dtype, device=first.device)
        self.homes = [
            Home(slot.parameter, self.buffer[bucket.offset(slot) :][: slot.numel].view(each.shape))
            for slot in bucket.slots
            for each in [parameters[slot.parameter]]
        ]
        for home in self.homes:
            home.take_in(parameters[home.parameter])
        rows = self.buffer.view(-1, bucket.block_size)
        self._parts = [rows[bucket.rows_of(each)] for each in range(bucket.world_size)]
        self._rank = rank

    @property
    def freed(self) -> bool:
        """Whether the buffer's memory was given back, by `untyped_storage().resize_(0)` on a parameter."""
        return self.buffer.untyped_storage().nbytes() < self.buffer.nbytes

    def allocate(self) -> None:
        """Have memory again, with nothing that is known in it."""
        self.buffer.untyped_storage().resize_(self.buffer.nbytes)

    def bind(self, parameters: Mapping[int, Parameter]) -> Iterator[int]:
        """Bring parameters that have left the buffer back, with their values; the global index of each."""
        for home in self.homes:
            parameter = parameters[home.parameter]
            if home.was_left_by(parameter):
                home.take_in(parameter)
                yield home.parameter

    @property
    def own(self) -> Tensor:
        """The rows that this rank writes, [blocks, block size]."""
        return self._parts[self._rank]

    def gather(self, nodes: Nodes) -> Gather | Spread:
        """Launch what brings every rank's rows to all."""
        if len({len(part) for part in self._parts}) == 1:
            return Gather(self.buffer, nodes)
        return Spread(self._parts, nodes.everybody)

    def write(self, masters: Blocks) -> None:
        """Round masters, the owned rows, into the weights; of split ones they are the upper half already."""
        if masters.format.split:
            return
        for part in chunks(len(masters), masters.block_size):
            write_weights(decode(masters[part]), self.own[part])


class Gathers:
    """Weights on their way to every rank: each bucket's are launched when its rows have been written."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._under_way: list[Gather | Spread] = []

    def launch(self, weights: Weights) -> None:
        """Send a bucket's rows off; the bucket before it moves on."""
        for earlier in self._under_way[-1:]:
            earlier.advance()
        self._under_way.append(weights.gather(self._nodes))

    def wait(self) -> None:
        """Bring everybody's rows to the parameters."""
        while self._under_way:
            self._under_way.pop(0).land()
