"""FP8 weights under ZeRO 3: codes are sharded, fetched and multiplied.

`ds_tensor` holds this rank's codes. The exponents of a matrix, a byte per tile of 128 x 128 elements,
are on every rank, so a fetch sends codes only. A parameter has one of three states:

    released   DeepSpeed's empty parameter
    fetched    an FP8Parameter that reads the fetched codes: products use them as received
    gathered   by `GatheredParameters`: plain and BF16, decoded, so that it can be written

If a gathered parameter is released with `modifier_rank=0`, the ranks agree whether its values still equal
those of its codes: if so, nothing is encoded, and a round trip changes no byte. If not, each rank has all
values, finds the scales of all tiles and keeps its part of the codes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.compat import ZeroParamStatus, partition_parameters
from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.products import TILE, tiles
from ds_fp8.zero_fp8.comm.collectives import NothingToGather, max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.parameters import part_of, shape_of
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece, Slot
from ds_fp8.zero_fp8.products import fp8_parameter
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.kernels import decode
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.ways import Way
from ds_fp8.zero_fp8.weights.code_store import CodeMemory
from ds_fp8.zero_fp8.weights.sliced.slices import CODES, EDITED, FETCHED, is_away, objection_to

Encode = Callable[[Matrix, Tensor], None]  # encodes values, [rows, columns]


def nothing_of(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return NaNs that share two bytes: [rows, columns] bfloat16, and E4M3 of the same two bytes."""
    nan = torch.full((1,), float("nan"), dtype=torch.bfloat16, device=device)
    code = nan.view(torch.uint8)[1:].view(E4M3.dtype)  # 0x7F, of 0x7FC0
    return nan.expand(shape), code.expand(shape)


def beside_codes(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap DeepSpeed's zero3_linear_wrap, its `F.linear` under ZeRO 3, so that FP8 weights bypass it.

    Dynamo dispatches to a subclass only from functions that are in torch's namespaces, where torch's own
    linear is not when DeepSpeed has replaced it: the product is called as it is.
    """

    @wraps(original)
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (fp8_parameter.linear if isinstance(weight, FP8Parameter) else original)(input, weight, bias)

    return linear


class SlicedMatrix:
    """One parameter's matrix, and this rank's codes of it."""

    def __init__(
        self,
        index: int,
        parameter: Any,
        matrix: Matrix,
        held: Tensor,  # this rank's codes, [slice] uint8
        nothing: Tensor,  # the tensor that C++ reads, [rows, columns] bfloat16
        way: Way,
        encode: Encode = Matrix.store,  # values that are given to the parameter
    ) -> None:
        """index: as in homes. matrix: without codes yet."""
        self.parameter, self.matrix, self.held, self._way = index, matrix, held, way
        self._part, self._nothing, self._away = part_of(parameter), nothing, matrix.codes
        self._encode, self._released = encode, nothing.new_empty(0)
        self.edited: Tensor | None = None  # this rank's part of new values, until it is read
        matrix.travels, matrix.is_here = True, False

    def take_over(self, parameter: Any) -> None:
        """Make codes the parameter's slice from now on."""
        parameter.ds_tensor.data = self.held
        setattr(parameter, CODES, self)

    # The `Home` protocol

    @property
    def address(self) -> int:
        """Address of this rank's codes."""
        return self.held.data_ptr()

    def address_of(self, parameter: Parameter) -> int:
        return self.address if self.is_read_by(parameter) else parameter.data_ptr()

    def objection(self, parameter: Parameter) -> str | None:
        """Return an objection to changes made without DeepSpeed's knowledge, which would be lost."""
        return objection_to(parameter)

    # The states of a parameter

    def is_read_by(self, parameter: Any) -> bool:
        """Whether the parameter is fetched."""
        return isinstance(parameter, FP8Parameter) and parameter.matrix is self.matrix

    def fetched(self, parameter: Any, codes: Tensor) -> None:
        """Let a released parameter read codes, [elements] uint8."""
        self.matrix.codes = codes.view(E4M3.dtype).view(self._away.shape)
        self.matrix.is_here = True
        FP8Parameter.put_on(parameter, self._nothing, self.matrix, self._way)
        parameter.ds_status = ZeroParamStatus.AVAILABLE

    def gathered(self, parameter: Any) -> None:
        """Replace a fetched parameter's codes by their values."""
        if self.is_read_by(parameter):
            values = self.matrix.values()
            FP8Parameter.take_off(parameter, values)
            setattr(parameter, FETCHED, values.data_ptr())
            self._drop()

    def release(self, parameter: Any) -> None:
        """Release all but this rank's codes. Raises RuntimeError if modules are using the parameter."""
        if self.is_read_by(parameter) and not parameter.ds_active_sub_modules:
            FP8Parameter.take_off(parameter, self._released)
            self._drop()
        partition_parameters.free_param(parameter)

    def _drop(self) -> None:
        codes = self.matrix.codes
        if codes.is_cuda:  # they may have been made on the coordinator's stream
            codes.record_stream(torch.cuda.current_stream())
        self.matrix.codes, self.matrix.is_here = self._away, False

    def kept(self, parameter: Any) -> Callable[[], None]:
        """Return a function that makes a whole parameter whole again, as it is now, after a release."""
        if self.is_read_by(parameter):
            return partial(self.fetched, parameter, self.matrix.codes.view(torch.uint8))
        values = parameter.data

        def restore() -> None:
            parameter.data = values
            setattr(parameter, FETCHED, values.data_ptr())
            parameter.ds_status = ZeroParamStatus.AVAILABLE

        return restore

    # Values

    def was_edited(self, parameter: Any) -> bool:
        """Whether this rank's part of a gathered parameter has other values than its codes.

        Raises ValueError if the parameter has another shape.
        """
        values = parameter.detach()
        if values.shape != self._away.shape:
            received, allowed = list(values.shape), list(self._away.shape)
            raise ValueError(f"{self.matrix.name}: received a tensor of shape {received}, allowed: {allowed}")
        return not torch.equal(values.reshape(-1)[self._part], self.own_values())

    def take(self, parameter: Any) -> None:
        """Encode the values of a gathered parameter."""
        values = parameter.detach()
        self.edited = values.reshape(-1)[self._part].to(torch.bfloat16, copy=True)  # `store` rounds them
        self.store(parameter, values)
        setattr(parameter, EDITED, True)

    def store(self, parameter: Any, values: Tensor) -> None:
        """Encode values of the whole parameter, the same on every rank, and keep this rank's codes.

        A parameter that is whole is updated, too.
        """
        matrix, is_read = self.matrix, self.is_read_by(parameter)
        matrix.codes, matrix.is_here = self._nothing.new_empty(self._away.shape, dtype=E4M3.dtype), True
        self._encode(matrix, values.reshape(self._away.shape))
        own = matrix.codes.view(torch.uint8).view(-1)[self._part]
        self.held[: len(own)].copy_(own)
        if not is_read:
            if parameter.ds_status is ZeroParamStatus.AVAILABLE:
                parameter.data.copy_(matrix.values())
            matrix.codes, matrix.is_here = self._away, False

    def own_values(self) -> Tensor:
        """Decode this rank's part, [elements] bfloat16; all rows of the tiles that it touches are decoded."""
        part, columns = self._part, self._away.shape[1]
        first, last = part.start // columns // TILE * TILE, -(-part.stop // columns)
        if part.start == part.stop:
            return self._nothing.new_empty(0)
        codes = torch.zeros(last - first, columns, dtype=torch.uint8, device=self.held.device)
        own = slice(part.start - first * columns, part.stop - first * columns)
        codes.view(-1)[own] = self.held[: own.stop - own.start]
        exponents = self.matrix.exponents[first // TILE : tiles(last)]
        return decode(self.matrix.kernels, codes.view(E4M3.dtype), exponents).view(-1)[own]

    def encode_slices(self, parameter: Any) -> None:
        """Gather a parameter of BF16 slices and encode its values. Collective."""
        parameter.all_gather(param_list=[parameter])
        values = parameter.detach()
        self.take_over(parameter)
        self.store(parameter, values)
        self.release(parameter)

    def give_back(self, parameter: Any, own: Tensor | None = None) -> None:
        """Make the parameter's slice BF16 as if it had never been encoded.

        own: this rank's values, if they are not those of its codes. A whole parameter is then released, on
        every rank or none, even if a forward that raised has left it in use.
        """
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            self.gathered(parameter)
            if own is not None:
                parameter.ds_active_sub_modules.clear()
                partition_parameters.free_param(parameter)
        own = self.own_values() if own is None else own
        values = torch.zeros_like(self.held, dtype=torch.bfloat16)
        values[: len(own)] = own
        parameter.ds_tensor.data = values
        delattr(parameter, CODES)


def partition(parameters: Sequence[Any], *, updated: bool) -> None:
    """Release parameters that are whole. updated: encode values that they were given; then collective."""
    assert all(each.ds_status is not ZeroParamStatus.INFLIGHT for each in parameters)
    whole = [(each, getattr(each, CODES)) for each in parameters if not is_away(each)]
    gathered = [(each, codes) for each, codes in whole if updated and not codes.is_read_by(each)]
    if gathered:
        first = gathered[0][0]
        found = [codes.was_edited(each) for each, codes in gathered]
        edited = torch.tensor(found, dtype=torch.uint8, device=first.device)
        max_over_ranks(edited, first.ds_process_group)
        for (each, codes), is_edited in zip(gathered, edited.tolist(), strict=True):
            if is_edited:
                codes.take(each)
    for each, codes in whole:
        codes.release(each)


class CodeSlices:
    """This rank's codes of one bucket's matrices, in one buffer."""

    saved_with_states = True

    def __init__(self, bucket: Bucket, parameters: Mapping[int, Any], rank: int, way: Way) -> None:
        """Allocate codes; slices stay BF16 until `show`."""
        self._bucket, self._parameters, self._way = bucket, parameters, way
        first = parameters[bucket.slots[0].parameter].ds_tensor
        self.memory = CodeMemory(bucket.blocks_of(rank), bucket.block_size, device=first.device)
        self._nothing = {
            slot.parameter: nothing_of(shape_of(parameters[slot.parameter]), first.device)
            for slot in bucket.slots
        }

    def codes_of(self, slot: Slot) -> Tensor:
        """Return a placeholder, [rows, columns] E4M3, which has the shape only."""
        return self._nothing[slot.parameter][1]

    def home(self, slot: Slot, matrix: Matrix) -> SlicedMatrix:
        index = slot.parameter
        held, nothing = self._slice(index), self._nothing[index][0]
        return SlicedMatrix(index, self._parameters[index], matrix, held, nothing, self._way)

    def _slice(self, index: int) -> Tensor:
        """Return the memory of a parameter's slice."""
        slot = next(each for each in self._bucket.slots if each.parameter == index)
        length = self._parameters[index].ds_tensor.numel()
        return self.memory.bytes.view(-1)[self._bucket.offset(slot) :][:length]

    def part(self, piece: Piece, home: Any) -> Tensor:
        """Return the codes that this rank owns, [elements] E4M3."""
        codes: Tensor = home.held[: piece.numel].view(E4M3.dtype)
        return codes

    def values(self, piece: Piece, home: SlicedMatrix) -> Tensor:
        """Return the values that this rank owns, as the parameter has them, [elements] bfloat16."""
        parameter = self._parameters[home.parameter]
        values: Tensor = home.own_values() if hasattr(parameter, CODES) else parameter.ds_tensor
        return values[: piece.numel]

    def gather(self, nodes: Nodes) -> NothingToGather:
        """Gather nothing: DeepSpeed fetches a parameter where it is used."""
        return NothingToGather()

    def show(self, home: SlicedMatrix) -> None:
        """Make codes the parameter's slice from now on."""
        home.take_over(self._parameters[home.parameter])

    def store(self, home: SlicedMatrix, values: Tensor) -> None:
        """Encode values of a whole parameter, the same on every rank."""
        home.store(self._parameters[home.parameter], values)

    def returned(self, home: SlicedMatrix, own: Sequence[Piece]) -> list[Tensor] | None:
        """Encode values that the parameter was given since, and return those that this rank owns."""
        parameter, edited = self._parameters[home.parameter], home.edited
        if not getattr(parameter, EDITED):
            return None
        setattr(parameter, EDITED, False)
        home.edited = None
        return [edited for _ in own if edited is not None]
