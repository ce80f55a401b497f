"""Weights of products in C++: the reference's bits, on any threads and instruction set."""

import pytest
import torch
from cpu_support import each_isa, running
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import CPU
from product_checks import KINDS, WITH_BAD, Weight, check_runs, check_weight, matrix

from ds_fp8.ops.product_backend import cpu_products

OURS = cpu_products()
SHAPES = ((1, 16), (128, 128), (208, 272), (300, 528))
each_kind = pytest.mark.parametrize(
    "kinds", [("normal",), ("denormal", "zero"), KINDS, WITH_BAD], ids=["normal", "denormal", "finite", "all"]
)


@each_isa
@each_kind
@pytest.mark.parametrize("threads", [1, 3])
def test_weights(isa: str, kinds: tuple[str, ...], threads: int) -> None:
    with running(isa, threads):
        for seed, (rows, columns) in enumerate(SHAPES):
            weight = Weight.of(matrix(rows, columns, kinds, seed))
            check_runs(OURS, weight, [], CPU)
            check_runs(OURS, weight, [rows * columns // 3 + 1, rows * columns // 2], CPU)
            check_weight(OURS, weight, CPU)


@each_isa
@settings(deadline=None, derandomize=True, max_examples=40)
@given(cuts=st.lists(st.integers(0, 144 * 208), max_size=6))
def test_runs_of_elements(isa: str, cuts: list[int]) -> None:
    with running(isa):
        check_runs(OURS, Weight.of(matrix(144, 208, KINDS)), cuts, CPU)


def test_tiles_beside_a_run_are_left_alone() -> None:
    """Also those in its row of tiles, of which it has no element."""
    exponents = torch.zeros(3, 2, dtype=torch.uint8)
    OURS.find_exponents(torch.zeros(40, dtype=torch.bfloat16), 130 * 256 + 140, 256, exponents)
    assert exponents.tolist() == [[0, 0], [0, 1], [0, 0]]
