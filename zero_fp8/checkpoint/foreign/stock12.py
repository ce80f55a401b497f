"""Reading the optimizer files of stock DeepSpeed's ZeRO 1 and 2.

A rank's file holds one vector of each state per param group, and where the parameters' fragments lie in it.
All of that is checked when the files are opened, so that reading a slice cannot fail half-way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fp8.compat import fragment_address
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
from ds_fp8.zero_fp8.checkpoint.manifest import Parameter


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter in one rank's vectors."""

    rank: int
    group: int
    start: int  # in the vectors
    elements: slice  # of the parameter


class Stock12:
    """A folder of stock DeepSpeed's ZeRO 1 or 2."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if the files are not a whole set of a kind that is known."""
        files = open_optimizer_files(folder, "ZeRO 1 or 2")
        self._steps = {(file.path, step) for file in files for step in _check_vectors(file)}
        self._folder = folder
        self._files = [file.value for file in files]
        self.fragments = self._find_fragments()

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

    def check(self, parameters: Mapping[str, Parameter]) -> None:
        """Refuse, by a ValueError, states of other parameters than those of the run."""
        path = self._folder
        check_steps(path, self._steps)
        check_names(path, self.fragments, parameters)
        check_groups(path, self._groups, parameters)
        for name, parameter in parameters.items():
            saved = self.fragments[name][-1].elements.stop, self.fragments[name][0].group
            expected = torch.Size(parameter.shape).numel(), parameter.group
            if saved != expected:
                raise ValueError(
                    f"{path}: elements and param group of {name}: received {saved}, expected {expected}"
                )

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._files[0]["base_optimizer_state"]["param_groups"]
        return groups

    @property
    def progress(self) -> Progress:
        _, step = next(iter(self._steps))
        return stock_progress(step, self._files[0].get("loss_scaler"), self._groups)

    def values(self, name: str, elements: slice) -> Values:
        """States of some elements of a parameter."""
        return Values.of(*(torch.cat(self._cut(name, elements, vectors)) for vectors in _VECTORS))

    def _cut(
        self, name: str, elements: slice, vector: Callable[[dict[str, Any], int], Tensor]
    ) -> list[Tensor]:
        parts = []
        for fragment in self.fragments[name]:
            held = fragment.elements
            low, high = max(elements.start, held.start), min(elements.stop, held.stop)
            if low < high:
                first = fragment.start + low - held.start
                whole = vector(
                    self._files[fragment.rank], fragment.group
                ).detach()  # masters are saved as trained
                parts.append(whole[first : first + high - low])
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


def _check_vectors(file: Entry) -> list[int]:
    """Refuse a file whose vectors do not hold what it says of them; the step of each param group."""
    if not isinstance(file.at("base_optimizer_state").value, dict) or "param_slice_mappings" not in file:
        raise ValueError(f"{file.path}: not states of ZeRO 1 or 2 as DeepSpeed 0.19 writes them by default")
    states, groups = (file.at("base_optimizer_state").at(key) for key in ("state", "param_groups"))
    count = len(groups.of(list))
    mappings, masters = (
        list(file.at(key).each(count)) for key in ("param_slice_mappings", "single_partition_of_fp32_groups")
    )
    if "loss_scaler" in file:
        check_loss_scaler(file.at("loss_scaler"))
    paddings = [entry.count() for entry in file.at("group_paddings").each(count)]
    steps = []
    for index, (group, mapping, master) in enumerate(zip(groups.each(), mappings, masters, strict=True)):
        check_hyperparameters(group)
        state = states.at(index)
        end = max((_end(mapping.at(name)) for name in mapping.of(dict)), default=0)
        _check_lengths(master, [state.at("exp_avg"), state.at("exp_avg_sq")], end, paddings[index])
        steps.append((state if "step" in state else group).at("step").count())
    return steps


def _end(address: Entry) -> int:
    """The element after a fragment's last, in its vectors."""
    record = address.of(fragment_address)
    start, numel = (
        Entry(address.path, getattr(record, key, None), f"{address.where}.{key}")
        for key in ("start", "numel")
    )
    return start.count() + numel.count()


def _check_lengths(master: Entry, moments: Sequence[Entry], end: int, padding: int) -> None:
    """A group's vectors reach to the end of its last fragment; the moments may have padding after it."""
    numel = master.floats().numel()
    if list(master.value.shape) != [max(numel, end)]:
        raise master.refusal(f"at least {end} numbers in one row, as its fragments say")
    for moment in moments:
        if list(moment.floats().shape) not in ([numel], [numel + padding]):
            raise moment.refusal(f"{numel} numbers in one row, as many as there are masters")
