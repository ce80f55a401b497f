"""FP8 products as Triton kernels: the reference's bits; and what cuBLAS would be given."""

from collections.abc import Callable

import cublas_support
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from product_checks import (
    KINDS,
    SHAPES,
    WITH_BAD,
    Weight,
    check_casts,
    check_runs,
    check_sums,
    check_weight,
    check_weight_runs,
    matrix,
)
from torch import Tensor
from triton_support import CONVERSIONS, DEVICE, conversion

from ds_fp8.ops import cublas, products
from ds_fp8.ops.product_backend import triton_products
from ds_fp8.ops.products import Operand
from ds_fp8.ops.triton.products import casts

OURS = triton_products()
each_kind = pytest.mark.parametrize(
    "kinds", [("normal",), ("denormal", "zero"), KINDS, WITH_BAD], ids=["normal", "denormal", "finite", "all"]
)
each_hardware = pytest.mark.parametrize("hardware", CONVERSIONS)


@each_hardware
@each_kind
def test_casts(kinds: tuple[str, ...], hardware: bool) -> None:
    with conversion(hardware):
        for seed, (tokens, features) in enumerate(SHAPES):
            check_casts(OURS, matrix(tokens, features, kinds, seed), DEVICE)


def test_only_what_is_wanted_is_made() -> None:
    dy = matrix(17, 208, KINDS).to(DEVICE)
    with conversion(hardware=True):
        assert OURS.cast_input(dy, wgrad=False).wgrad is None
        for name in ("dgrad", "wgrad", "bias"):
            found = OURS.cast_gradient(dy, **{each: each == name for each in ("dgrad", "wgrad", "bias")})
            assert [key for key, value in vars(found).items() if value is not None] == [name]


def test_rows_need_not_be_adjacent() -> None:
    wide = matrix(20, 4 * 128, ("normal",)).to(DEVICE)
    with conversion(hardware=True):
        found = OURS.cast_input(wide[:, 128:336], wgrad=True)
        wanted = OURS.cast_input(wide[:, 128:336].contiguous(), wgrad=True)
    assert torch.equal(found.forward.codes.view(torch.uint8), wanted.forward.codes.view(torch.uint8))
    assert found.wgrad is not None
    assert wanted.wgrad is not None
    assert torch.equal(found.wgrad.scales, wanted.wgrad.scales)


def test_padding_behind_scales_of_tiles_is_1() -> None:
    """cuBLAS reads it."""
    with conversion(hardware=True):
        operand = OURS.cast_input(matrix(300, 208, ("normal",)).to(DEVICE), wgrad=True).wgrad
    assert operand is not None
    assert operand.scales.as_strided((2, 4), (4, 1))[:, 3].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("count", [0, 1, 32, 33, 70])
def test_parts_of_sums_are_added(count: int) -> None:
    parts = torch.randn(count, 208, generator=torch.Generator().manual_seed(count)).to(DEVICE)
    with conversion(hardware=True):
        found = casts.sum_parts(parts).cpu()
    assert found.dtype == torch.bfloat16
    check_sums(parts.cpu(), found, error=1e-6)


def test_sums_are_the_same_every_time() -> None:
    dy = matrix(300, 208, ("normal",)).to(DEVICE)
    options = {"dgrad": False, "wgrad": False, "bias": True}
    with conversion(hardware=True):
        first, second = (OURS.cast_gradient(dy, **options).bias for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@each_hardware
@each_kind
def test_weights(kinds: tuple[str, ...], hardware: bool) -> None:
    with conversion(hardware):
        for seed, (rows, columns) in enumerate(((16, 16), (128, 128), (208, 272))):
            weight = Weight.of(matrix(rows, columns, kinds, seed))
            check_runs(OURS, weight, [rows * columns // 3 + 1], DEVICE)
            check_weight(OURS, weight, DEVICE)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(cuts=st.lists(st.integers(0, 144 * 208), max_size=3))
def test_runs_of_elements(cuts: list[int]) -> None:
    with conversion(hardware=True):
        check_runs(OURS, Weight.of(matrix(144, 208, KINDS)), cuts, DEVICE)


def test_tiles_beside_a_run_are_left_alone() -> None:
    exponents = torch.zeros(3, 2, dtype=torch.uint8, device=DEVICE)
    with conversion(hardware=True):
        values = torch.zeros(40, dtype=torch.bfloat16, device=DEVICE)
        OURS.find_exponents(values, 130 * 256 + 140, 256, exponents)
    assert exponents.tolist() == [[0, 0], [0, 1], [0, 0]]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="benchmarks/gpu_products.py compares them there")
@each_hardware
@pytest.mark.parametrize(("cut", "gap"), [(300, 7), (2048, 128)])
def test_many_weights_at_once(hardware: bool, cut: int, gap: int) -> None:
    """Whole words, and not; the third is one tile, the second 1,280 of them."""
    shapes = [(272, 208), (2560, 1024), (16, 32), (272, 256)]
    weights = [Weight.of(matrix(*shape, KINDS, seed)) for seed, shape in enumerate(shapes)]
    with conversion(hardware):
        check_weight_runs(OURS, weights, cut, gap)


Products = Callable[[Operand, Operand, Tensor | None], Tensor]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="cuBLAS itself is compared in benchmarks/gpu_products.py")
@pytest.mark.parametrize("tokens", [0, 1, 17, 300])
@pytest.mark.parametrize(("inner", "outer"), [(528, 208), (16, 272)])
def test_cublas_is_given_what_it_reads(
    monkeypatch: pytest.MonkeyPatch, tokens: int, inner: int, outer: int
) -> None:
    library = cublas_support.install(monkeypatch)
    weight = Weight.of(matrix(outer, inner, ("normal",)))
    bias = matrix(1, outer, ("normal",))[0]
    with conversion(hardware=True):
        x = OURS.cast_input(matrix(tokens, inner, ("normal",), 1), wgrad=True)
        dy = OURS.cast_gradient(matrix(tokens, outer, ("normal",), 2), dgrad=True, wgrad=True, bias=False)
        forward = OURS.expand(weight.codes, weight.exponents)
        dgrad = OURS.transpose(weight.codes, weight.exponents)
    for left, right, added in (
        (x.forward, forward, bias),
        (dy.dgrad, dgrad, None),
        (dy.wgrad, x.wgrad, None),
    ):
        assert left is not None
        assert right is not None
        for _ in range(2):
            assert torch.equal(cublas.multiply(left, right, added), products.multiply(left, right, added))
    assert library.searches == (3 if tokens else 0)
