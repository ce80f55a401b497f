"""Reading the files of stock DeepSpeed's ZeRO 3.

A rank's optimizer file holds one vector of each state per sub-group, in which the rank's slices of the
sub-group's parameters follow each other (`placement.even_slices`); which parameters these are is in the model
files. All of that is checked when the files are opened.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_fp8.zero_fp8.checkpoint.contracts import (
    Progress,
    Values,
    check_groups,
    check_hyperparameters,
    check_names,
)
from ds_fp8.zero_fp8.checkpoint.files import Entry
from ds_fp8.zero_fp8.checkpoint.foreign.stock_files import (
    check_loss_scaler,
    check_steps,
    open_optimizer_files,
    stock_progress,
)
from ds_fp8.zero_fp8.checkpoint.foreign.stock_model import trained_shapes
from ds_fp8.zero_fp8.checkpoint.manifest import Parameter
from ds_fp8.zero_fp8.checkpoint.model_files import ModelFiles
from ds_fp8.zero_fp8.placement.even_slices import slice_of, starts_of

Vector = Callable[[Entry, int], Entry]  # of an optimizer file and a sub-group


@dataclass(frozen=True)
class Slices:
    """Positions of a parameter's slices in every rank's vectors."""

    subgroup: int
    start: int
    shape: list[int]


class Stock3:
    """A folder of stock DeepSpeed's ZeRO 3: states, and weights."""

    def __init__(self, folder: Path, models: ModelFiles) -> None:
        """Raises ValueError if the files are not a whole set of a kind that is known."""
        self._folder = folder
        self._models = models
        self._files = open_optimizer_files(folder, "ZeRO 3")
        self._slices: dict[str, Slices] = {}
        self._steps: set[tuple[Path, int]] = set()
        for subgroup, shapes in enumerate(trained_shapes(models.first)):
            self._find_slices(subgroup, shapes)

    def _find_slices(self, subgroup: int, shapes: Mapping[str, list[int]]) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        starts = starts_of(sizes, len(self._files))
        for (name, shape), start in zip(shapes.items(), starts, strict=False):
            self._slices[name] = Slices(subgroup, start, shape)
        model = self._models.first.path
        for file in self._files:
            self._steps.add((file.path, _check_vectors(file, subgroup, starts[-1], model)))

    def check(self, parameters: Mapping[str, Parameter]) -> None:
        """Refuse, by a ValueError, states of other parameters than those of the run."""
        path = self._folder
        check_names(path, self._slices, parameters)
        check_steps(path, self._steps)
        for file in self._files:
            groups = _optimizer(file).at("param_groups")
            check_groups(file.path, groups.of(list), parameters)
            for group in groups.each():
                check_hyperparameters(group)
            if "loss_scaler" in file:
                check_loss_scaler(file.at("loss_scaler"))
        for name, parameter in parameters.items():
            slices = self._slices[name]
            if slices.shape != parameter.shape:
                expected = f"received {slices.shape}, expected {parameter.shape}"
                raise ValueError(f"{self._models.first.path}: shape of {name}: {expected}")
            number = self._group_of(slices.subgroup)
            if number != parameter.group:
                expected = f"received {number}, expected {parameter.group}"
                raise ValueError(f"{self._files[0].path}: param group of {name}: {expected}")

    def _group_of(self, subgroup: int) -> int | None:
        """The param group that a sub-group is part of."""
        groups = _optimizer(self._files[0]).at("param_groups").each()
        found = [number for number, group in enumerate(groups) if subgroup in group.at("params").of(list)]
        return found[0] if found else None

    @property
    def progress(self) -> Progress:
        file = self._files[0].value
        _, step = next(iter(self._steps))
        return stock_progress(step, file.get("loss_scaler"), file["optimizer_state_dict"]["param_groups"])

    def values(self, name: str, elements: slice) -> Values:
        """States of some elements of a parameter."""
        return Values.of(*(self._cut(name, elements, vector) for vector in (_master, _exp_avg, _exp_avg_sq)))

    def __contains__(self, name: str) -> bool:
        """Whether there are weights of a parameter, trained or frozen."""
        return name in self._slices or name in self._models

    def check_weights(self, name: str, elements: slice) -> None:
        """Refuse, by a ValueError, files that do not hold some elements of a frozen one."""
        if name not in self._slices:
            self._models.check_weights(name, elements)

    def weights(self, name: str, elements: slice) -> Tensor:
        """Masters of some elements of a trained parameter, in FP32, or weights of a frozen one."""
        if name not in self._slices:
            return self._models.weights(name, elements)
        return self._cut(name, elements, _master)

    def _cut(self, name: str, elements: slice, vector: Vector) -> Tensor:
        slices, parts = self._slices[name], []
        numel = torch.Size(slices.shape).numel()
        for rank, file in enumerate(self._files):
            held = slice_of(numel, len(self._files), rank)
            low, high = max(elements.start, held.start), min(elements.stop, held.stop)
            if low < high:
                first = slices.start + low - held.start
                parts.append(vector(file, slices.subgroup).floats()[first : first + high - low])
        return torch.cat(parts)


def _optimizer(file: Entry) -> Entry:
    return file.at("optimizer_state_dict")


def _master(file: Entry, subgroup: int) -> Entry:
    return file.at("fp32_flat_groups").at(subgroup)


def _exp_avg(file: Entry, subgroup: int) -> Entry:
    return _optimizer(file).at("state").at(subgroup).at("exp_avg")


def _exp_avg_sq(file: Entry, subgroup: int) -> Entry:
    return _optimizer(file).at("state").at(subgroup).at("exp_avg_sq")


def _check_vectors(file: Entry, subgroup: int, end: int, model: Path) -> int:
    """Refuse a file whose vectors do not hold a sub-group's slices; the sub-group's step.

    model: the file that says which these are.
    """
    for vector in (_master, _exp_avg, _exp_avg_sq):
        entry = vector(file, subgroup)
        if list(entry.floats().shape) != [end]:
            raise entry.refusal(f"{end} numbers in one row, as many as {model.name} says")
    state = _optimizer(file).at("state").at(subgroup)
    return state.at("step").count()
