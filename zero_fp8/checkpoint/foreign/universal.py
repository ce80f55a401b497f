"""Universal checkpoints: reading DeepSpeed's and ours, and writing a checkpoint of ours as one.

`zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt` hold whole FP32 tensors, which are mapped and read one
slice at a time, `zero/optimizer_state.pt` the hyperparameters, and DeepSpeed's model file lies beside them.
Where ZeRO 3 was converted they are vectors, and the step is in `zero/optimizer_state.pt`.
Stock DeepSpeed loads what we write at any world size, and so do we; what only we need is under a key of its
own that stock DeepSpeed passes over.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from ds_fp8.zero_fp8.checkpoint import tags
from ds_fp8.zero_fp8.checkpoint.contracts import (
    Progress,
    Values,
    check_groups,
    check_hyperparameters,
    check_names,
)
from ds_fp8.zero_fp8.checkpoint.files import Entry, in_memory, load_any, new_folder, save, show
from ds_fp8.zero_fp8.checkpoint.foreign.stock_files import (
    FIRST_MODEL_FILE,
    check_loss_scaler,
    load_stock,
    stock_progress,
)
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest, Parameter
from ds_fp8.zero_fp8.checkpoint.model_files import ModelFiles
from ds_fp8.zero_fp8.checkpoint.reader import is_extra_state
from ds_fp8.zero_fp8.checkpoint.whole.merged import Merged, Whole, others

STATE_FILES = ("fp32", "exp_avg", "exp_avg_sq")
SHARED = "optimizer_state_dict"  # key of what parameters have alike, where ZeRO 3 looks
OURS = "ds_fp8"  # key of a universal checkpoint's optimizer_state.pt: counters of ours


# Reading


class Counters(BaseModel):
    """Entries of a universal checkpoint that ds_fp8 reads and stock DeepSpeed ignores."""

    model_config = ConfigDict(frozen=True, strict=True)

    steps: NonNegativeInt
    clamp_squares: list[float | None]
    loss_scaler: dict[str, int | float]
    autoscale: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}


class Universal:
    """A universal checkpoint, DeepSpeed's or ours."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if the folder holds none."""
        self.folder = folder / "zero"
        path = self.folder / "optimizer_state.pt"
        self._common = Entry(path, load_stock(path))
        self._opened: tuple[str, list[Tensor]] = ("", [])

    def check(self, parameters: Mapping[str, Parameter]) -> None:
        """Refuse, by a ValueError, states of other parameters than those of the run."""
        groups = self._common.at("param_groups")
        check_groups(groups.path, groups.of(list), parameters)
        for group in groups.each():
            check_hyperparameters(group)
        for name, parameter in parameters.items():
            for key, tensor in zip(STATE_FILES, self._tensors(name), strict=True):
                if list(tensor.shape) not in (parameter.shape, [torch.Size(parameter.shape).numel()]):
                    raise ValueError(
                        f"{self._path(name, key)}: received shape {list(tensor.shape)}, "
                        f"expected {parameter.shape}"
                    )
        self.progress = self._find_progress(parameters)

    def _find_progress(self, parameters: Mapping[str, Parameter]) -> Progress:
        groups = self._common.at("param_groups").value
        if OURS in self._common:
            return self._own_progress(groups, parameters)
        steps = {self._step(name): name for name in parameters}
        if len(steps) != 1:
            received = ", ".join(f"{step} of {name}" for step, name in steps.items())
            raise ValueError(f"{self.folder}: steps: received {received}, expected the same everywhere")
        scaler = self._common.at("loss_scaler") if "loss_scaler" in self._common else None
        if scaler is not None:
            check_loss_scaler(scaler)
        return stock_progress(next(iter(steps)), scaler and scaler.value, groups)

    def _own_progress(self, groups: list[dict[str, Any]], parameters: Mapping[str, Parameter]) -> Progress:
        """The entries of ds_fp8 that `universal.write` has added."""
        place = self._common.at(OURS)
        try:
            counters = Counters.model_validate(place.value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (OURS, *first["loc"])))
            refused = f"{where}: received {show(first['input'])}: {first['msg']}"
            raise ValueError(f"{place.path}: {refused}") from None
        list(place.at("clamp_squares").each(len(groups)))
        if counters.autoscale:
            check_names(place.path, counters.autoscale, parameters)
        return Progress(param_groups=in_memory(groups), **counters.model_dump())

    def _step(self, name: str) -> int:
        path = self._path(name, "step")
        if not path.exists():
            if SHARED not in self._common:
                raise ValueError(f"{path}: missing, and {self._common.path.name} has no {SHARED}")
            return self._common.at(SHARED).at("state").at(0).at("step").count()
        return Entry(path, load_any(path), "step").count()

    def values(self, name: str, elements: slice) -> Values:
        """States of some elements of a parameter."""
        return Values.of(*(tensor.view(-1)[elements] for tensor in self._tensors(name)))

    @property
    def trained(self) -> set[str]:
        """Names of the parameters that have states."""
        return {path.parent.name for path in self.folder.glob("*/exp_avg.pt")}

    def other(self, name: str) -> Entry | None:
        """A buffer or frozen parameter in FP32, if the converter has put it there."""
        path = self._path(name, "fp32")
        return Entry(path, _param(path), "param") if path.exists() else None

    def _tensors(self, name: str) -> list[Tensor]:
        if self._opened[0] != name:
            self._opened = (name, [_param(self._path(name, key)) for key in STATE_FILES])
        return self._opened[1]

    def _path(self, name: str, key: str) -> Path:
        return self.folder / name / f"{key}.pt"


class OtherWeights:
    """Weights of parameters without states: in model files, or in the converter's own."""

    def __init__(self, universal: Universal, models: ModelFiles | None) -> None:
        """models: None if each has a part of the model only."""
        self._universal = universal
        self._models = models

    def __contains__(self, name: str) -> bool:
        in_models = self._models is not None and name in self._models
        return in_models or self._universal.other(name) is not None

    def check_weights(self, name: str, elements: slice) -> None:
        """Refuse, by a ValueError, files that do not hold some elements."""
        if self._models is not None and name in self._models:
            self._models.check_weights(name, elements)

    def weights(self, name: str, elements: slice) -> Tensor:
        """Weights of some elements of a parameter."""
        if self._models is not None and name in self._models:
            return self._models.weights(name, elements)
        other = self._universal.other(name)
        assert other is not None
        return other.floats().view(-1)[elements]


def _param(path: Path) -> Tensor:
    """A parameter as the converter wrote it: whole, or a vector if it comes from ZeRO 3."""
    entry = Entry(path, load_any(path))
    return (entry if isinstance(entry.value, Tensor) else entry.at("param")).floats().contiguous()


# Writing


def write(checkpoint: Whole, out: Path, advance: Callable[[int], None]) -> None:
    """Write the folder `out` and, beside it, `latest_universal`.

    advance: called with the number of elements written. Raises ValueError if `out` exists, or
    `latest_universal` is no file.
    """
    latest = out.parent / tags.LATEST_UNIVERSAL
    if latest.is_dir():
        raise ValueError(f"{latest}: a folder, expected a file or nothing")
    with new_folder(out) as temporary:
        zero = temporary / "zero"
        zero.mkdir()
        for name in checkpoint.parameters:
            advance(_write_states(checkpoint, name, zero / name))
        for name in others(checkpoint):
            if not is_extra_state(name):  # its bytes are in the model file
                (zero / name).mkdir(parents=True)
                save({"param": checkpoint.model_files.whole(name).float()}, zero / name / "fp32.pt")
        save(_common(checkpoint), zero / "optimizer_state.pt")
        _copy_model_files(checkpoint, temporary)
    tags.point(latest, out.name)


def _copy_model_files(checkpoint: Whole, folder: Path) -> None:
    """Copy the model files under every name that DeepSpeed looks for."""
    place = checkpoint.place
    if isinstance(checkpoint, Merged):
        save(checkpoint.whole_model_file(), folder / place.model_file)
    else:
        for name in place.model_files or [place.model_file]:
            shutil.copyfile(checkpoint.folder / name, folder / name)
    for name in FIRST_MODEL_FILE:
        if not (folder / name).exists():
            os.link(folder / place.model_file, folder / name)


def _write_states(checkpoint: Whole, name: str, folder: Path) -> int:
    """Write a trained parameter's states; the number of its elements."""
    states = checkpoint.states(name)
    folder.mkdir(parents=True)  # a name may hold a "/"
    for key, tensor in zip(STATE_FILES, states, strict=True):
        save({"param": tensor.view(checkpoint.parameters[name].shape)}, folder / f"{key}.pt")
    save(_step(checkpoint.manifest), folder / "step.pt")
    return states[0].numel()


def _step(manifest: Manifest) -> Tensor:
    """A step count that torch's optimizers accept as a tensor and DeepSpeed's kernels as a number."""
    return torch.tensor(manifest.steps, dtype=torch.float32)


def _common(checkpoint: Whole) -> dict[str, Any]:
    """Leave out the loss scaler: stock DeepSpeed would take its settings from it and not from its config."""
    progress, manifest = checkpoint.progress, checkpoint.manifest
    groups = [{**group, "params": []} for group in progress.param_groups]
    return {
        SHARED: {"state": {0: {"step": _step(manifest)}}, "param_groups": groups},
        "zero_stage": manifest.zero_stage,
        "partition_count": manifest.world_size,
        "ds_version": manifest.deepspeed_version,
        "param_groups": progress.param_groups,
        OURS: {
            "steps": progress.steps,
            "clamp_squares": progress.clamp_squares,
            "loss_scaler": progress.loss_scaler,
            "autoscale": dict(progress.autoscale),
        },
    }
