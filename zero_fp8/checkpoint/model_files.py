"""DeepSpeed's model files: one with all weights, or under ZeRO 3 one per rank, with slices of frozen ones.

Under ZeRO 3 the module in a file has buffers, extra state and, for parameters, empty tensors. Frozen ones lie
beside it, in slices that follow each other from file to file; trained ones are the optimizer's.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fp8.zero_fp8.checkpoint.files import Entry, load_pickled
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest, Sliced
from ds_fp8.zero_fp8.placement.ranks import turn_of

FRAGMENTS = "frozen_param_fragments"  # DeepSpeed's key


class ModelFiles:
    """The model files of a tag, each opened when something of it is asked for."""

    def __init__(
        self, load: Callable[[int], Entry], sliced: Mapping[str, Sliced] | None, first: int = 0
    ) -> None:
        """load: a file by its index. sliced: frozen parameters under ZeRO 3; None: the module has all.

        first: the file that is asked for what all have alike.
        """
        self._load = functools.cache(load)
        self._first = first
        self.sliced = sliced

    @property
    def first(self) -> Entry:
        """The only file, or one of all."""
        return self._load(self._first)

    @property
    def module(self) -> dict[str, Any]:
        """The entries of the model's state_dict."""
        module: dict[str, Any] = self.first.at("module").of(dict)
        return module

    def _sliced(self, name: str) -> Sliced | None:
        """A tensor that lies beside the module, in slices."""
        return (self.sliced or {}).get(name)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold the values of a tensor."""
        if self._sliced(name):
            return True
        tensor = self.module.get(name)
        if self.sliced is None or not isinstance(tensor, Tensor) or tensor.numel():
            return isinstance(tensor, Tensor)
        return name in self.first.at("buffer_names").of(list, tuple)

    def weights(self, name: str, elements: slice) -> Tensor:
        """Some elements of a tensor."""
        sliced = self._sliced(name)
        if sliced is None:
            whole: Tensor = self.first.at("module").at(name).of(Tensor)
            return whole.reshape(-1)[elements]
        slices = list(self._slices(name, sliced, elements))
        return torch.cat(slices) if slices else torch.empty(0, dtype=self.dtype(name))

    def _slices(self, name: str, sliced: Sliced, elements: slice) -> Iterator[Tensor]:
        """Raises ValueError where a file does not hold what it should."""
        covered = elements.start
        for index, start, stop in sliced.slices:
            low, high = max(start, covered), min(stop, elements.stop)
            if low < high and low == covered:
                held = self._load(index).at(FRAGMENTS).at(name)
                values, dtype = held.of(Tensor), self.dtype(name)
                if values.ndim != 1 or len(values) < stop - start or values.dtype is not dtype:
                    raise held.refusal(f"a vector of {stop - start} or more of {dtype}")
                yield held.value[low - start : high - start]
                covered = high
        if covered != elements.stop:
            raise ValueError(
                f"{self.first.path}: elements {covered} to {elements.stop} of {name}: received no slice that "
                "has them"
            )

    def check_weights(self, name: str, elements: slice) -> None:
        """Refuse, by a ValueError, files that do not hold some elements of a tensor."""
        if self._sliced(name):
            self.weights(name, elements)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor in the files."""
        if sliced := self._sliced(name):
            return torch.Size(sliced.shape)
        shape: torch.Size = self.module[name].shape
        return shape

    def numel(self, name: str) -> int:
        return self.shape(name).numel()

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor in the files, also of an empty one."""
        dtype: torch.dtype = self.first.at("module").at(name).of(Tensor).dtype
        return dtype

    def whole(self, name: str) -> Tensor:
        """A tensor of the module, put together if it is in slices."""
        if self._sliced(name) is None:
            tensor: Tensor = self.module[name]
            return tensor
        return self.weights(name, slice(0, self.numel(name))).view(self.shape(name))


@dataclass(frozen=True)
class ModelFile(Entry):
    """DeepSpeed's model file of this rank, open, and those of all ranks of model parallelism."""

    paths: tuple[Path, ...] = ()
    sliced: Mapping[str, list[int] | None] | None = None  # shapes of parameters that are elsewhere (ZeRO 3)
    files: ModelFiles | None = None  # those of all ranks, if no manifest lists them

    @property
    def is_whole(self) -> bool:
        """Whether its module is all of the model, and not a rank's of model parallelism."""
        return len(self.paths) == 1

    @property
    def shapes(self) -> dict[str, list[int] | None]:
        """Shapes of the module's tensors; of parameters that are empty in it, their whole shapes."""
        found, sliced = shapes(self.at("module").of(dict)), self.sliced or {}
        return {name: sliced.get(name, shape) if shape == [0] else shape for name, shape in found.items()}


def shapes(state: Mapping[str, Any]) -> dict[str, list[int] | None]:
    """Shapes of the tensors of a state_dict; None for entries that are no tensor."""
    return {key: list(value.shape) if isinstance(value, Tensor) else None for key, value in state.items()}


def listed(folder: Path, manifest: Manifest, number: int, rank: int) -> ModelFile:
    """The model file of a place or, under ZeRO 3, of this rank; of another rank if there is none.

    number: of the place. rank: in the place.
    """
    place = manifest.places[number]
    names = place.model_files or [place.model_file]
    name = names[turn_of(rank, len(names))]
    if name not in manifest.files:  # on storage of a node
        name = next((each for each in names if each in manifest.files), name)
    trained = {key: parameter.shape for key, parameter in place.parameters.items()}
    sliced = None if place.has_whole_weights else {**place.module, **trained}
    paths = [folder / each.model_file for each in manifest.places]
    paths[number] = folder / name
    return ModelFile(folder / name, load_pickled(folder / name), paths=tuple(paths), sliced=sliced)
