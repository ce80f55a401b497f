"""`ds_fp8 estimate --fits`: the largest model by number of GPUs, memory per GPU, and method."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from ds_fp8.config.ds_config import STAGES
from ds_fp8.estimate.methods import STOCK, WEIGHT, Method, largest, levels
from ds_fp8.estimate.runs import Run, model_of_size, run_at_defaults
from ds_fp8.output import in_units, show_json, show_line, show_table
from ds_fp8.zero_fp8.recipe import Offload

GB = 10**9
GPUS = (1, 2, 8)
MEMORIES = (24, 48, 80, 141)  # GB: RTX 4090, L40S, A100 and H100, H200
STATES_AWAY = Offload("stream")
# Options of `estimate` that this table decides itself.
NOT_ALLOWED = ("trainable", "opt_level", "tensor_parallel", "offload", "config")


@dataclass(frozen=True)
class Fit:
    """The largest model of one cell of the table."""

    stage: int
    gpus: int
    memory: int  # bytes per GPU
    method: str
    parameters: int | None  # None if no run is so


def show_fits(arguments: argparse.Namespace) -> None:
    for option in NOT_ALLOWED:
        if getattr(arguments, option) not in (None, False):
            raise ValueError(f"--{option.replace('_', '-')}: not allowed with --fits")
    stages = (arguments.stage,) if arguments.stage else STAGES[1:]
    gpus = (arguments.gpus,) if arguments.gpus else GPUS
    tables = {
        stage: list(_fits([run_at_defaults(each, stage, arguments.micro_steps or 1) for each in gpus]))
        for stage in stages
    }
    if arguments.json:
        show_json({"fits": [vars(each) for table in tables.values() for each in table]})
        return
    for stage, table in tables.items():
        show_line(f"The largest model that fits, in parameters, without activations: ZeRO {stage}")
        names = [method.name for method in _methods()]
        show_table(("GPUs", "GB per GPU", *names), _rows(table, len(names)))


def _methods() -> list[Method]:
    here, away = levels(), levels(STATES_AWAY)
    return [STOCK, here["O2"], here["O2+"], here["O3"], away["O2+"], away["O3"]]


def _fits(runs: list[Run]) -> Iterator[Fit]:
    for run in runs:
        for memory in (each * GB for each in MEMORIES):
            for method in _methods():
                yield Fit(run.stage, run.gpus, memory, method.name, _largest(method, run, memory))


def _largest(method: Method, run: Run, memory: int) -> int | None:
    """None if the method refuses a model whose weights alone fill the GPU."""
    if method.refusal(model_of_size(memory // WEIGHT, run), run):
        return None
    return largest(method, run, memory)


def _rows(table: list[Fit], width: int) -> Iterator[tuple[object, ...]]:
    """A row per number of GPUs and memory, from fits in the order of `_fits`."""
    for start in range(0, len(table), width):
        row = table[start : start + width]
        counts = (None if each.parameters is None else in_units(each.parameters) for each in row)
        yield (row[0].gpus, row[0].memory // GB, *counts)
