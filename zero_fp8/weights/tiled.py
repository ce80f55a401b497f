"""Weights of matrix products under ZeRO 1 and 2: E4M3 codes in one buffer of bytes per bucket.

What a step does with them: the sweep writes a rank's rows of BF16 weights into a room that all buckets share;
each rank finds the scale that its part of every tile needs, and the ranks agree on the largest (one byte per
tile of 128 x 128 elements); each rank encodes its rows; one gather brings the codes of all. Matrices are cut
between blocks, as all parameters are, so the codes are the same bits at any number of ranks, and nothing is
padded.

A skipped step has not written the room: then exponents and codes stay as they are, which the device decides.

Masters are taken from the BF16 weights before they are encoded, and decide ever after. Values that a
parameter is given between steps are kept, as far as a rank owns them, until codes are made of masters again.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.products import tiles
from ds_fp8.zero_fp8.comm.collectives import AllGather, max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.weights.home import MatrixHome, elements_of


class Room:
    """Rows that a sweep writes, of one bucket at a time."""

    def __init__(self, device: torch.device) -> None:
        self._rows = torch.empty(0, dtype=torch.bfloat16, device=device)

    def rows(self, rows: int, block_size: int) -> Tensor:
        """[rows, block size] bfloat16, with nothing that is known in them."""
        wanted = rows * block_size
        if self._rows.numel() < wanted:
            self._rows = self._rows.new_empty(wanted)
        return self._rows[:wanted].view(rows, block_size)

    def drop(self) -> None:
        """Hold no memory while nothing is swept."""
        self._rows = self._rows.new_empty(0)


@dataclass(frozen=True)
class Products:
    """What the matrices of a run have in common."""

    names: Mapping[int, str]  # of parameters, by global index
    chosen: Collection[int]  # global indices of those that become codes
    choice: Choice
    room: Room
    on_state_dict: Callable[[], None]  # called when a state_dict takes a weight


@dataclass(frozen=True)
class OwnPart:
    """A rank's run of elements of a matrix."""

    piece: Piece
    matrix: Matrix
    tiles: slice  # of the matrix, among those of the bucket

    def of(self, rows: Tensor) -> Tensor:
        """This part of a rank's rows of the bucket, as a vector."""
        return elements_of(self.piece, rows)

    def exponents(self, agreed: Tensor) -> Tensor:
        """Those of the matrix, of what the ranks agree on for a bucket."""
        return agreed[self.tiles].view(self.matrix.exponents.shape)

    @property
    def place(self) -> tuple[int, int]:
        """The first element, and how many a row of the matrix has."""
        return self.piece.first_element, self.matrix.codes.shape[1]

    @property
    def codes(self) -> Tensor:
        """[elements] E4M3."""
        return self.matrix.codes.view(-1)[self.piece.elements]


class CodeGather:
    """Codes on their way to every rank."""

    def __init__(self, gather: AllGather, weights: "TiledWeights") -> None:
        self._gather, self._weights = gather, weights

    def advance(self) -> None:
        """Start the second hop, if there is one."""
        self._gather.advance()

    def land(self) -> None:
        """Products can use the codes."""
        self._gather.land()
        self._weights.renew()


class TiledWeights:
    """The codes of one bucket's matrices."""

    saved_with_states = False

    def __init__(
        self, bucket: Bucket, parameters: Mapping[int, Parameter], rank: int, products: Products
    ) -> None:
        """Make room for codes, beside parameters that are plain until the first gather has landed."""
        self._bucket, self._rank, self._products = bucket, rank, products
        self._parameters = {slot.parameter: parameters[slot.parameter] for slot in bucket.slots}
        self._encoded = False
        self._given: dict[int, Tensor] = {}  # by parameter, the elements that this rank owns
        device = parameters[bucket.slots[0].parameter].device
        self._codes = torch.zeros(bucket.blocks * bucket.block_size, dtype=torch.uint8, device=device)
        counts = [tiles(each.shape[0]) * tiles(each.shape[1]) for each in self._parameters.values()]
        self._exponents = torch.ones(sum(counts), dtype=torch.uint8, device=device)
        self.homes: list[MatrixHome] = []
        self._parts: list[OwnPart] = []
        ends = list(accumulate(counts))
        for slot, count, end in zip(bucket.slots, counts, ends, strict=True):
            places = slice(end - count, end)
            codes = self._codes[bucket.offset(slot) :][: slot.numel].view(E4M3.dtype)
            matrix = self._matrix(slot.parameter, codes, self._exponents[places])
            self.homes.append(MatrixHome(slot.parameter, matrix))
            self._parts += [
                OwnPart(piece, matrix, places) for piece in bucket.pieces(rank) if piece.slot is slot
            ]

    def _matrix(self, index: int, codes: Tensor, exponents: Tensor) -> Matrix:
        rows, columns = self._parameters[index].shape
        matrix = Matrix.of(
            self._products.names[index],
            codes.view(rows, columns),
            exponents.view(tiles(rows), tiles(columns)),
            self._products.choice.kernels,
        )
        matrix.on_state_dict = self._products.on_state_dict
        return matrix

    def leads(self, index: int) -> bool:
        """Whether a parameter has other values than codes of its master."""
        return not self._encoded or index in self._given

    @property
    def room(self) -> Tensor:
        """Where this rank writes its rows, [blocks, block size] bfloat16; what it holds is lost."""
        return self._products.room.rows(self._bucket.blocks_of(self._rank), self._bucket.block_size)

    @property
    def own(self) -> Tensor:
        """The rows that this rank owns, with their values, until another bucket's are asked for."""
        rows = self.room.zero_()
        for part in self._parts:
            index = part.piece.slot.parameter
            given = self._given.get(index)
            if given is None:
                given = self._parameters[index].detach().reshape(-1)[part.piece.elements]
            part.of(rows).copy_(given)
        return rows

    def given(self, piece: Piece) -> Tensor:
        """Room for new values of what this rank owns of a parameter, [elements]; all are to be written."""
        room = torch.empty(piece.numel, dtype=torch.bfloat16, device=self._codes.device)
        self._given[piece.slot.parameter] = room
        return room

    def _keep(self, index: int, values: Tensor) -> None:
        """Values that a parameter is given, of its shape."""
        for part in self._parts:
            if part.piece.slot.parameter == index:
                self.given(part.piece).copy_(values.detach().reshape(-1)[part.piece.elements])

    def matrices(self) -> Iterator[tuple[Matrix, list[OwnPart]]]:
        """Each matrix, and what this rank owns of it."""
        for home in self.homes:
            yield home.matrix, [part for part in self._parts if part.matrix is home.matrix]

    def set_writers(self, *, keeps: bool) -> None:
        """Let load_state_dict write; keeps: masters are to be taken from what it writes."""
        for home in self.homes:
            home.matrix.writer = partial(self._keep, home.parameter) if keeps else _drop

    def unset_writers(self) -> None:
        """Nobody writes any more."""
        for home in self.homes:
            home.matrix.writer = None

    def gather(self, nodes: Nodes, control: Tensor | None) -> CodeGather:
        """Encode what `room` holds, and launch what brings every rank's codes to all."""
        room, kernels = self.room, self._products.choice.kernels
        agreed = torch.zeros_like(self._exponents)
        for part in self._parts:
            kernels.find_exponents(part.of(room), *part.place, part.exponents(agreed))
        max_over_ranks(agreed, nodes.group)
        if control is None:
            self._exponents.copy_(agreed)
        else:
            self._exponents.copy_(torch.where(control[1] == 0, self._exponents, agreed))
        for part in self._parts:
            kernels.encode_weight(part.of(room), *part.place, part.matrix.exponents, part.codes, control)
            if part.matrix.counts is not None:
                part.matrix.counts.of_weight(part.of(room), part.codes, part.matrix.exponents)
        self._products.room.drop()
        return CodeGather(AllGather(self._codes, nodes), self)

    def renew(self) -> None:
        """Every rank's codes are here."""
        for home in self.homes:
            matrix = home.matrix
            expand = self._products.choice.kernels.expand_exponents
            expand(matrix.exponents, matrix.scales)
            matrix.rewritten()
            if not self._encoded:
                FP8Parameter.take_over(self._parameters[home.parameter], matrix, self._products.choice.way)
        self._encoded = True
        self._given.clear()

    def write(self, index: int, parameter: Parameter, values: Tensor) -> None:
        """Encode a parameter, [elements], the same on every rank."""
        for home in self.homes:
            if home.parameter == index:
                home.matrix.store(values.view(home.matrix.codes.shape))
                self._given.pop(index, None)

    def bind(self, parameters: Mapping[int, Parameter]) -> Iterator[int]:
        """Encode parameters that have values of their own; the global index of each."""
        for home in self.homes if self._encoded else ():
            parameter = parameters[home.parameter]
            if home.was_left_by(parameter):
                home.matrix.store(parameter.detach())
                self._keep(home.parameter, parameter)
                FP8Parameter.take_over(parameter, home.matrix, self._products.choice.way)
                yield home.parameter

    @property
    def freed(self) -> bool:
        """Whether the memory was given back."""
        return False

    def allocate(self) -> None:
        """There is always memory: nobody else has the buffer."""


def _drop(_: Tensor) -> None:
    """Masters decide."""


def is_tiled(weights: object) -> TypeGuard[TiledWeights]:
    """Whether a bucket has matrices."""
    return isinstance(weights, TiledWeights)


def tiled(weights: Sequence[object]) -> Iterator[TiledWeights]:
    """Those of buckets that have matrices."""
    return filter(is_tiled, weights)


def matrices_of(weights: Sequence[object]) -> Iterator[Matrix]:
    """Of all buckets that have some."""
    return (home.matrix for each in tiled(weights) for home in each.homes)
