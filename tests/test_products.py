"""FP8 products in plain PyTorch: the contract's errors, its padding, and what is the same bit for bit.

A Gaussian's relative error in E4M3 is .0266, so that of a product of two .0376.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_same
from product_checks import KINDS, WITH_BAD, Weight, check_runs, check_sums, matrix, padding_is_neutral
from torch import Tensor

from ds_fp8.ops import cublas, cublas_lt, product_backend, products
from ds_fp8.ops.product_backend import REFERENCE
from ds_fp8.ops.products import Operand, cast_gradient, cast_input, multiply, padded_tokens
from ds_fp8.ops.triton.launching import INTERPRETED

CPU = torch.device("cpu")
SIZES = ((208, 272), (528, 128))  # K, N
each_size = pytest.mark.parametrize(("inner", "outer"), SIZES)
each_number = pytest.mark.parametrize("tokens", [1, 3, 17, 300])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16)


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def operands_of(weight: Weight) -> tuple[Operand, Operand]:
    """W for the forward, and transposed for dgrad."""
    stored = weight.codes, weight.exponents
    return products.expand(*stored), products.transpose(*stored)


def test_the_error_of_a_weight() -> None:
    weight = Weight.of(gaussian(272, 528))
    out = torch.empty(272, 528)
    products.decode_weight(weight.codes, weight.exponents, out)
    assert 0.0256 < error(out, weight.values.double()) < 0.0276


@each_size
@each_number
def test_the_errors_of_products(inner: int, outer: int, tokens: int) -> None:
    x, w, dy = gaussian(tokens, inner), gaussian(outer, inner, seed=1), gaussian(tokens, outer, seed=2)
    bias = gaussian(outer, seed=3)
    forward, dgrad = operands_of(Weight.of(w))
    of_x, of_dy = cast_input(x, wgrad=True), cast_gradient(dy, dgrad=True, wgrad=True, bias=True)
    assert of_x.wgrad is not None
    assert of_dy.dgrad is not None
    assert of_dy.wgrad is not None
    assert of_dy.bias is not None
    exact = {"forward": x.double() @ w.double().t() + bias, "dgrad": dy.double() @ w.double()}
    found = {
        "forward": multiply(of_x.forward, forward, bias)[:tokens],
        "dgrad": multiply(of_dy.dgrad, dgrad)[:tokens],
        "wgrad": multiply(of_dy.wgrad, of_x.wgrad),
    }
    exact["wgrad"] = dy.double().t() @ x.double()
    errors = {name: error(found[name], exact[name]) for name in exact}
    most = 0.039 if tokens > 100 else 0.05  # few tokens are a small sample
    assert all(0.025 < each < most for each in errors.values()), errors
    check_sums(dy, of_dy.bias, error=1e-6)
    assert {each.dtype for each in found.values()} == {torch.bfloat16}


@each_number
def test_tokens_that_are_not_there_are_zeros(tokens: int) -> None:
    x = gaussian(tokens, 208)
    of_x, of_dy = cast_input(x, wgrad=True), cast_gradient(x, dgrad=True, wgrad=True, bias=False)
    assert len(of_x.forward.codes) == padded_tokens(tokens)
    assert padding_is_neutral(of_x.forward, tokens, 0)
    for operand in (of_x.wgrad, of_dy.wgrad):
        assert operand is not None
        assert padding_is_neutral(operand, tokens, 1)


def test_no_tokens_at_all() -> None:
    x, w = gaussian(0, 208), gaussian(272, 208)
    forward, _ = operands_of(Weight.of(w))
    of_x, of_dy = (
        cast_input(x, wgrad=True),
        cast_gradient(gaussian(0, 272), dgrad=True, wgrad=True, bias=True),
    )
    assert of_x.wgrad is not None
    assert of_dy.wgrad is not None
    assert of_dy.bias is not None
    assert multiply(of_x.forward, forward).shape == (0, 272)
    assert not multiply(of_dy.wgrad, of_x.wgrad).any()
    assert of_dy.bias.tolist() == [0.0] * 272


def test_a_tokens_codes_depend_on_nothing_but_the_token() -> None:
    x = matrix(40, 272, KINDS)
    whole = cast_input(x, wgrad=False).forward
    for token in (0, 7, 39):
        alone = cast_input(x[token : token + 1], wgrad=False).forward
        assert_same(alone.codes[0], whole.codes[token], "code")
        assert_same(alone.scales[0], whole.scales[token], "scale")


def test_rows_of_zeros_give_zeros() -> None:
    """Their scales are 1: neither 0 nor what makes a product subnormal."""
    x = gaussian(20, 208)
    x[3], x[4] = 0, -0.0
    forward, _ = operands_of(Weight.of(gaussian(272, 208)))
    operand = cast_input(x, wgrad=False).forward
    assert operand.scales[3:5].unique().tolist() == [1.0]
    assert not multiply(operand, forward)[3:5].any()
    zeros = Weight.of(torch.zeros(272, 208, dtype=torch.bfloat16))
    assert not multiply(operand, operands_of(zeros)[0]).any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_reach_every_product(bad: float) -> None:
    x, w, dy = gaussian(300, 208), gaussian(272, 208, seed=1), gaussian(300, 272, seed=2)
    forward, dgrad = operands_of(Weight.of(w))
    bad_x, bad_dy = x.clone(), dy.clone()
    bad_x[130, 5] = bad_dy[7, 200] = bad
    of_x, bad_of_x = cast_input(x, wgrad=True), cast_input(bad_x, wgrad=True)
    of_dy = cast_gradient(dy, dgrad=True, wgrad=True, bias=True)
    bad_of_dy = cast_gradient(bad_dy, dgrad=True, wgrad=True, bias=True)
    y, dx = multiply(bad_of_x.forward, forward), multiply(bad_of_dy.dgrad, dgrad)  # type: ignore[arg-type]
    assert (~y.isfinite()).all(1).nonzero().tolist() == [[130]]
    assert (~dx.isfinite()).all(1).nonzero().tolist() == [[7]]
    of_bad_x = multiply(of_dy.wgrad, bad_of_x.wgrad)  # type: ignore[arg-type]
    assert not of_bad_x[:, :128].isfinite().any(), "the tile of x"
    assert of_bad_x[:, 128:].isfinite().all()
    of_bad_dy = multiply(bad_of_dy.wgrad, of_x.wgrad)  # type: ignore[arg-type]
    assert (~of_bad_dy.isfinite()).all(1).nonzero().tolist() == [[200]]
    assert bad_of_dy.bias is not None
    assert (~bad_of_dy.bias.isfinite()).nonzero().tolist() == [[200]]


@pytest.mark.parametrize("kinds", [("normal",), KINDS, WITH_BAD], ids=["normal", "finite", "all"])
def test_the_codes_of_a_transposed_weight_are_the_transposed_codes(kinds: tuple[str, ...]) -> None:
    values = matrix(272, 208, kinds)
    weight, turned = Weight.of(values), Weight.of(values.t().contiguous())
    assert_same(turned.exponents, weight.exponents.t().contiguous(), "exponent")
    made = products.transpose(weight.codes, weight.exponents)
    scales = products.expand(turned.codes, turned.exponents).scales
    assert_same(turned.codes, made.codes, "code", free=turned.free)
    assert_same(made.scales, scales, "scale")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.sampled_from([(144, 208), (16, 528), (300, 16)]), st.data())
def test_runs_of_elements_give_the_bytes_of_the_whole(shape: tuple[int, int], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, shape[0] * shape[1]), max_size=5))
    check_runs(REFERENCE, Weight.of(matrix(*shape, KINDS)), cuts, CPU)


def test_a_larger_byte_stays() -> None:
    """Ranks agree on the largest: a tile is encoded with what another rank needed."""
    exponents = torch.full((1, 1), 130, dtype=torch.uint8)
    values = gaussian(16 * 16)
    products.find_exponents(values, 0, 16, exponents)
    assert exponents.item() == 130
    codes = torch.empty(256, dtype=torch.float8_e4m3fn)
    products.encode_weight(values, 0, 16, exponents, codes)
    assert_same(codes, (values.float() / 8).to(torch.float8_e4m3fn), "code")


def test_who_works_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_FP8_BACKEND", raising=False)
    assert product_backend.choose(CPU).name == "cpu"
    for name in ("reference", "triton") if INTERPRETED else ("reference",):
        monkeypatch.setenv("DS_FP8_BACKEND", name)
        assert product_backend.choose(CPU).name == name


def test_no_compiler_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_FP8_BACKEND", raising=False)
    monkeypatch.setattr("ds_fp8.ops.backend.BUILT", {"cpu": (lambda device: "no compiler", lambda: None)})
    chosen = product_backend.choose(CPU)
    assert (chosen.name, chosen.instead) == ("reference", "no compiler")


@pytest.mark.parametrize(
    ("capability", "cuda", "why"),
    [
        ((8, 0), "13.0", "its compute capability is 8.0, needed is 9.0"),
        ((10, 0), "13.0", "its compute capability is 10.0, needed is 9.0"),
        ((9, 0), "12.8", "torch was built with CUDA 12.8, needed is 12.9 or later"),
        ((9, 0), "12.9", None),
    ],
)
def test_what_keeps_cublas_from_multiplying(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, why: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cublas_lt, "find_library", object)
    assert cublas.obstacle(CPU) == "cuBLAS needs an NVIDIA GPU"
    found = cublas.obstacle(torch.device("cuda", 0))
    assert found is None if why is None else found is not None and found.startswith(why)


def test_operands_that_cublas_would_misread_are_refused() -> None:
    """The reference's scales lie row by row."""
    x = cast_input(gaussian(32, 272), wgrad=False).forward
    forward, _ = operands_of(Weight.of(gaussian(208, 272)))
    told = r"left scales: received shape \(32, 3\) and strides \(3, 1\) .*; allowed: .* strides \(1, 32\)"
    with pytest.raises(ValueError, match=told):
        cublas.multiply(x, forward)
    left = Operand(x.codes, x.scales.t().contiguous().t())
    unpadded = Operand(forward.codes, forward.scales[:, :3].contiguous())
    with pytest.raises(
        ValueError, match=r"right scales: received shape \(2, 3\) .*; allowed: shape \(2, 4\)"
    ):
        cublas.multiply(left, unpadded)
    with pytest.raises(
        ValueError, match=r"bias: received shape \(208,\) .* of torch.float32 on cpu; allowed"
    ):
        cublas.multiply(left, forward, torch.zeros(208))
    moved = torch.empty(32 * 272 + 1, dtype=torch.uint8)[1:].view(torch.float8_e4m3fn).view(32, 272)
    with pytest.raises(ValueError, match=r"addresses that are multiples of 1: allowed are multiples of 16"):
        cublas.multiply(Operand(moved, left.scales), forward)
