"""Weights of matrix products: the E4M3 codes of a bucket's matrices.

In a step the sweep writes a rank's rows of BF16 weights into a buffer (`Room`) that all buckets share; each
rank finds the scale that its part of every tile needs, and the ranks agree on the largest (one byte per
tile of 128 x 128 elements); each rank encodes its rows; under ZeRO 1 and 2 a gather brings the codes to all.
Matrices are cut between blocks, as all parameters are, so the codes are the same bits at any number of ranks
and at any stage, and no tile is padded.

A `CodeStore` holds the codes: whole on every rank, or this rank's slices (ZeRO 3). The exponents of all
tiles are on every rank.

A skipped step has not written the buffer: exponents and codes then stay as they are, decided on the device.

Masters are taken from the BF16 weights before these are encoded; afterwards codes are always made from
masters. Values that a parameter is given between steps are kept, as far as a rank owns them, until codes are
made from masters again.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.products import tiles
from ds_fp8.ops.weight_runs import Grid, Run
from ds_fp8.zero_fp8.comm.collectives import max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.weights.code_store import CodeHome, CodeStore
from ds_fp8.zero_fp8.weights.home import elements_of
from ds_fp8.zero_fp8.weights.store import Gather


class Room:
    """The rows that a sweep writes, of one bucket at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows = torch.empty(0, dtype=torch.bfloat16, device=device)

    def rows(self, rows: int, block_size: int) -> Tensor:
        """Return the buffer for one bucket, [rows, block size] bfloat16, uninitialised."""
        wanted = rows * block_size
        if self._rows.numel() < wanted:
            self._rows = self._rows.new_empty(wanted)
        return self._rows[:wanted].view(rows, block_size)

    def drop(self) -> None:
        """Free the memory until the next sweep."""
        self._rows = self._rows.new_empty(0)


@dataclass(frozen=True)
class Products:
    """Settings that the matrices of a run share."""

    names: Mapping[int, str]  # names of parameters, by global index
    chosen: Collection[int]  # global indices of the parameters that become codes
    choice: Choice
    room: Room
    on_state_dict: Callable[[], None]  # called when a state_dict takes a weight


@dataclass(frozen=True)
class OwnPart:
    """The consecutive elements of a matrix that a rank owns."""

    piece: Piece
    home: CodeHome
    codes: Tensor  # [elements] E4M3

    @property
    def matrix(self) -> Matrix:
        return self.home.matrix

    def of(self, rows: Tensor) -> Tensor:
        """Return this part of a rank's rows of the bucket, as a vector."""
        return elements_of(self.piece, rows)

    def run(self, grid: Grid, block_size: int) -> Run:
        """Return where the elements are."""
        piece = self.piece
        values, codes = piece.first_row * block_size, int(self.codes.storage_offset())
        return Run(grid, piece.first_element, piece.numel, values, codes)


class CodeGather:
    """Codes on their way to every rank."""

    def __init__(self, gather: Gather, weights: "TiledWeights") -> None:
        self._gather, self._weights = gather, weights

    def advance(self) -> None:
        """Start the second hop, if there is one."""
        self._gather.advance()

    def land(self) -> None:
        """Wait until products can use the codes."""
        self._gather.land()
        self._weights.renew()


class TiledWeights:
    """The codes of one bucket's matrices."""

    def __init__(self, bucket: Bucket, store: CodeStore, rank: int, products: Products) -> None:
        """Create codes; parameters stay plain until the first gather has landed."""
        self._bucket, self._store, self._rank, self._products = bucket, store, rank, products
        self._encoded = False
        self._given: dict[int, Tensor] = {}  # owned elements, by parameter
        self._device = products.room.device
        codes = [store.codes_of(slot) for slot in bucket.slots]
        sizes = [(tiles(rows), tiles(columns)) for rows, columns in (each.shape for each in codes)]
        ends = list(accumulate(map(prod, sizes)))
        self._exponents = torch.ones(ends[-1], dtype=torch.uint8, device=self._device)
        self.homes: list[CodeHome] = []
        self._parts: list[OwnPart] = []
        runs = []
        for slot, own, size, end in zip(bucket.slots, codes, sizes, ends, strict=True):
            places = slice(end - prod(size), end)
            home = store.home(slot, self._matrix(slot.parameter, own, self._exponents[places].view(size)))
            self.homes.append(home)
            grid = Grid(own.shape[1], size, places)
            parts = [
                OwnPart(piece, home, store.part(piece, home))
                for piece in bucket.pieces(rank)
                if piece.slot is slot
            ]
            self._parts += parts
            runs += [part.run(grid, bucket.block_size) for part in parts]
        kernels = products.choice.kernels
        self._runs = kernels.weight_runs(kernels, runs)
        store.memory.release()  # until the first gather: BF16 weights plus the codes of one bucket

    def _matrix(self, index: int, codes: Tensor, exponents: Tensor) -> Matrix:
        matrix = Matrix(self._products.names[index], codes, exponents, self._products.choice.kernels)
        matrix.on_state_dict = self._products.on_state_dict
        return matrix

    @property
    def saved_with_states(self) -> bool:
        """Whether no model file has whole weights."""
        return self._store.saved_with_states

    def leads(self, index: int) -> bool:
        """Whether a parameter has other values than the codes of its master."""
        return not self._encoded or index in self._given

    @property
    def room(self) -> Tensor:
        """The buffer where this rank writes its rows, [blocks, block size] bfloat16; contents are lost."""
        return self._products.room.rows(self._bucket.blocks_of(self._rank), self._bucket.block_size)

    @property
    def own(self) -> Tensor:
        """The rows that this rank owns, with their values; valid until another bucket's are read."""
        rows = self.room.zero_()
        for part in self._parts:
            given = self._given.get(part.home.parameter)
            part.of(rows).copy_(self._store.values(part.piece, part.home) if given is None else given)
        return rows

    def given(self, piece: Piece) -> Tensor:
        """Return memory for new values of this rank's part of a parameter, [elements]; write all of it."""
        room = torch.empty(piece.numel, dtype=torch.bfloat16, device=self._device)
        self._given[piece.slot.parameter] = room
        return room

    def _keep(self, index: int, values: Tensor) -> None:
        """Keep values that a parameter is given, of its shape."""
        for part in self._parts:
            if part.piece.slot.parameter == index:
                self.given(part.piece).copy_(values.detach().reshape(-1)[part.piece.elements])

    def own_values(self, rows: Tensor) -> Iterator[tuple[OwnPart, Tensor]]:
        """Yield this rank's parts and their values, [elements] bfloat16.

        rows: its masters, rounded, [blocks, block size]; values that a parameter was given since come first.
        """
        for part in self._parts:
            given = self._given.get(part.home.parameter)
            yield part, part.of(rows) if given is None else given

    def matrices(self) -> Iterator[tuple[Matrix, list[OwnPart]]]:
        """Yield each matrix and the parts that this rank owns."""
        for home in self.homes:
            yield home.matrix, [part for part in self._parts if part.home is home]

    def set_writers(self, *, keeps: bool) -> None:
        """Let load_state_dict write; keeps: masters are to be taken from the written values."""
        for home in self.homes:
            home.matrix.writer = partial(self._keep, home.parameter) if keeps else _drop

    def unset_writers(self) -> None:
        """Stop load_state_dict from writing."""
        for home in self.homes:
            home.matrix.writer = None

    def gather(self, nodes: Nodes, control: Tensor | None) -> CodeGather:
        """Encode the contents of `room`, and launch the gather that brings every rank's codes to all."""
        if not self._encoded:
            self._store.memory.allocate()
        room, agreed = self.room, torch.zeros_like(self._exponents)
        self._runs.find_exponents(room.view(-1), agreed)
        max_over_ranks(agreed, nodes.group)
        if control is None:
            self._exponents.copy_(agreed)
        else:
            self._exponents.copy_(torch.where(control[1] == 0, self._exponents, agreed))
        self._runs.encode(room.view(-1), self._exponents, self._codes, control)
        for part in self._parts:
            if part.matrix.counts is not None:
                part.matrix.counts.of_weight(part.of(room), part.codes, part.matrix.exponents)
        self._products.room.drop()
        return CodeGather(self._store.gather(nodes), self)

    @property
    def _codes(self) -> Tensor:
        """The memory of codes as a vector."""
        return self._store.memory.bytes.view(-1).view(E4M3.dtype)

    def renew(self) -> None:
        """Update parameters once every rank's codes have arrived."""
        for home in self.homes:
            home.matrix.rewritten()
            if not self._encoded:
                self._store.show(home)
        self._encoded = True
        self._given.clear()

    def write(self, index: int, parameter: Parameter, values: Tensor) -> None:
        """Encode a parameter, [elements], the same on every rank."""
        for home in self.homes:
            if home.parameter == index:
                self._store.store(home, values)
                self._given.pop(index, None)

    def bind(self, parameters: Mapping[int, Parameter]) -> Iterator[int]:
        """Encode parameters that have their own values; yield the global index of each."""
        for home in self.homes if self._encoded else ():
            own = [part.piece for part in self._parts if part.home is home]
            given = self._store.returned(home, own)
            if given is not None:
                for piece, values in zip(own, given, strict=True):
                    self.given(piece).copy_(values)
                yield home.parameter

    @property
    def freed(self) -> bool:
        """Whether the memory was freed."""
        return self._encoded and self._store.memory.freed

    def allocate(self) -> None:
        """Allocate memory again, filled with zeros."""
        self._store.memory.allocate()


def _drop(_: Tensor) -> None:
    """Ignore written values: codes are made from masters."""


def is_tiled(weights: object) -> TypeGuard[TiledWeights]:
    """Whether a bucket has matrices."""
    return isinstance(weights, TiledWeights)


def tiled(weights: Sequence[object]) -> Iterator[TiledWeights]:
    """Yield the weights of the buckets that have matrices."""
    return filter(is_tiled, weights)


def matrices_of(weights: Sequence[object]) -> Iterator[Matrix]:
    """Yield the matrices of all buckets."""
    return (home.matrix for each in tiled(weights) for home in each.homes)
