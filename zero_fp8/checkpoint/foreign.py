"""Reading universal checkpoints, and what they share with stock DeepSpeed's optimizer files (`stock.py`).

Both hold FP32 vectors, which are mapped and read a slice at a time. Of classes they name DeepSpeed's
loss scalers and a few records only, so they too are read without unpickling anything else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from ds_fp8.compat import STATE_CLASSES, DynamicLossScaler, LossScaler
from ds_fp8.zero_fp8.checkpoint.convert import Values
from ds_fp8.zero_fp8.checkpoint.manifest import Parameter
from ds_fp8.zero_fp8.checkpoint.reading import Entry, in_memory, load_any, load_plain, show
from ds_fp8.zero_fp8.checkpoint.writer import LOSS_SCALER_STATE, Progress, check_hyperparameters

HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "bias_correction")
STATE_FILES = ("fp32", "exp_avg", "exp_avg_sq")
OURS = "ds_fp8"  # key of a universal checkpoint's optimizer_state.pt: counters of ours


def load_stock(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's optimizer."""
    return load_plain(path, STATE_CLASSES)


class Counters(BaseModel):
    """What only we need of a universal checkpoint, beside what stock DeepSpeed reads."""

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

    def check(self, ours: Mapping[str, Parameter]) -> None:
        """Refuse, by a ValueError, states of other parameters."""
        groups = self._common.at("param_groups")
        check_groups(groups.path, groups.of(list), ours)
        for group in groups.each():
            check_hyperparameters(group)
        for name, parameter in ours.items():
            for key, tensor in zip(STATE_FILES, self._tensors(name), strict=True):
                if list(tensor.shape) != parameter.shape:
                    raise ValueError(
                        f"{self._path(name, key)}: received shape {list(tensor.shape)}, "
                        f"expected {parameter.shape}"
                    )
        self.progress = self._find_progress(ours)

    def _find_progress(self, ours: Mapping[str, Parameter]) -> Progress:
        groups = self._common.at("param_groups").value
        if OURS in self._common:
            return self._own_progress(groups, ours)
        steps = {self._step(name): name for name in ours}
        if len(steps) != 1:
            told = ", ".join(f"{step} of {name}" for step, name in steps.items())
            raise ValueError(f"{self.folder}: steps: received {told}, expected the same everywhere")
        scaler = self._common.at("loss_scaler") if "loss_scaler" in self._common else None
        if scaler is not None:
            check_loss_scaler(scaler)
        return foreign_progress(next(iter(steps)), scaler and scaler.value, groups)

    def _own_progress(self, groups: list[dict[str, Any]], ours: Mapping[str, Parameter]) -> Progress:
        """What `universal.write` put beside what stock DeepSpeed reads."""
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
            check_names(place.path, counters.autoscale, ours)
        return Progress(param_groups=in_memory(groups), **counters.model_dump())

    def _step(self, name: str) -> int:
        path = self._path(name, "step")
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


def _param(path: Path) -> Tensor:
    return Entry(path, load_plain(path)).at("param").floats().contiguous()


def check_loss_scaler(scaler: Entry) -> None:
    """Refuse, by a ValueError, what is no loss scaler of DeepSpeed's."""
    found = vars(scaler.of(DynamicLossScaler, LossScaler))
    for key in LOSS_SCALER_STATE:
        if key in found:
            Entry(scaler.path, found[key], f"{scaler.where}.{key}").number()


def foreign_progress(step: int, scaler: Any, groups: Sequence[Mapping[str, Any]]) -> Progress:
    """scaler: DeepSpeed's, None if there was none; the run keeps its own then."""
    found = vars(scaler) if scaler is not None else {}
    return Progress(
        steps=step,
        clamp_squares=None,
        loss_scaler=in_memory({key: found[key] for key in LOSS_SCALER_STATE if key in found}),
        param_groups=[
            in_memory({key: group[key] for key in HYPERPARAMETERS if key in group}) for group in groups
        ],
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
