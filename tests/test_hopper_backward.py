"""C++ makes the backward of a product by one call, with the bits of a cast, a transpose and products."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import hopper_support
import pytest
import torch
from fp8_weights import hold
from hopper_support import Device, cast_and_sum_tiles, cast_gradient, cast_input, learning, same
from torch import Tensor

from ds_fp8.ops import cublas, product_backend, products
from ds_fp8.ops.hopper import functions
from ds_fp8.ops.hopper.functions import LAUNCHES
from ds_fp8.ops.products import CastGradient, Operand, Weight, padded_tokens, scale_shape
from ds_fp8.zero_fp8.product_health import IN_GRAPHS
from ds_fp8.zero_fp8.products import kernels
from ds_fp8.zero_fp8.products.kernels import Kernels, Needs


class Backward(NamedTuple):
    """What gradients are made of; each test has shapes of its own, since what is known stays so."""

    dy: Tensor
    weight: Weight
    x: Operand
    swapped: bool

    @classmethod
    def of(cls, tokens: int, inputs: int, outputs: int, swapped: bool = False) -> "Backward":
        """dy: with a stride, as of a part of q, k and v."""
        matrix = hold(torch.randn((inputs, outputs) if swapped else (outputs, inputs)).bfloat16())
        dy = torch.randn(tokens, outputs + 48).bfloat16()[:, :outputs]
        x = cast_input(torch.randn(tokens, inputs).bfloat16(), wgrad=True).wgrad
        assert x is not None
        return cls(dy, Weight(matrix.codes, matrix.exponents), x, swapped)

    def run(self, by: Kernels, needs: Sequence[bool], **counted: Any) -> tuple[Tensor | None, ...]:
        x = self.x if needs[1] else None
        return kernels.differentiate(by, self.dy, self.weight, x, Needs(*needs), self.swapped, **counted)

    def run_op(self, by: Kernels, needs: Sequence[bool]) -> list[Tensor]:
        operands = vars(self.x).values()
        op: Any = torch.ops.ds_fp8.differentiate
        return list(op(by.name, self.dy, *self.weight, *operands, [*needs], self.swapped))

    def launch(self, *needs: bool) -> list[Tensor]:
        return functions.differentiate(self.dy, self.weight, self.x, needs, self.swapped)


def multiply_anywhere(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """A product that is known from now on at every alignment, which is chance on the host."""
    shape, *plan = cublas.plan_of(left, right, bias).described()
    for alignment in (16, 32, 64, 128, 256):
        LAUNCHES.add_plan([*shape[:-1], alignment], *plan)
    return functions.multiply(left, right, bias)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("by more than one call")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return hopper_support.install(monkeypatch)


@pytest.fixture
def parts(device: Device, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Kernels that make backward of a cast, a transpose and products, and learn their kinds."""

    def cast(dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool) -> tuple[CastGradient, Tensor | None]:
        groups = scale_shape(dy.shape[1], padded_tokens(len(dy)))[1]
        learning(monkeypatch, LAUNCHES.cast_kind(dgrad, int(wgrad), bias, groups))
        return cast_and_sum_tiles(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)

    def transpose(codes: Tensor, exponents: Tensor) -> Operand:
        groups = scale_shape(*codes.shape[::-1])[1]
        learning(monkeypatch, LAUNCHES.transpose_kind(exponents.data_ptr(), groups))
        return products.transpose(codes, exponents)

    def expand(codes: Tensor, exponents: Tensor) -> Operand:
        learning(monkeypatch, LAUNCHES.expand_kind(exponents.data_ptr()))
        return products.expand(codes, exponents)

    monkeypatch.setattr(functions.casts, "cast_and_sum_tiles", cast)
    monkeypatch.setattr(functions.weights, "transpose", transpose)
    monkeypatch.setattr(functions.weights, "expand", expand)
    monkeypatch.setattr(functions, "obstacle", lambda: None)
    launched, _ = product_backend.by_way("cublas", product_backend.REFERENCE)
    assert launched.differentiate is functions.differentiate
    return Kernels.of("parts", replace(launched, differentiate=None), multiply_anywhere)


def whole(parts: Kernels, **instead: Any) -> Kernels:
    """Kernels that make backward by one call, and otherwise of `instead`."""
    name = f"whole, {sorted(instead)} {[id(each) for each in instead.values()]}"
    return replace(parts, name=name, differentiate=functions.differentiate, **instead)


ONLY = {"cast_gradient": refuse, "transpose": refuse, "expand": refuse, "multiply": refuse}


@pytest.mark.parametrize(
    ("tokens", "inputs", "swapped"), [(48, 112, False), (37, 128, False), (64, 144, True), (1, 176, True)]
)
def test_backward_by_one_call(
    device: Device, parts: Kernels, tokens: int, inputs: int, swapped: bool
) -> None:
    """With the bits, shapes and strides of a backward of parts, and the same launches."""
    given = Backward.of(tokens, inputs, 80, swapped)
    for needs in (Needs(*each) for each in product([True, False], repeat=3) if any(each)):
        given.run(parts, needs)
        before = device.launched()
        wanted = given.run(parts, needs)
        by_parts = device.launched() - before
        found = given.run(whole(parts, **ONLY), needs)
        assert device.launched() - before == by_parts + by_parts
        assert [each is not None for each in found] == [*needs]
        listed = [each for each in wanted if each is not None]
        of_op = given.run_op(whole(parts, **ONLY), needs)
        for results in ([each for each in found if each is not None], of_op):
            for got, right in zip(results, listed, strict=True):
                assert (got.dtype, got.shape, got.stride()) == (right.dtype, right.shape, right.stride())
                assert torch.equal(got, right)


def test_a_backward_with_an_unknown_part_is_made_of_parts(device: Device, parts: Kernels) -> None:
    """Its kinds are then known. Groups of 16 tiles of tokens and of outputs have kernels of their own."""
    given, needs = Backward.of(1930, 16, 1952), Needs(True, True, True)
    cast = cast_gradient(given.dy, dgrad=True, wgrad=True, bias=True)
    turned = products.transpose(*given.weight)
    assert cast.dgrad is not None
    assert cast.wgrad is not None
    for learn in (
        lambda: parts.cast_gradient(given.dy, dgrad=True, wgrad=True, bias=True),
        lambda: parts.transpose(*given.weight),
        lambda: parts.multiply(cast.dgrad, turned, None),
        lambda: parts.multiply(cast.wgrad, given.x, None),
    ):
        assert given.launch(*needs) == []
        assert device.launches == device.products == 0, "nothing is launched in vain"
        learn()
        device.launches = device.products = 0
    assert len(given.launch(*needs)) == 3
    other = Backward.of(1930, 32, 1952)
    wanted = other.run(replace(parts, name="unknown", multiply=products.multiply), needs)
    for by in (whole(parts), whole(parts, **ONLY)):
        for got, right in zip(other.run(by, needs), wanted, strict=True):
            assert got is not None
            assert right is not None
            assert torch.equal(got, right)


def test_a_backward_in_another_layout(device: Device, parts: Kernels) -> None:
    given = Backward.of(48, 192, 80)
    given.run(parts, Needs(True, True, True))
    assert len(given.launch(True, True, False)) == 2
    for wrong in (
        given._replace(dy=given.dy.float()),
        given._replace(dy=given.dy[:0]),
        given._replace(dy=given.dy.t().contiguous().t()),
        given._replace(x=None),
        given._replace(x=Operand(given.x.codes, given.x.scales[:, :1])),
        given._replace(weight=Weight(given.weight.codes.t(), given.weight.exponents)),
        given._replace(weight=Weight(given.weight.codes, given.weight.exponents.float())),
    ):
        assert wrong.launch(True, True, False) == []


def test_a_backward_whose_cast_counts_is_made_of_parts(
    parts: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, needs, casts = Backward.of(37, 208, 80), Needs(True, True, True), []
    counting = replace(parts, name="counting", differentiate=refuse)
    wanted = given.run(parts, needs)
    found = [given.run(counting, needs, count=casts.append)]
    monkeypatch.setattr(IN_GRAPHS, "gradient", lambda *_: casts.append)
    found.append(given.run_op(counting, needs))
    for each in found:
        assert all(map(torch.equal, each, wanted))
    dgrad = cast_gradient(given.dy, dgrad=True, wgrad=True, bias=True).dgrad
    assert [same(each.dgrad, dgrad) for each in casts] == [True, True]
