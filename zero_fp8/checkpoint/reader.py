"""Reading a checkpoint of ours, at any world size, ZeRO stage and bucket size.

A block holds the same elements on whichever rank, so re-sharding copies rows: each rank asks for the
blocks that it owns now, opens only the files that hold some of them, and reads only these rows (the
files are mapped, not read into memory).
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import CHUNK, Blocks, decode, padded
from ds_fp8.ops.formats import BY_NAME
from ds_fp8.ops.masters import decode_masters, write_weights
from ds_fp8.ops.moments import UNIT
from ds_fp8.zero_fp8.checkpoint.contracts import (
    STATES,
    WEIGHT,
    Names,
    Progress,
    Values,
    check_hyperparameters,
)
from ds_fp8.zero_fp8.checkpoint.files import NOT_PLAIN, Entry, in_memory, load_pickled, load_plain
from ds_fp8.zero_fp8.checkpoint.manifest import NAME, Manifest
from ds_fp8.zero_fp8.checkpoint.model_files import ModelFiles
from ds_fp8.zero_fp8.states.shard import Shard

EXTRA_STATE_CLASSES = (io.BytesIO,)  # what modules such as Transformer Engine's keep beside tensors


class Checkpoint:
    """A place of the tag in a folder, whose files have been verified.

    unpickle: DeepSpeed's model file, where it is needed, may hold a client's objects.
    """

    def __init__(self, folder: Path, manifest: Manifest, place: int = 0, *, unpickle: bool = False) -> None:
        self.place = manifest.places[place]
        self.folder = folder
        self.manifest = manifest
        self.parameters = self.place.parameters
        here = [name in manifest.files for name in self._model_names]
        sliced = None if self.place.has_whole_weights else self.place.sliced
        self.model_files = ModelFiles(self._model_file, sliced, here.index(True) if any(here) else 0)
        self._coded = manifest.coded
        self._unpickle = unpickle
        self._formats = {key: BY_NAME[getattr(manifest.recipe, key)] for key in STATES}
        self._has_upper_halves = self._formats["master"].split and not self.place.has_whole_weights
        self._opened: dict[str, dict[str, Any]] = {}

    @property
    def progress(self) -> Progress:
        saved = self.manifest
        return Progress(
            steps=saved.steps,
            clamp_squares=[math.inf if square == "off" else square for square in saved.clamp_squares],
            loss_scaler=dict(saved.loss_scaler),
            param_groups=in_memory(self._file(self._any_file)["param_groups"]),
            autoscale=saved.autoscale,
        )

    @property
    def _any_file(self) -> str:
        """An optimizer file that is open already, if there is one, else one that is here."""
        here = [name for name in self.place.optimizer_files if name in self.manifest.files]
        return next(iter([*self._opened, *here, *self.place.optimizer_files]))

    def check(self, shards: Sequence[Shard], names: Names) -> None:
        """Refuse, by a ValueError, files that do not hold what these shards need."""
        for shard in shards:
            for piece in shard.pieces:
                self._check_rows(names[piece.slot.parameter], piece.elements)
        file = self._any_file
        groups = Entry(self.folder / file, self._file(file)).at("param_groups")
        for group in groups.each(len(self.manifest.clamp_squares)):
            check_hyperparameters(group)

    def _check_rows(self, name: str, elements: slice) -> None:
        for _ in self.rows(name, *self._blocks_of(elements)):
            pass

    def restore(self, shards: Sequence[Shard], weights: Sequence[Tensor], names: Names) -> None:
        """Copy a checked checkpoint of the same formats into the shards, byte for byte.

        weights: the rows that the shards own; of split masters they are the upper half.
        """
        for shard, own in zip(shards, weights, strict=True):
            for piece in shard.pieces:
                name, (first, end) = names[piece.slot.parameter], self._blocks_of(piece.elements)
                for row, saved in self.rows(name, first, end):
                    start = piece.first_row + row
                    rows = slice(start, start + len(saved.master))
                    for lot, state in shard.where_they_are(rows):
                        for key in STATES:
                            getattr(state, key).copy_(getattr(saved, key)[lot])
                    if saved.master.format.split:
                        own[rows].copy_(self._upper_halves(name, first + row, len(saved.master)))

    def values(self, name: str, elements: slice) -> Values:
        """States of some elements of a parameter, in FP32."""
        size = self.manifest.recipe.block_size
        first, end = self._blocks_of(elements)
        inside = slice(elements.start - first * size, elements.stop - first * size)
        parts = [
            _decode(state, self._upper_halves(name, first + row, len(state.master)))
            for row, state in self.rows(name, first, end)
        ]
        return Values(*(torch.cat(vectors)[inside] for vectors in zip(*parts, strict=True)))

    def states(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A parameter's master, exp_avg and exp_avg_sq, whole, as FP32 vectors."""
        numel = torch.Size(self.parameters[name].shape).numel()
        master, exp_avg, exp_avg_sq = torch.empty(3, numel, dtype=torch.float32)
        vectors = master, exp_avg, exp_avg_sq
        for first in range(0, numel, CHUNK):
            part = slice(first, min(first + CHUNK, numel))
            values = self.values(name, part)
            for vector, each in zip(vectors, (values.master, values.exp_avg, values.exp_avg_sq), strict=True):
                vector[part] = each
        return vectors

    def __contains__(self, name: str) -> bool:
        """Whether there are weights of a parameter, trained or frozen."""
        return name in self.parameters or name in self.model_files

    def check_weights(self, name: str, elements: slice) -> None:
        """Refuse, by a ValueError, files that do not hold some elements of a parameter's weights."""
        if self._are_trained(name):
            self._check_rows(name, elements)
        else:
            self.model_files.check_weights(name, elements)

    def _are_trained(self, name: str) -> bool:
        """Whether the weights of a parameter follow from its states, as no model file has as much of them."""
        in_files = self.place.has_whole_weights and name not in self._coded
        return name in self.parameters and not in_files

    def weights(self, name: str, elements: slice) -> Tensor:
        """Weights of some elements of a parameter, as the engine had them."""
        if not self._are_trained(name):
            return self.model_files.weights(name, elements)
        size = self.manifest.recipe.block_size
        first, end = self._blocks_of(elements)
        inside = slice(elements.start - first * size, elements.stop - first * size)
        if self._has_upper_halves:
            return self._upper_halves(name, first, end - first).view(-1)[inside]
        parts = [decode(state.master).view(-1) for _, state in self.rows(name, first, end)]
        out = torch.empty(inside.stop - inside.start, dtype=getattr(torch, self.parameters[name].dtype))
        write_weights(torch.cat(parts)[inside], out)
        return out

    def _blocks_of(self, elements: slice) -> tuple[int, int]:
        """The saved blocks that hold some elements: the first, and the one after the last."""
        size = self.manifest.recipe.block_size
        return elements.start // size, -(-elements.stop // size)

    def rows(self, name: str, first: int, end: int) -> Iterator[tuple[int, AdamState]]:
        """A parameter's blocks from `first` to before `end`, in pieces: row counted from `first`, states.

        Raises ValueError where a file does not hold what the manifest says.
        """
        for row, file, blocks, part in self._held(name, first, end):
            yield row, self._piece(file, name, blocks)[part]

    def _held(self, name: str, first: int, end: int) -> Iterator[tuple[int, str, tuple[int, int], slice]]:
        """Where the blocks are: row counted from `first`, file, the blocks in it, and which of them."""
        covered, files = first, self.place.optimizer_files
        for index, start, stop in sorted(self.parameters[name].blocks, key=lambda block: block[1]):
            low, high = max(first, start), min(end, stop)
            if low < high and low == covered:
                yield low - first, files[index], (start, stop), slice(low - start, high - start)
                covered = high
        if covered != end:
            raise ValueError(
                f"{self.folder / NAME}: blocks {covered} to {end} of {name}: received no file that "
                "holds them, expected every block once"
            )

    def _entry(self, file: str, name: str, blocks: tuple[int, int]) -> Mapping[str, Any]:
        """The entry of a parameter in a file."""
        entry = self._file(file)["fp8"]["parameters"].get(name)
        received = entry.get("blocks") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or received != list(blocks):
            raise ValueError(
                f"{self.folder / file}: blocks of {name}: received {received}, expected {blocks}"
            )
        return entry

    def _piece(self, file: str, name: str, blocks: tuple[int, int]) -> AdamState:
        """The states in a file of a parameter's blocks."""
        entry, rows = self._entry(file, name, blocks), blocks[1] - blocks[0]
        if self._has_upper_halves:
            self._upper_half(file, name, blocks)
        master, exp_avg, exp_avg_sq = (self._blocks(file, name, key, entry, rows) for key in STATES)
        return AdamState(master, exp_avg, exp_avg_sq, stores_sqrt=self.manifest.recipe.scaling == "block")

    def _blocks(self, file: str, name: str, key: str, entry: Mapping[str, Any], rows: int) -> Blocks:
        fmt, size = self._formats[key], self.manifest.recipe.block_size
        codes = self._bytes(file, name, key, entry, [rows, size * fmt.itemsize])
        scales = self._bytes(file, name, f"{key}_scales", entry, [rows]) if fmt.scaled else None
        return Blocks(codes.view(fmt.dtype), scales, fmt)

    def _bytes(self, file: str, name: str, key: str, entry: Mapping[str, Any], shape: list[int]) -> Tensor:
        saved = entry.get(key)
        if not isinstance(saved, Tensor) or saved.dtype is not torch.uint8 or list(saved.shape) != shape:
            received = list(saved.shape) if isinstance(saved, Tensor) else None
            raise ValueError(
                f"{self.folder / file}: {key} of {name}: received shape {received}, expected {shape}"
            )
        return saved

    def _upper_halves(self, name: str, first: int, rows: int) -> Tensor:
        """The model's weights of some blocks, zeros after the parameter's end: what split masters need."""
        if not self._formats["master"].split:
            return torch.empty(rows, 0, dtype=torch.float32)
        if self._has_upper_halves:
            parts = self._held(name, first, first + rows)
            return torch.cat([self._upper_half(file, name, blocks)[part] for _, file, blocks, part in parts])
        size = self.manifest.recipe.block_size
        flat = self.model_files.weights(name, slice(first * size, (first + rows) * size))
        return padded(flat, rows, size)

    def _upper_half(self, file: str, name: str, blocks: tuple[int, int]) -> Tensor:
        """The upper half (BF16 weights) of a parameter's blocks in an optimizer file, as bytes."""
        entry, rows = self._entry(file, name, blocks), blocks[1] - blocks[0]
        saved = self._bytes(file, name, WEIGHT, entry, [rows, self.manifest.recipe.block_size * 2])
        return saved.view(torch.bfloat16)

    def _file(self, name: str) -> dict[str, Any]:
        """The states in an optimizer file, mapped."""
        if name not in self.manifest.files:
            raise ValueError(f"{self.folder / NAME}: blocks are in {name}, which it does not list")
        if name not in self._opened:
            file = Entry(self.folder / name, load_plain(self.folder / name))
            state = file.at("optimizer_state_dict").at("base_optimizer_state")
            state.at("fp8").at("parameters").of(dict)
            self._opened[name] = state.value
        return self._opened[name]

    @property
    def model_path(self) -> Path:
        """DeepSpeed's model file; under ZeRO 3 that of the first rank."""
        return self.folder / self.place.model_file

    @property
    def _model_names(self) -> list[str]:
        return self.place.model_files or [self.place.model_file]

    def _model_file(self, index: int) -> Entry:
        """A model file, mapped."""
        path = self.folder / self._model_names[index]
        if self._unpickle:
            return Entry(path, load_pickled(path))
        try:
            return Entry(path, load_plain(path, EXTRA_STATE_CLASSES))
        except ValueError as error:
            if NOT_PLAIN not in str(error):
                raise
            raise ValueError(f"{error}; --unpickle reads it, where you trust who wrote it") from error

    @property
    def model_file(self) -> dict[str, Any]:
        """The contents of DeepSpeed's model file."""
        content: dict[str, Any] = self.model_files.first.value
        return content

    @property
    def module(self) -> dict[str, Any]:
        """The model's state_dict: weights, buffers, frozen parameters, extra state."""
        return self.model_files.module


def _decode(state: AdamState, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' master, exp_avg, exp_avg_sq and its root, [elements] each."""
    v, root = state.second_moment(UNIT**-2), state.root()
    decoded = (decode_masters(state.master, weights), state.first_moment(), v, root)
    master, exp_avg, exp_avg_sq, root = (rows.view(-1) for rows in decoded)
    return master, exp_avg, exp_avg_sq, root


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state_dict is what a module's get_extra_state gave: of any type and length."""
    return name.rpartition(".")[2] == "_extra_state"
