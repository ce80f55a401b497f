"""Weights under ZeRO 1 and 2: a flat buffer per bucket, in the model's dtype, whose views are the parameters.

A user's `parameter.data = ...` takes a parameter out of its buffer; `binding` brings it back.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.comm.collectives import AllGather, Broadcasts
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.weights.home import WholeHome, elements_of


class FlatWeights:
    """The flat weight buffer of one bucket."""

    saved_with_states = False

    def __init__(self, bucket: Bucket, parameters: Mapping[int, Parameter], rank: int) -> None:
        """Copy the bucket's parameters into a new buffer and make them views of it."""
        first = parameters[bucket.slots[0].parameter]
        self.buffer = torch.zeros(bucket.blocks * bucket.block_size, dtype=first.dtype, device=first.device)
        self.homes = [
            WholeHome(slot.parameter, self.buffer[bucket.offset(slot) :][: slot.numel].view(each.shape))
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
        """Whether the buffer's memory was freed, by `untyped_storage().resize_(0)` on a parameter."""
        return self.buffer.untyped_storage().nbytes() < self.buffer.nbytes

    def allocate(self) -> None:
        """Allocate memory again, uninitialised."""
        self.buffer.untyped_storage().resize_(self.buffer.nbytes)

    def bind(self, parameters: Mapping[int, Parameter]) -> Iterator[int]:
        """Bring back parameters that left the buffer, with their values; yield the global index of each."""
        for home in self.homes:
            parameter = parameters[home.parameter]
            if home.was_left_by(parameter):
                home.take_in(parameter)
                yield home.parameter

    def leads(self, index: int) -> bool:
        """Always true: a master is made from the parameter's values."""
        return True

    @property
    def own(self) -> Tensor:
        """The rows that this rank writes, [blocks, block size]."""
        return self._parts[self._rank]

    room = own

    def given(self, piece: Piece) -> Tensor:
        """Return the memory for new values of this rank's part of a parameter, [elements]."""
        return elements_of(piece, self.own)

    def write(self, index: int, parameter: Parameter, values: Tensor) -> None:
        """Write a parameter, [elements]."""
        parameter.data.view(-1).copy_(values)

    def gather(self, nodes: Nodes, control: Tensor | None) -> AllGather | Broadcasts:
        """Launch the gather that brings every rank's rows to all."""
        if len({len(part) for part in self._parts}) == 1:
            return AllGather(self.buffer, nodes)
        return Broadcasts(self._parts, nodes.group)
