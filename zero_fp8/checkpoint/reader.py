"""Reading a checkpoint of ours, at any world size, ZeRO stage and bucket size.

A block holds the same elements whoever owns it, so re-sharding copies rows: each rank asks for the
blocks that it owns now, opens only the files that hold some of them, and reads only these rows (the
files are mapped, not read into memory).
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamState, square_root
from ds_fp8.ops.blocks import CHUNK, Blocks, decode, padded
from ds_fp8.ops.formats import BY_NAME, FP32
from ds_fp8.ops.masters import decode_masters
from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.convert import Values
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest
from ds_fp8.zero_fp8.checkpoint.reading import NOT_PLAIN, Entry, in_memory, load_pickled, load_plain
from ds_fp8.zero_fp8.checkpoint.writer import STATES, Names, Progress, check_hyperparameters
from ds_fp8.zero_fp8.states.shard import Shard

EXTRA_STATE_CLASSES = (io.BytesIO,)  # what modules such as Transformer Engine's keep beside tensors


class Native:
    """The tag in a folder, whose files have been verified.

    unpickle: DeepSpeed's model file, where it is needed, may hold a client's objects.
    """

    def __init__(self, folder: Path, facts: Manifest, *, unpickle: bool = False) -> None:
        self.folder = folder
        self.facts = facts
        self._unpickle = unpickle
        self._formats = {key: BY_NAME[getattr(facts.recipe, key)] for key in STATES}
        self._opened: dict[int, dict[str, Any]] = {}

    @property
    def progress(self) -> Progress:
        squares = [float("inf") if each == "off" else each for each in self.facts.clamp_squares]
        groups = in_memory(self._file(self._any_rank)["param_groups"])
        facts = self.facts
        return Progress(facts.steps, squares, dict(facts.loss_scaler), groups, facts.autoscale)

    @property
    def _any_rank(self) -> int:
        """A rank whose file is open already, if there is one."""
        return next(iter([*self._opened, *self.facts.optimizer_files]))

    def check(self, shards: Sequence[Shard], names: Names) -> None:
        """Refuse, by a ValueError, files that do not hold what these shards need."""
        for shard in shards:
            for piece in shard.pieces:
                for _ in self.rows(names[piece.slot.parameter], *self._blocks_of(piece.elements)):
                    pass
        rank = self._any_rank
        groups = Entry(self._path(rank), self._file(rank)).at("param_groups")
        for group in groups.each(len(self.facts.clamp_squares)):
            check_hyperparameters(group)

    def restore(self, shards: Sequence[Shard], weights: Sequence[Tensor], names: Names) -> None:
        """Copy a checked checkpoint of the same formats into the shards, byte for byte.

        weights: loaded already; of split masters they are the upper half.
        """
        for shard in shards:
            for piece in shard.pieces:
                state = shard.state[piece.rows]
                for row, saved in self.rows(names[piece.slot.parameter], *self._blocks_of(piece.elements)):
                    for key in STATES:
                        getattr(state, key)[row : row + len(saved.master)].copy_(getattr(saved, key))

    def values(self, name: str, elements: slice) -> Values:
        """States of some elements of a parameter, in FP32."""
        size = self.facts.recipe.block_size
        first, end = self._blocks_of(elements)
        inside = slice(elements.start - first * size, elements.stop - first * size)
        parts = [
            _decode(state, self._weights(name, first + row, len(state.master)))
            for row, state in self.rows(name, first, end)
        ]
        return Values(*(torch.cat(each)[inside] for each in zip(*parts, strict=True)))

    def _blocks_of(self, elements: slice) -> tuple[int, int]:
        """The saved blocks that hold some elements: the first, and the one after the last."""
        size = self.facts.recipe.block_size
        return elements.start // size, -(-elements.stop // size)

    def rows(self, name: str, first: int, end: int) -> Iterator[tuple[int, AdamState]]:
        """A parameter's blocks from `first` to before `end`, in pieces: row counted from `first`, states.

        Raises ValueError where a file does not hold what the manifest says.
        """
        covered = first
        for rank, start, stop in sorted(self.facts.parameters[name].blocks, key=lambda each: each[1]):
            low, high = max(first, start), min(end, stop)
            if low < high and low == covered:
                yield low - first, self._piece(rank, name, (start, stop))[low - start : high - start]
                covered = high
        if covered != end:
            raise ValueError(
                f"{self.folder / manifest.NAME}: blocks {covered} to {end} of {name}: received no file that "
                "holds them, expected every block once"
            )

    def _piece(self, rank: int, name: str, blocks: tuple[int, int]) -> AdamState:
        """What a rank saved of a parameter."""
        entry = self._file(rank)["fp8"]["parameters"].get(name)
        received = entry.get("blocks") if isinstance(entry, dict) else None
        if received != list(blocks):
            raise ValueError(f"{self._path(rank)}: blocks of {name}: received {received}, expected {blocks}")
        rows = blocks[1] - blocks[0]
        master, exp_avg, exp_avg_sq = (self._blocks(rank, name, key, entry, rows) for key in STATES)
        return AdamState(master, exp_avg, exp_avg_sq, stores_sqrt=self.facts.recipe.scaling == "block")

    def _blocks(self, rank: int, name: str, key: str, entry: Mapping[str, Any], rows: int) -> Blocks:
        fmt, size = self._formats[key], self.facts.recipe.block_size
        expected = {key: [rows, size * fmt.itemsize], **({f"{key}_scales": [rows]} if fmt.scaled else {})}
        for each, shape in expected.items():
            saved = entry.get(each)
            if not isinstance(saved, Tensor) or saved.dtype is not torch.uint8 or list(saved.shape) != shape:
                received = list(saved.shape) if isinstance(saved, Tensor) else None
                raise ValueError(
                    f"{self._path(rank)}: {each} of {name}: received shape {received}, expected {shape}"
                )
        return Blocks(entry[key].view(fmt.dtype), entry.get(f"{key}_scales"), fmt)

    def _weights(self, name: str, first: int, rows: int) -> Tensor:
        """The model's weights of some blocks, zeros after the parameter's end: what split masters need."""
        if not self._formats["master"].split:
            return torch.empty(rows, 0)
        size = self.facts.recipe.block_size
        flat = self.module[name].view(-1)[first * size : (first + rows) * size]
        return padded(flat, rows, size)

    def _path(self, rank: int) -> Path:
        return self.folder / self.facts.optimizer_files[rank]

    def _file(self, rank: int) -> dict[str, Any]:
        """The states in a rank's optimizer file, mapped."""
        if rank not in self.facts.optimizer_files:
            raise ValueError(f"{self.folder / manifest.NAME}: lists no optimizer file of rank {rank}")
        if rank not in self._opened:
            file = Entry(self._path(rank), load_plain(self._path(rank)))
            state = file.at("optimizer_state_dict").at("base_optimizer_state")
            state.at("fp8").at("parameters").of(dict)
            self._opened[rank] = state.value
        return self._opened[rank]

    @cached_property
    def model_file(self) -> dict[str, Any]:
        """DeepSpeed's model file, mapped."""
        path = self.folder / manifest.MODEL_FILE
        if self._unpickle:
            return load_pickled(path)
        try:
            return load_plain(path, EXTRA_STATE_CLASSES)
        except ValueError as error:
            if NOT_PLAIN not in str(error):
                raise
            raise ValueError(f"{error}; --unpickle reads it, where you trust who wrote it") from error

    @property
    def module(self) -> dict[str, Any]:
        """What the model's state_dict held: weights, buffers, frozen parameters, extra state."""
        path = self.folder / manifest.MODEL_FILE
        module: dict[str, Any] = Entry(path, self.model_file).at("module").of(dict)
        return module


def _decode(state: AdamState, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' master, exp_avg, exp_avg_sq and its root, [elements] each."""
    if state.exp_avg_sq.format is FP32 or not state.stores_sqrt:
        v = decode(state.exp_avg_sq)
        root = square_root(v)
    else:
        root = decode(state.exp_avg_sq)
        v = root.square()
    decoded = (decode_masters(state.master, weights), decode(state.exp_avg), v, root)
    master, exp_avg, exp_avg_sq, root = (each.view(-1) for each in decoded)
    return master, exp_avg, exp_avg_sq, root


def whole(native: Native, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A parameter's master, exp_avg and exp_avg_sq as FP32 vectors."""
    numel = torch.Size(native.facts.parameters[name].shape).numel()
    vectors = (torch.empty(numel), torch.empty(numel), torch.empty(numel))
    for first in range(0, numel, CHUNK):
        part = slice(first, min(first + CHUNK, numel))
        values = native.values(name, part)
        for vector, piece in zip(vectors, (values.master, values.exp_avg, values.exp_avg_sq), strict=True):
            vector[part] = piece
    return vectors


def others(native: Native) -> dict[str, Tensor]:
    """What the model file holds besides trained parameters: buffers, frozen ones, names of tied ones."""
    trained = native.facts.parameters
    return {
        name: tensor
        for name, tensor in native.module.items()
        if name not in trained and isinstance(tensor, Tensor)
    }


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state_dict is what a module's get_extra_state gave: of any type and length."""
    return name.rpartition(".")[2] == "_extra_state"
