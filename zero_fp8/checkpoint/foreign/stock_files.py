"""The files of stock DeepSpeed's checkpoints, whatever the stage.

Of classes the files name DeepSpeed's loss scalers and a few records only, so they are read without unpickling
anything else. Here, and for tags of version 1, names of files are DeepSpeed's own: no manifest lists them.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_fp8.compat import STATE_CLASSES, DynamicLossScaler, LossScaler
from ds_fp8.zero_fp8.checkpoint import tags
from ds_fp8.zero_fp8.checkpoint.contracts import LOSS_SCALER_STATE, Progress
from ds_fp8.zero_fp8.checkpoint.files import Entry, in_memory, load_plain

OPTIMIZER_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt\Z")
MODEL_FILE = re.compile(r"mp_rank_\d+_model_states\.pt\Z")
RANKS_MODEL_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt\Z")  # of ZeRO 3
FIRST_MODEL_FILE = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "bias_correction")


def optimizer_files(folder: Path) -> dict[int, Path]:
    """DeepSpeed's optimizer files by rank. Raises ValueError for two of one rank."""
    return _by_rank(folder, OPTIMIZER_FILE)


def model_files(folder: Path, *, universal: bool) -> tuple[list[Path], list[Path]]:
    """DeepSpeed's model files: one per rank of model parallelism, and those of ZeRO 3, one per rank.

    Raises ValueError if there are none, or several where one is expected. universal: of such a checkpoint,
    which may have both.
    """
    whole = sorted(path for path in folder.iterdir() if MODEL_FILE.match(path.name))
    by_rank = _by_rank(folder, RANKS_MODEL_FILE)
    expected = folder / FIRST_MODEL_FILE[0 if whole or not by_rank else 1]
    if expected not in (*whole, *by_rank.values()):
        raise ValueError(f"{expected}: missing: the folder {tags.contents(folder)}")
    if list(by_rank) != list(range(len(by_rank))):
        raise ValueError(f"{folder}: received model files of ranks {list(by_rank)}, expected those of all")
    if not universal and len(whole) + bool(by_rank) > 1:
        names = ", ".join(path.name for path in (*whole, *by_rank.values()))
        alone = f"{expected.name} alone" if expected in whole else "those of ZeRO 3 alone"
        raise ValueError(f"{folder}: received {names}, expected {alone}")
    return whole, list(by_rank.values())


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    paths: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.search(path.name)
        if match and paths.setdefault(int(match[1]), path) != path:
            other = paths[int(match[1])].name
            raise ValueError(f"{path}: received {other} as well, expected one file of rank {match[1]}")
    return dict(sorted(paths.items()))


def load_stock(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's optimizer."""
    return load_plain(path, STATE_CLASSES)


def open_optimizer_files(folder: Path, stages: str) -> list[Entry]:
    """The contents of each rank's optimizer file. Raises ValueError if the set of files is not complete.

    stages: those that the folder is of, as an error names them.
    """
    paths = optimizer_files(folder)
    if not paths:
        raise ValueError(f"{folder}: no optimizer files of {stages}")
    files = [Entry(path, load_stock(path)).at("optimizer_state_dict") for path in paths.values()]
    for file in files:
        _check_count(file, list(paths))
    return files


def holds_our_states(path: Path) -> bool:
    """Whether an optimizer file was written with FP8."""
    file = Entry(path, load_stock(path)).at("optimizer_state_dict")
    return "base_optimizer_state" in file and "fp8" in file.at("base_optimizer_state").of(dict, list)


def check_loss_scaler(scaler: Entry) -> None:
    """Refuse, by a ValueError, what is no loss scaler of DeepSpeed's."""
    state = vars(scaler.of(DynamicLossScaler, LossScaler))
    for key in LOSS_SCALER_STATE:
        if key in state:
            Entry(scaler.path, state[key], f"{scaler.where}.{key}").number()


def stock_progress(step: int, scaler: Any, groups: Sequence[Mapping[str, Any]]) -> Progress:
    """scaler: DeepSpeed's, None if there was none; the run keeps its own then."""
    state = vars(scaler) if scaler is not None else {}
    return Progress(
        steps=step,
        clamp_squares=None,
        loss_scaler=in_memory({key: state[key] for key in LOSS_SCALER_STATE if key in state}),
        param_groups=[
            in_memory({key: group[key] for key in HYPERPARAMETERS if key in group}) for group in groups
        ],
    )


def _check_count(file: Entry, ranks: list[int]) -> None:
    """A file that knows of as many files as there are."""
    count = file.at("partition_count")
    several = isinstance(count.value, list | tuple) and len(count.value) > 0
    expected = max(entry.count() for entry in count.each()) if several else count.count()
    if ranks != list(range(expected)):
        raise ValueError(
            f"{file.path}: received optimizer files of ranks {ranks}, expected those of all {expected} ranks"
        )


def check_steps(path: Path, steps: Collection[tuple[Path, int]]) -> None:
    """Refuse, by a ValueError, states of several steps; steps: of each file."""
    if len({step for _, step in steps}) != 1:
        received = ", ".join(sorted({f"{step} in {file.name}" for file, step in steps}))
        raise ValueError(f"{path}: steps: received {received}, expected the same everywhere")
