"""A checkpoint of a model that was split over ranks, read as if the model had been whole.

Places have parts of some tensors, which follow each other along a dimension that the manifest names. What
every place has as a whole is taken from the first.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fp8.config.refusals import naming
from ds_fp8.zero_fp8.checkpoint.contracts import Progress
from ds_fp8.zero_fp8.checkpoint.files import Entry
from ds_fp8.zero_fp8.checkpoint.manifest import NAME, Manifest, Parameter
from ds_fp8.zero_fp8.checkpoint.model_files import FRAGMENTS, ModelFiles
from ds_fp8.zero_fp8.checkpoint.reader import Checkpoint

LAYOUT = "universal_checkpoint_info"  # DeepSpeed's key: how parts are put together
FROZEN_SHAPES = "frozen_param_shapes"
States = tuple[Tensor, Tensor, Tensor]  # master, exp_avg and exp_avg_sq, float32 vectors


class MergedFiles:
    """The model files of all places."""

    sliced = None

    def __init__(self, files: Sequence[ModelFiles], cuts: Mapping[str, int]) -> None:
        """cuts: of the tensors of which places have parts, the dimension."""
        self._files = files
        self._cuts = cuts

    @property
    def first(self) -> Entry:
        """The model file of the first place."""
        return self._files[0].first

    @property
    def module(self) -> dict[str, Any]:
        """The model's state_dict at the first place."""
        return self._files[0].module

    def __contains__(self, name: str) -> bool:
        return name in self._files[0]

    def whole(self, name: str) -> Tensor:
        """A tensor of the module, put together if places have parts of it."""
        if name not in self._cuts:
            return self._files[0].whole(name)
        return torch.cat([each.whole(name) for each in self._files], dim=self._cuts[name])

    def shape(self, name: str) -> torch.Size:
        return torch.Size(joined([list(each.shape(name)) for each in self._files], self._cuts.get(name)))

    def numel(self, name: str) -> int:
        return self.shape(name).numel()

    def dtype(self, name: str) -> torch.dtype:
        return self._files[0].dtype(name)


class Merged:
    """All places of a tag whose files have been verified, as `Checkpoint` is one."""

    def __init__(self, folder: Path, manifest: Manifest, *, unpickle: bool = False) -> None:
        """Raises ValueError if the manifest does not say how parts of a tensor are put together."""
        self._places = [
            Checkpoint(folder, manifest, number, unpickle=unpickle) for number in range(len(manifest.places))
        ]
        self.folder, self.manifest, self.place = folder, manifest, manifest.places[0]
        unknown = [name for name, dimension in self.place.cuts.items() if dimension is None]
        if unknown:
            raise ValueError(
                f"{folder / NAME}: {naming(unknown)}: received parts of {len(self._places)} model-parallel "
                "ranks that are fused or not described, allowed: tensors cut once, along a known dimension "
                "(AutoTP's, or with Megatron's partition_dim)"
            )
        self._cuts = {name: each for name, each in self.place.cuts.items() if each is not None}
        self.model_files = MergedFiles([each.model_files for each in self._places], self._cuts)
        self.parameters = dict(self._parameters())

    def _parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The trained parameters, in the model's order; a rank may have nothing of one."""
        trained = [each.parameters for each in self._places]
        for name in dict.fromkeys(name for place in trained for name in place):
            first = next(place[name] for place in trained if name in place)
            shapes = [list(place[name].shape) for place in trained if name in place]
            yield name, first.model_copy(update={"shape": joined(shapes, self._cuts.get(name)), "blocks": []})

    def states(self, name: str) -> States:
        """A trained parameter's states, whole."""
        parts = [each for each in self._places if name in each.parameters]
        if name not in self._cuts:
            return parts[0].states(name)
        by_place = [
            [vector.view(each.parameters[name].shape) for vector in each.states(name)] for each in parts
        ]
        master, exp_avg, exp_avg_sq = (
            torch.cat(tensors, dim=self._cuts[name]).view(-1) for tensors in zip(*by_place, strict=True)
        )
        return master, exp_avg, exp_avg_sq

    @property
    def progress(self) -> Progress:
        return self._places[0].progress

    @property
    def module(self) -> dict[str, Any]:
        """The model's state_dict at the first place."""
        return self.model_files.module

    @property
    def model_file(self) -> dict[str, Any]:
        """The contents of DeepSpeed's model file of the first place."""
        return self._places[0].model_file

    def whole_model_file(self) -> dict[str, Any]:
        """DeepSpeed's model file as one of a model that was not split."""
        content = {key: value for key, value in self.model_file.items() if key != LAYOUT}
        module = {name: self._entry(name, value) for name, value in self.module.items()}
        shapes = {name: torch.Size(each.shape) for name, each in self.parameters.items()}
        whole = {**content, "module": module, "param_shapes": [shapes], "mp_world_size": 1}
        frozen = content.get(FRAGMENTS)
        if frozen is not None:
            whole[FRAGMENTS] = {name: self._entry(name, value) for name, value in frozen.items()}
            whole[FROZEN_SHAPES] = {name: each.shape for name, each in whole[FRAGMENTS].items()}
        return whole

    def _entry(self, name: str, value: Any) -> Any:
        return self.model_files.whole(name) if name in self.model_files else value


def joined(shapes: Sequence[list[int]], dimension: int | None) -> list[int]:
    """The shape of a tensor whose parts have these shapes; None: each is the tensor."""
    if dimension is None:
        return shapes[0]
    whole = list(shapes[0])
    whole[dimension] = sum(shape[dimension] for shape in shapes)
    return whole


Whole = Checkpoint | Merged


def open_whole(folder: Path, manifest: Manifest, *, unpickle: bool = False) -> Whole:
    """The whole model of a tag, however many ranks it was split over."""
    if len(manifest.places) == 1:
        return Checkpoint(folder, manifest, unpickle=unpickle)
    return Merged(folder, manifest, unpickle=unpickle)


def others(checkpoint: Whole) -> list[str]:
    """Names of what model files hold besides trained parameters: buffers, frozen ones, names of tied ones."""
    held = checkpoint.model_files
    return [name for name in checkpoint.module if name not in checkpoint.parameters and name in held]
