"""Reading states of stock DeepSpeed: its ZeRO 1 and 2 optimizer files, and universal checkpoints.

Both hold FP32 vectors, which are mapped and read a slice at a time. Of classes they name DeepSpeed's
loss scalers and a few records only, so they too are read without unpickling anything else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fp8.compat import STATE_CLASSES
from ds_fp8.zero_fp8.checkpoint import LOSS_SCALER_STATE, Progress
from ds_fp8.zero_fp8.convert import Values
from ds_fp8.zero_fp8.manifest import OPTIMIZER_FILE, Parameter
from ds_fp8.zero_fp8.native import load_plain

HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "bias_correction")
STATE_FILES = ("fp32", "exp_avg", "exp_avg_sq")
OURS = "ds_fp8"  # key of a universal checkpoint's optimizer_state.pt: counters of ours


def load_stock(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's optimizer."""
    with torch.serialization.safe_globals(list(STATE_CLASSES)):
        return load_plain(path)


def optimizer_files(folder: Path) -> dict[int, Path]:
    """DeepSpeed's optimizer files by rank."""
    found = ((OPTIMIZER_FILE.search(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def is_native(path: Path) -> bool:
    """Whether an optimizer file is ours."""
    state = load_stock(path).get("optimizer_state_dict", {}).get("base_optimizer_state", {})
    return "fp8" in state


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter in one rank's vectors."""

    rank: int
    group: int
    start: int  # in the vectors
    elements: slice  # of the parameter


class Stock:
    """A folder of stock DeepSpeed's ZeRO 1 or 2."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the files are not a whole set of a kind that is known."""
        self._paths = list(optimizer_files(folder).values())
        if not self._paths:
            raise ValueError(f"{folder}: no optimizer files of ZeRO 1 or 2")
        self._files = [self._load(path) for path in self._paths]
        count = self._files[0].get("partition_count")
        ranks = max(count) if isinstance(count, list) else count
        if ranks != len(self._files):
            raise ValueError(f"{folder}: received {len(self._files)} optimizer files, expected {ranks}")
        self.fragments = self._find_fragments()

    @staticmethod
    def _load(path: Path) -> dict[str, Any]:
        file: dict[str, Any] = load_stock(path).get("optimizer_state_dict", {})
        states = file.get("base_optimizer_state")
        if not isinstance(states, dict) or "param_slice_mappings" not in file:
            raise ValueError(f"{path}: not states of ZeRO 1 or 2 as DeepSpeed 0.19 writes them by default")
        for group in range(len(file["param_slice_mappings"])):
            found = states["state"].get(group, {}).keys()
            if not {"exp_avg", "exp_avg_sq"} <= found:
                raise ValueError(f"{path}: received states {sorted(found)}, expected exp_avg and exp_avg_sq")
        return file

    def _find_fragments(self) -> dict[str, list[Fragment]]:
        """A parameter's fragments follow each other from rank to rank."""
        fragments: dict[str, list[Fragment]] = {}
        for rank, file in enumerate(self._files):
            for group, mapping in enumerate(file["param_slice_mappings"]):
                for name, address in mapping.items():
                    known = fragments.setdefault(name, [])
                    first = known[-1].elements.stop if known else 0
                    elements = slice(first, first + address.numel)
                    known.append(Fragment(rank, group, address.start, elements))
        return fragments

    def check(self, ours: Mapping[str, Parameter]) -> None:
        """Refuse, by a ValueError, states of other parameters."""
        path = self._paths[0]
        check_names(path, self.fragments, ours)
        check_groups(path, self._groups, ours)
        for name, parameter in ours.items():
            received = self.fragments[name][-1].elements.stop, self.fragments[name][0].group
            expected = torch.Size(parameter.shape).numel(), parameter.group
            if received != expected:
                raise ValueError(
                    f"{path}: elements and param group of {name}: received {received}, expected {expected}"
                )

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._files[0]["base_optimizer_state"]["param_groups"]
        return groups

    @property
    def progress(self) -> Progress:
        file = self._files[0]
        step = file["base_optimizer_state"]["state"][0].get("step", self._groups[0].get("step", 0))
        scaler = vars(file["loss_scaler"]) if "loss_scaler" in file else {}
        return foreign_progress(int(step), scaler, self._groups)

    def values(self, name: str, elements: slice) -> Values:
        """States of some elements of a parameter."""
        return Values.of(*(torch.cat(self._cut(name, elements, vectors)) for vectors in _VECTORS))

    def _cut(
        self, name: str, elements: slice, vector: Callable[[dict[str, Any], int], Tensor]
    ) -> list[Tensor]:
        parts = []
        for each in self.fragments[name]:
            low, high = max(elements.start, each.elements.start), min(elements.stop, each.elements.stop)
            if low < high:
                first = each.start + low - each.elements.start
                parts.append(vector(self._files[each.rank], each.group)[first : first + high - low])
        return parts


def _master(file: dict[str, Any], group: int) -> Tensor:
    vector: Tensor = file["single_partition_of_fp32_groups"][group]
    return vector


def _exp_avg(file: dict[str, Any], group: int) -> Tensor:
    vector: Tensor = file["base_optimizer_state"]["state"][group]["exp_avg"]
    return vector


def _exp_avg_sq(file: dict[str, Any], group: int) -> Tensor:
    vector: Tensor = file["base_optimizer_state"]["state"][group]["exp_avg_sq"]
    return vector


_VECTORS = (_master, _exp_avg, _exp_avg_sq)


class Universal:
    """A universal checkpoint, DeepSpeed's or ours."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder holds none."""
        self.folder = folder / "zero"
        self._common = load_stock(self.folder / "optimizer_state.pt")
        self._opened: tuple[str, list[Tensor]] = ("", [])

    def check(self, ours: Mapping[str, Parameter]) -> None:
        """Refuse, by a ValueError, states of other parameters."""
        check_groups(self.folder / "optimizer_state.pt", self._common["param_groups"], ours)
        for name, parameter in ours.items():
            for key, tensor in zip(STATE_FILES, self._tensors(name), strict=True):
                if list(tensor.shape) != parameter.shape:
                    raise ValueError(
                        f"{self._path(name, key)}: received shape {list(tensor.shape)}, "
                        f"expected {parameter.shape}"
                    )

    @property
    def progress(self) -> Progress:
        groups = self._common["param_groups"]
        if OURS in self._common:
            return Progress(param_groups=groups, **self._common[OURS])
        step = torch.load(next(self.folder.rglob("step.pt")), weights_only=True)
        scaler = vars(self._common["loss_scaler"]) if "loss_scaler" in self._common else {}
        return foreign_progress(int(step), scaler, groups)

    def values(self, name: str, elements: slice) -> Values:
        """States of some elements of a parameter."""
        return Values.of(*(tensor.view(-1)[elements] for tensor in self._tensors(name)))

    def other(self, name: str) -> Tensor | None:
        """A buffer or frozen parameter, where the converter has put it there."""
        path = self._path(name, "fp32")
        return _param(path) if path.exists() else None

    def _tensors(self, name: str) -> list[Tensor]:
        if self._opened[0] != name:
            self._opened = (name, [_param(self._path(name, key)) for key in STATE_FILES])
        return self._opened[1]

    def _path(self, name: str, key: str) -> Path:
        return self.folder / name / f"{key}.pt"


def _param(path: Path) -> Tensor:
    tensor = load_plain(path).get("param")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: holds no tensor")
    return tensor


def foreign_progress(step: int, scaler: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Progress:
    return Progress(
        steps=step,
        clamp_squares=None,
        loss_scaler={key: scaler[key] for key in LOSS_SCALER_STATE if key in scaler},
        param_groups=[{key: group[key] for key in HYPERPARAMETERS if key in group} for group in groups],
    )


def check_names(path: Path, found: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    missing, extra = sorted(ours.keys() - found.keys()), sorted(found.keys() - ours.keys())
    if missing or extra:
        raise ValueError(
            f"{path}: other parameters were trained: without {missing[:3]}, with {extra[:3]} (of "
            f"{len(missing)} and {len(extra)})"
        )


def check_groups(path: Path, found: Sequence[Any], ours: Mapping[str, Parameter]) -> None:
    expected = 1 + max(each.group for each in ours.values())
    if len(found) != expected:
        raise ValueError(f"{path}: received {len(found)} param groups, expected {expected}")
