"""`accumulate` as a Triton kernel equals the reference bit for bit, norm parts included."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from kernel_support import rows_of
from triton_support import CONVERSIONS, TRITON, conversion

from ds_fp8.ops.formats import E4M3, FP32, Format
from ds_fp8.ops.triton import reduction as reduction_triton
from ds_fp8.ops.triton import tiles as tiles_triton

TILES = 2  # of a program, in tests that need many: the interpreter pays by the tile, and for empty ones too


@pytest.fixture(scope="module")
def few_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction_triton, "TILES", TILES)
        yield


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("hardware", CONVERSIONS)
@pytest.mark.parametrize("overwrite", [True, False])
@each_shard
@pytest.mark.parametrize("wire", WIRES, ids=lambda fmt: fmt.name)
def test_every_pair_of_formats(wire: Format, fmt: Format, overwrite: bool, hardware: bool) -> None:
    """On more rows than a program has."""
    with conversion(hardware):
        check_every_kind(TRITON, wire, fmt, overwrite=overwrite)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_ranks_are_added_in_order(ranks: int) -> None:
    """With as many tiles a program as there are, and two programs."""
    rows = reduction_triton.TILES * (tiles_triton.PER_WARP // 256) + 3
    values = [rows_of(["normal"] * rows, 256, seed=rank) for rank in range(ranks)]
    old = rows_of(["normal"] * rows, 256, seed=99)
    with conversion(hardware=False):
        check_accumulate(TRITON, values, old, E4M3, FP32, overwrite=False)


def test_half_a_code_below_overflow_without_a_scale() -> None:
    with conversion(hardware=False):
        check_half_a_code_below_overflow(TRITON)


@pytest.mark.usefixtures("few_tiles")
@settings(deadline=None, derandomize=True, max_examples=50)
@given(each=sums(WIRES), hardware=st.sampled_from(CONVERSIONS))
def test_any_sum(each: Sum, hardware: bool) -> None:
    with conversion(hardware):
        check_sum(TRITON, each)
