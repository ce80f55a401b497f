"""`accumulate` in C++ equals the reference bit for bit, norm parts included, on every instruction set."""

from collections.abc import Callable

import pytest
import torch
from cpu_support import CPP, ISAS, each_isa, running
from hypothesis import given, settings
from kernel_checks import (
    WIRES,
    Sum,
    check_accumulate,
    check_every_kind,
    check_half_a_code_below_overflow,
    check_sum,
    each_shard,
    sums,
)
from kernel_support import BLOCK_SIZES, ROW_KINDS, cycled, rows_of

from ds_fp8.ops.formats import E4M3, FP32, Format
from ds_fp8.ops.reduction import norm_square

CPU_WIRES = (*WIRES, FP32)

each_wire = pytest.mark.parametrize("wire", CPU_WIRES, ids=lambda fmt: fmt.name)


def on_every_instruction_set(check: Callable[[], object], threads: int = 1) -> None:
    for isa in ISAS:
        with running(isa, threads):
            check()


@pytest.mark.parametrize("overwrite", [True, False])
@each_shard
@each_wire
def test_every_pair_of_formats(wire: Format, fmt: Format, overwrite: bool) -> None:
    on_every_instruction_set(lambda: check_every_kind(CPP, wire, fmt, overwrite=overwrite))


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("ranks", range(1, 5))
@each_wire
def test_ranks_are_added_in_order(wire: Format, ranks: int, block_size: int, overwrite: bool) -> None:
    """Into FP32, where every order shows; over several batches and a part of one."""
    values = [rows_of(["normal"] * 19, block_size, seed=rank) for rank in range(ranks + 1)]
    on_every_instruction_set(
        lambda: check_accumulate(CPP, values[:-1], values[-1], wire, FP32, overwrite=overwrite)
    )


@each_isa
def test_half_a_code_below_overflow_without_a_scale(isa: str) -> None:
    with running(isa):
        check_half_a_code_below_overflow(CPP)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows", [1, 2, 67])
@each_shard
def test_threads_share_the_rows(fmt: Format, rows: int, threads: int) -> None:
    """Also where there are fewer rows than threads."""
    values = [rows_of(cycled(ROW_KINDS, rows, rank), 64, seed=rank) for rank in range(3)]
    on_every_instruction_set(
        lambda: check_accumulate(CPP, values[:2], values[2], E4M3, fmt, overwrite=False), threads
    )


@each_isa
def test_small_blocks_count_beside_a_large_one(isa: str) -> None:
    """FP32 would lose all of their squares."""
    values = torch.ones(5000, 32)
    values[0] = 2.0**12
    with running(isa):
        parts = check_accumulate(CPP, [values], values, E4M3, E4M3, overwrite=True)
    assert norm_square(parts) == 32 * 2**24 + 32 * 4999


@settings(deadline=None, derandomize=True, max_examples=100)
@given(each=sums(CPU_WIRES))
def test_any_sum(each: Sum) -> None:
    on_every_instruction_set(lambda: check_sum(CPP, each))
