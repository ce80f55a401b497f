"""Codes under ZeRO 1 and 2: a buffer of bytes per bucket, on every rank, whose views are the matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from ds_fp8.ops.formats import E4M3
from ds_fp8.zero_fp8.comm.collectives import AllGather
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece, Slot
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.ways import Way
from ds_fp8.zero_fp8.weights.code_store import CodeMemory
from ds_fp8.zero_fp8.weights.home import MatrixHome


class CodeViews:
    """All codes of one bucket's matrices."""

    saved_with_states = False

    def __init__(self, bucket: Bucket, parameters: Mapping[int, Parameter], rank: int, way: Way) -> None:
        """Allocate codes; parameters stay plain until `show`."""
        self._bucket, self._parameters, self._way = bucket, parameters, way
        device = parameters[bucket.slots[0].parameter].device
        self.memory = CodeMemory(bucket.blocks * bucket.block_size, device=device)

    def codes_of(self, slot: Slot) -> Tensor:
        """Return the codes of a parameter, [rows, columns] E4M3."""
        codes = self.memory.bytes[self._bucket.offset(slot) :][: slot.numel].view(E4M3.dtype)
        return codes.view(self._parameters[slot.parameter].shape)

    def home(self, slot: Slot, matrix: Matrix) -> MatrixHome:
        return MatrixHome(slot.parameter, matrix)

    def part(self, piece: Piece, home: Any) -> Tensor:
        """Return the codes that this rank owns, [elements] E4M3."""
        codes: Tensor = home.matrix.codes.view(-1)[piece.elements]
        return codes

    def values(self, piece: Piece, home: Any) -> Tensor:
        """Return the values that this rank owns, as the parameter has them, [elements] bfloat16."""
        return self._parameters[home.parameter].detach().reshape(-1)[piece.elements]

    def gather(self, nodes: Nodes) -> AllGather:
        """Launch the gather that brings every rank's codes to all."""
        return AllGather(self.memory.bytes, nodes)

    def show(self, home: Any) -> None:
        """Make the parameter read codes from now on."""
        FP8Parameter.take_over(self._parameters[home.parameter], home.matrix, self._way)

    def store(self, home: Any, values: Tensor) -> None:
        """Encode values of a whole parameter, the same on every rank."""
        home.matrix.store(values.view(home.matrix.codes.shape))

    def returned(self, home: Any, own: Sequence[Piece]) -> list[Tensor] | None:
        """Encode values that the parameter was given since, and return those that this rank owns."""
        parameter = self._parameters[home.parameter]
        if not home.was_left_by(parameter):
            return None
        values = parameter.detach()
        home.matrix.store(values)
        self.show(home)
        return [values.reshape(-1)[piece.elements] for piece in own]
