"""C++ launches what Triton compiled and cuBLASLt planned, with the arguments that they take.

Here both are functions of `hopper_support`, which read and write the host's memory; the GPU itself is
compared in benchmarks/gpu_products.py.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import hopper_support
import pytest
import torch
from fp8_weights import hold
from hopper_support import E4M3, Device, cast_gradient, cast_input, learning, same
from torch import Tensor

from ds_fp8.ops import cublas, products
from ds_fp8.ops.hopper import build, functions
from ds_fp8.ops.hopper.functions import LAUNCHES
from ds_fp8.ops.products import Operand, Weight, padded_tokens, scale_shape
from ds_fp8.zero_fp8.products import kernels

ONE_CALL = replace(
    kernels.REFERENCE, name="one call", expand=None, transpose=None, multiply_weight=functions.multiply_weight
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return hopper_support.install(monkeypatch)


@pytest.mark.parametrize("wgrad", [True, False])
@pytest.mark.parametrize("tokens", [1, 17, 2100])
def test_casts_of_inputs(device: Device, monkeypatch: pytest.MonkeyPatch, tokens: int, wgrad: bool) -> None:
    x = torch.randn(tokens, 208, dtype=torch.bfloat16)[:, :160]
    groups = scale_shape(160, padded_tokens(tokens))[1]
    learning(monkeypatch, LAUNCHES.cast_kind(True, 2 if wgrad else 0, False, groups))
    functions.cast_input(x, wgrad=wgrad)
    before = device.launches
    found, wanted = functions.cast_input(x, wgrad=wgrad), cast_input(x, wgrad=wgrad)
    assert device.launches == before + 1
    assert same(found.forward, wanted.forward)
    assert same(found.wgrad, wanted.wgrad)
    assert functions.cast_input(x[:0], wgrad=wgrad).forward.codes.shape == (0, 160)
    functions.cast_input(torch.randn(tokens, 161, dtype=torch.bfloat16)[:, 1:], wgrad=wgrad)
    assert device.launches == before + 1, "neither no tokens nor an odd address"
    device.context = 0
    assert same(functions.cast_input(x, wgrad=wgrad).forward, wanted.forward)
    assert device.launches == before + 1, "a thread that has no context yet leaves the launch to Triton"


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, True)])
def test_casts_of_gradients(
    device: Device, monkeypatch: pytest.MonkeyPatch, wanted: tuple[bool, bool, bool]
) -> None:
    dgrad, wgrad, bias = wanted
    dy, asked = torch.randn(300, 96, dtype=torch.bfloat16), {"dgrad": dgrad, "wgrad": wgrad, "bias": bias}
    learning(monkeypatch, LAUNCHES.cast_kind(dgrad, 1 if wgrad else 0, bias, 4))
    functions.cast_gradient(dy, **asked)
    before = device.launches
    found, expected = functions.cast_gradient(dy, **asked), cast_gradient(dy, **asked)
    assert device.launches == before + 1 + bias
    assert same(found.dgrad, expected.dgrad)
    assert same(found.wgrad, expected.wgrad)
    assert (found.bias is None) == (not bias)
    if found.bias is not None and expected.bias is not None:
        assert torch.equal(found.bias, expected.bias)


def test_sums_wait_for_the_kernel_that_adds_them() -> None:
    """In a process of its own, since what is known stays so."""
    code = """
import hopper_support, pytest, torch
from hopper_support import SHARED, THREADS
from ds_fp8.ops.hopper.functions import LAUNCHES

device = hopper_support.install(pytest.MonkeyPatch())
dy = torch.randn(48, 96).bfloat16()
weight = torch.empty(96, 16).to(torch.float8_e4m3fn), torch.zeros(1, 1, dtype=torch.uint8)
know = lambda kind: LAUNCHES.add_kernel(dy.get_device(), kind, 100 + kind, THREADS, SHARED)
know(LAUNCHES.cast_kind(False, 0, True, 4))
cast = lambda: LAUNCHES.cast(dy, False, 0, True, 7)
backward = lambda: LAUNCHES.differentiate(dy, *weight, None, None, False, False, True, False, 7)
assert (cast(), backward(), device.launches) == ([], [], 0)
know(LAUNCHES.sum_kind())
wanted = dy.float().sum(0).bfloat16()
assert all(torch.equal(*found, wanted) for found in (cast(), backward()))
assert device.launches == 4
"""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shift", [0, 3])
def test_transposes(device: Device, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """A matrix's exponents may begin at any byte of its bucket's; Triton has a kernel for those at 16."""
    codes = torch.randint(0, 127, (272, 160), dtype=torch.uint8).view(E4M3)
    exponents = torch.randint(100, 150, (9,), dtype=torch.uint8)[shift : shift + 6].view(3, 2)
    other = torch.randint(100, 150, (6,), dtype=torch.uint8).view(3, 2)
    kind = LAUNCHES.transpose_kind(exponents.data_ptr(), 4)
    learning(monkeypatch, kind)
    functions.transpose(codes, exponents)
    assert same(functions.transpose(codes, exponents), products.transpose(codes, exponents))
    assert device.launches == 1
    if shift:
        assert kind != LAUNCHES.transpose_kind(other.data_ptr(), 4)
        assert same(functions.transpose(codes, other), products.transpose(codes, other))
    assert LAUNCHES.transpose_kind(other.data_ptr(), 16) < 0


def test_products(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (torch.randn(rows, 160, dtype=torch.bfloat16) for rows in (48, 96))
    cast, weight = cast_input(x, wgrad=True), products.cast_input(w.t().contiguous(), wgrad=True).wgrad
    assert weight is not None
    gradient = cast_gradient(torch.randn(48, 96, dtype=torch.bfloat16), dgrad=False, wgrad=True, bias=False)
    assert gradient.wgrad is not None
    assert cast.wgrad is not None
    bias = torch.randn(96, dtype=torch.bfloat16)
    for left, right, added in (
        (cast.forward, weight, bias),
        (cast.forward, weight, None),
        (gradient.wgrad, cast.wgrad, None),
    ):
        functions.multiply(left, right, added)
        before = device.products
        assert torch.equal(functions.multiply(left, right, added), products.multiply(left, right, added))
        assert device.products == before + 1
    with pytest.raises(ValueError, match="bias: received shape"):
        functions.multiply(cast.forward, weight, torch.zeros(96))
    with pytest.raises(ValueError, match="right scales: received shape"):
        functions.multiply(cast.forward, Operand(weight.codes, weight.scales[:, :1]))
    assert device.products == before + 1


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_product_that_prepares_its_weight(
    device: Device, monkeypatch: pytest.MonkeyPatch, swapped: bool, shift: int
) -> None:
    """One call of C++ for scales or transpose and product; the first call of a kind is made of parts."""
    inputs, outputs = 144 + 16 * swapped + 32 * bool(shift), 272  # what is known of a shape stays so
    values = torch.randn((inputs, outputs) if swapped else (outputs, inputs)).bfloat16()
    weight, x = stored(values, shift), cast_input(torch.randn(37, inputs).bfloat16(), wgrad=False).forward
    prepare = products.transpose if swapped else products.expand
    wanted = products.multiply(x, prepare(*weight), bias := torch.randn(outputs).bfloat16())
    exponents = weight[1]
    kinds = LAUNCHES.expand_kind(exponents.data_ptr()), LAUNCHES.transpose_kind(exponents.data_ptr(), 4)
    learning(monkeypatch, kinds[swapped])
    assert torch.equal(functions.multiply_weight(x, weight, bias, swapped), wanted)
    assert device.products == 0
    plan_of_any_alignment(x, prepare(*weight), bias)
    launched = device.launched()
    assert torch.equal(kernels.multiply(ONE_CALL, x, weight, bias, swapped), wanted)
    assert device.launched() - launched == Counter(kernels=1, products=1)
    assert same((functions.transpose if swapped else functions.expand)(*weight), prepare(*weight))
    assert device.launched() - launched == Counter(kernels=2, products=1)
    assert not LAUNCHES.multiply_weight(*vars(x).values(), weight[0], exponents, bias, not swapped, 7)
    for wrong in (
        (weight[0].t(), exponents),
        (weight[0], exponents.float()),
        (weight[0], exponents[:1]),
    ):
        assert not LAUNCHES.multiply_weight(*vars(x).values(), *wrong, bias, swapped, 7)
    assert not LAUNCHES.multiply_weight(*vars(x).values(), *weight, bias[1:], swapped, 7)
    assert device.launched() - launched == Counter(kernels=2, products=1)


def stored(values: Tensor, shift: int) -> Weight:
    """A matrix whose exponents begin at any byte, as in a bucket."""
    matrix = hold(values)
    room = torch.empty(matrix.exponents.numel() + shift, dtype=torch.uint8)
    exponents = room[shift:].view(matrix.exponents.shape).copy_(matrix.exponents)
    return Weight(matrix.codes, exponents)


def plan_of_any_alignment(left: Operand, right: Operand, bias: Tensor) -> None:
    """The alignment of memory is chance on the host."""
    shape, *plan = cublas.plan_of(left, right, bias).copy().described()
    for alignment in (16, 32, 64, 128, 256):
        LAUNCHES.add_plan([*shape[:-1], alignment], *plan)


def test_python_and_cpp_share_no_descriptor(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the addresses of scales while a product is launched, and each has a lock of its own."""
    given: list[list[int]] = []
    add = LAUNCHES.add_plan.default
    monkeypatch.setattr(LAUNCHES.add_plan, "default", lambda *plan: (given.append(plan[1]), add(*plan)))
    x, w = (cast_input(torch.randn(rows, 176, dtype=torch.bfloat16), wgrad=False) for rows in (16, 32))
    groups = scale_shape(32, 176)
    right = Operand(w.forward.codes, torch.ones(groups))
    functions.multiply(x.forward, right)
    assert device.products == 0
    assert given[0][1] != cublas.plan_of(x.forward, right, None).described()[1][1]


def test_a_library_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "SOURCE", tmp_path / "launches.cpp")
    (tmp_path / "launches.cpp").write_text("#error no\n")
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    said = functions.obstacle()
    assert said is not None
    assert said.startswith(f"launches.cpp cannot be compiled in {tmp_path}")
