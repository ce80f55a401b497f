"""Many weights on a GPU: `ops.weight_runs` in one launch per function.

A table on the device says where the runs are; a program finds its row by its number.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops import weight_runs
from ds_fp8.ops.guards import check_runs, check_vectors
from ds_fp8.ops.triton.launching import launch
from ds_fp8.ops.triton.products.weights import (
    WARPS,
    always,
    encode_tile,
    find_tile,
    tile_rows_of,
)
from ds_fp8.ops.triton.quantize_many import on_device
from ds_fp8.ops.triton.tiles import hardware_fp8
from ds_fp8.ops.weight_runs import Run

WORD = 16  # elements; if all places are multiples of it, a thread moves several at once


@triton.jit
def row_of(rows, count, program, FIELDS: tl.constexpr, LOG_COUNT: tl.constexpr):
    """The row that a program serves: the last of those whose first program is not after it."""
    row = 0
    for halved in tl.static_range(1, LOG_COUNT + 1):
        other = row + (1 << (LOG_COUNT - halved))
        first = tl.load(rows + other * FIELDS, mask=other < count, other=0x7FFFFFFF)
        row = tl.where(first <= program, other, row)
    return rows + row * FIELDS


@triton.jit
def run_of(rows, count, LOG_COUNT: tl.constexpr, WORD: tl.constexpr):
    """A program's tile; of its run first, count, columns, and places of exponents, values and codes."""
    program = tl.program_id(0)
    row = row_of(rows, count, program, 8, LOG_COUNT)
    columns = tl.multiple_of(tl.load(row + 4).to(tl.int32), WORD)
    return (
        program - tl.load(row).to(tl.int32) + tl.load(row + 1).to(tl.int32),
        tl.multiple_of(tl.load(row + 2), WORD),
        tl.multiple_of(tl.load(row + 3), WORD),
        columns,
        tl.load(row + 5),
        tl.multiple_of(tl.load(row + 6), WORD),
        tl.multiple_of(tl.load(row + 7), WORD),
    )


@triton.jit(do_not_specialize=["count"])
def find_runs_kernel(values, exponents, rows, count, LOG_COUNT: tl.constexpr, WORD: tl.constexpr):
    """As `find_kernel`, for all runs."""
    tile, first, elements, columns, place, own, _ = run_of(rows, count, LOG_COUNT, WORD)
    find_tile(values + own, exponents + place, first, elements, columns, tile)


@triton.jit(do_not_specialize=["count"])
def encode_runs_kernel(
    values,
    exponents,
    codes,
    control,
    rows,  # [runs, 8] int64: first program, its tile, then what `run_of` returns
    count,  # of rows
    LOG_COUNT: tl.constexpr,
    WORD: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """As `encode_kernel`, for all runs."""
    if tl.load(control + 1) == 0.0:
        return
    tile, first, elements, columns, place, own, made = run_of(rows, count, LOG_COUNT, WORD)
    encode_tile(
        values=values + own,
        exponents=exponents + place,
        codes=codes + made,
        first=first,
        count=elements,
        columns=columns,
        tile=tile,
        HARDWARE=HARDWARE,
    )


class Table:
    """Rows of whole numbers on the device, each with the number of its first program before them."""

    def __init__(self, rows: Sequence[Sequence[int]], programs: Sequence[int], device: torch.device) -> None:
        """programs: of each row."""
        firsts = accumulate(programs, initial=0)
        self._rows = on_device([(first, *row) for first, row in zip(firsts, rows, strict=False)], device)
        self.programs = sum(programs)

    @property
    def arguments(self) -> dict[str, object]:
        """What kernels take."""
        count = len(self._rows)
        return {"rows": self._rows, "count": count, "LOG_COUNT": (count - 1).bit_length()}


class WeightRuns(weight_runs.WeightRuns):
    """All runs of a bucket; the table is made at the first use."""

    def __init__(self, functions: weight_runs.Functions, runs: Sequence[Run]) -> None:
        super().__init__(functions, [run for run in runs if run.count])
        self._ends = check_runs(self._runs)
        places = [each for run in self._runs for each in (run.first, run.count, run.values, run.codes)]
        places += [run.grid.columns for run in self._runs]
        self._word = WORD if all(each % WORD == 0 for each in places) else 1
        self._tiles: Table | None = None

    def find_exponents(self, values: Tensor, exponents: Tensor) -> None:
        """`ops.weight_runs.WeightRuns.find_exponents`."""
        check_vectors(self._ends, values, exponents)
        self._launch(find_runs_kernel, values, exponents)

    def encode(self, values: Tensor, exponents: Tensor, codes: Tensor, control: Tensor | None = None) -> None:
        """`ops.weight_runs.WeightRuns.encode`."""
        check_vectors(self._ends, values, exponents, codes)
        go = always(values.device) if control is None else control
        hardware = hardware_fp8(values.device)
        self._launch(encode_runs_kernel, values, exponents, codes=codes, control=go, HARDWARE=hardware)

    def _launch(self, kernel: object, values: Tensor, exponents: Tensor, **more: object) -> None:
        if not self._runs:
            return
        if self._tiles is None:
            self._tiles = self._table_of_tiles(values.device)
        launch(
            kernel,
            self._tiles.programs,
            WARPS,
            values=values,
            exponents=exponents,
            WORD=self._word,
            **self._tiles.arguments,
            **more,
        )

    def _table_of_tiles(self, device: torch.device) -> Table:
        rows, programs = [], []
        for run in self._runs:
            columns = run.grid.columns
            first, many = tile_rows_of(run.first, run.count, columns)
            place = run.grid.place.start
            rows.append((first, run.first, run.count, columns, place, run.values, run.codes))
            programs.append(many)
        return Table(rows, programs, device)
