"""FP8 products as autograd sees them: their numbers, what they save, what they refuse."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from fp8_weights import DECODED, EMULATED, LAID_OUT, WAYS, fp8_linear, random, take_over, twin
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ds_fp8.ops import products
from ds_fp8.zero_fp8.products import shared_casts
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.kernels import REFERENCE
from ds_fp8.zero_fp8.products.ways import FP8Products, Way

ROUNDING = 0.0017  # of a BF16 result, relative
E4M3_PRODUCT = 0.037  # of a product of two operands that are rounded to E4M3, measured on gaussian data


@contextmanager
def one_forward() -> Iterator[None]:
    """A forward of a model, as its hooks see it."""
    shared_casts.begin_forward()
    yield
    shared_casts.end_forward()


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def exact_gradients(layer: nn.Linear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of the weight that the codes have, in float64."""
    weight = layer.weight.matrix.values().double()
    return {
        "y": x.double() @ weight.t() + layer.bias.double(),
        "dx": dy.double() @ weight,
        "dw": dy.double().t() @ x.double(),
        "db": dy.double().sum(0),
    }


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}


def check_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, each in wanted.items():
        assert got[name].dtype == each.dtype, name
        assert torch.equal(got[name], each), name


@pytest.mark.parametrize(("way", "lost"), [(EMULATED, E4M3_PRODUCT), (DECODED, 0.0)])
def test_errors_against_float64_are_those_of_the_format(way: Way, lost: float) -> None:
    """The weight's own rounding is in what is exact, so that y and dx lose that of one operand."""
    layer, x, dy = fp8_linear(512, 384, way=way), random(700, 512), random(700, 384, seed=2)
    got, exact = gradients(layer, x, dy), exact_gradients(layer, x, dy)
    limits = {"y": lost / 2**0.5, "dx": lost / 2**0.5, "dw": lost, "db": 0.0}
    for name, limit in limits.items():
        found = error(got[name], exact[name])
        assert 0.95 * limit <= found <= 1.05 * limit + 1.5 * ROUNDING, (name, found)


@pytest.mark.parametrize("tokens", [1, 3, 17, 129])
def test_emulated_is_the_product_of_what_was_cast(tokens: int) -> None:
    """In FP64, rounded once; K and N are no multiples of a tile."""
    layer, x, dy = fp8_linear(), random(tokens, 160), random(tokens, 96, seed=2)
    matrix = layer.weight.matrix
    layer.bias.data.zero_()
    cast_x, cast_dy = (
        products.cast_input(x, wgrad=True),
        products.cast_gradient(dy, dgrad=True, wgrad=True, bias=True),
    )
    weight = matrix.values().double()
    assert cast_x.wgrad is not None
    assert cast_dy.dgrad is not None
    assert cast_dy.wgrad is not None
    exact = {
        "y": cast_x.forward.decode()[:tokens].double() @ weight.t(),
        "dx": cast_dy.dgrad.decode()[:tokens].double() @ weight,
        "dw": cast_dy.wgrad.decode().double() @ cast_x.wgrad.decode().double().t(),
        "db": dy.double().sum(0),
    }
    got = gradients(layer, x, dy)
    for name, each in exact.items():
        assert error(got[name], each) <= error(each.to(torch.bfloat16), each) + 1e-4, name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_shapes_of_inputs(way: Way) -> None:
    layer = fp8_linear(way=way)
    x, dy = random(6, 160), random(6, 96, seed=2)
    flat = gradients(layer, x, dy)
    whole = gradients(layer, x.view(2, 1, 3, 160), dy.view(2, 1, 3, 96))
    check_equal({name: each.reshape(flat[name].shape) for name, each in whole.items()}, flat)
    strided = gradients(layer, random(160, 6).t(), dy)
    check_equal(strided, gradients(layer, random(160, 6).t().contiguous(), dy))
    check_equal(gradients(layer, x, dy[:1].expand(6, 96)), gradients(layer, x, dy[:1].repeat(6, 1)))
    layer.bias = nn.Parameter(random(192)[::2])
    strided = gradients(layer, x, dy)
    layer.bias = nn.Parameter(layer.bias.detach().contiguous())
    check_equal(strided, gradients(layer, x, dy))
    vector, row = gradients(layer, x[0], dy[0]), gradients(layer, x[:1], dy[:1])
    assert vector["y"].shape == (96,)
    check_equal({**vector, "y": vector["y"][None], "dx": vector["dx"][None]}, row)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_tokens(way: Way, shape: tuple[int, ...]) -> None:
    got = gradients(fp8_linear(way=way), random(*shape, 160), random(*shape, 96))
    assert (got["y"].shape, got["dx"].shape) == ((*shape, 96), (*shape, 160))
    assert not got["dw"].any()
    assert not got["db"].any()
    assert (got["dw"].dtype, got["dw"].shape, got["db"].shape) == (torch.bfloat16, (96, 160), (96,))


class Conv1D(nn.Module):
    """Hugging Face's forward."""

    def __init__(self, linear: nn.Linear, way: Way) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.matrix.values().t().contiguous())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        take_over(self.weight, way)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], 96)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_conv1d_is_the_linear_transposed(way: Way) -> None:
    """The codes of a transposed weight are its codes transposed, and the gradients to the bit."""
    layer, x, dy = fp8_linear(way=way), random(2, 9, 160), random(2, 9, 96, seed=2)
    conv, dense = Conv1D(layer, way), []
    conv.weight.register_hook(lambda gradient: dense.append(gradient.is_contiguous()))
    got, wanted = gradients(conv, x, dy), gradients(layer, x, dy)
    assert dense == [True]
    got["dw"] = got["dw"].t()
    if way is not DECODED:
        check_equal(got, wanted)
    for name, each in wanted.items():  # BF16 products of other layouts add in another order
        assert error(got[name], each.double()) < ROUNDING


class Spy:
    """Kernels that say what they were asked for."""

    def __init__(self) -> None:
        self.inputs: list[bool] = []  # for each cast of an input, whether it is also for wgrad
        self.gradients: list[tuple[bool, bool, bool]] = []
        self.transposed = 0
        self.way = FP8Products(
            "spied",
            replace(
                REFERENCE,
                name=f"spied {id(self)}",
                cast_input=self._cast_input,
                cast_gradient=self._cast_gradient,
                transpose=self._transpose,
            ),
        )

    def _cast_input(self, x: Tensor, *, wgrad: bool) -> products.CastInput:
        self.inputs.append(wgrad)
        return products.cast_input(x, wgrad=wgrad)

    def _cast_gradient(self, dy: Tensor, *, dgrad: bool, wgrad: bool, bias: bool) -> products.CastGradient:
        self.gradients.append((dgrad, wgrad, bias))
        return products.cast_gradient(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)

    def _transpose(self, codes: Tensor, exponents: Tensor) -> products.Operand:
        self.transposed += 1
        return products.transpose(codes, exponents)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_is_made_that_nobody_wants(weight: bool, input: bool, bias: bool) -> None:
    spy = Spy()
    layer = fp8_linear(way=spy.way)
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    x = random(5, 160).requires_grad_(input)
    y = layer(x)
    assert spy.inputs == [weight]
    if weight or input or bias:
        y.sum().backward()
        assert spy.gradients == [(input, weight, bias)]
        assert spy.transposed == input
    assert [each is not None for each in (layer.weight.grad, x.grad, layer.bias.grad)] == [
        weight,
        input,
        bias,
    ]
    with torch.no_grad():
        layer(x.clone())
    assert spy.inputs == [weight, False]


class Saved:
    """What autograd saves."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self) -> "Saved":
        self._hooks = saved_tensors_hooks(self._pack, lambda packed: packed)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor


def test_the_same_input_is_cast_and_saved_once() -> None:
    """As q, k and v get it; the frozen one comes first and wants less."""
    spy = Spy()
    layers = [fp8_linear(way=spy.way, seed=seed) for seed in range(4)]
    layers[0].weight.requires_grad_(False)
    x = random(20, 160)
    with Saved() as saved, one_forward():
        ys = [layer(x) for layer in layers]
    assert spy.inputs == [False, True]
    assert len({each.data_ptr() for each in saved.tensors if each.dtype is torch.float8_e4m3fn}) == 1
    sum(y.float().sum() for y in ys).backward()
    for layer in layers[1:]:
        alone = fp8_linear(seed=layers.index(layer))
        alone(x.clone()).float().sum().backward()
        assert torch.equal(layer.weight.grad, alone.weight.grad)


def test_another_input_is_cast_anew() -> None:
    spy = Spy()
    layer, x = fp8_linear(way=spy.way), random(20, 160)
    first = layer(x)
    x.mul_(2)  # the same object
    assert not torch.equal(layer(x), first)
    assert torch.equal(layer(x.clone()), layer(x))
    assert spy.inputs == [True] * 4


def test_in_a_cuda_graph_every_product_casts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay with other values in x would miss a cast of before, and so would what comes after it."""
    spy = Spy()
    layer, x = fp8_linear(way=spy.way), random(20, 160)
    with one_forward():
        layer(x)
        for capturing in (True, False):
            monkeypatch.setattr(shared_casts, "captured", lambda _, answer=capturing: answer)
            layer(x)
            layer(x)
    assert len(spy.inputs) == 3, "before and after it is the same cast"


def test_a_cast_lives_no_longer_than_its_input_and_the_forward() -> None:
    layer = fp8_linear(way=Spy().way)
    casts = layer.weight.way.casts
    x = random(20, 160)
    with one_forward():
        y = layer(x)
        assert casts._last is not None
        y.sum().backward()
        assert casts._last is None
        layer(x)
        del x
        assert casts._last is None
        with torch.inference_mode():
            layer(random(20, 160))
    assert casts._last is None


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3), ()], ids=str)
def test_outputs_may_be_edited(way: Way, shape: tuple[int, ...]) -> None:
    """As by an in-place activation, a slice or a hook."""

    def edited(y: Tensor, in_place: bool) -> Tensor:
        if not in_place:
            doubled = torch.cat([2 * y[..., :40], y[..., 40:]], dim=-1)
            return (doubled + 1).relu() * 3
        y[..., :40] *= 2
        y += 1
        return functional.relu(y, inplace=True) * 3

    layer, x = fp8_linear(way=way), random(12, 160)[: torch.Size(shape).numel()].view(*shape, 160)
    found = []
    for in_place in (False, True):
        layer.zero_grad()
        edited(layer(x), in_place).float().sum().backward()
        found.append([layer.weight.grad, layer.bias.grad])
    for separate, edit in zip(*found, strict=True):
        assert torch.equal(separate, edit)


def test_an_input_that_is_refilled_is_cast_anew() -> None:
    """By writes that torch does not count: a buffer that another library fills, for example."""
    spy = Spy()
    layer, x = fp8_linear(way=spy.way), random(20, 160)
    for seed in range(3):
        x.data.copy_(random(20, 160, seed=seed))
        with one_forward():
            got = layer(x)
        assert torch.equal(got, layer(x.clone()))
        assert torch.equal(got, layer(x))
    with one_forward():
        layer(x)
        x.data = random(20, 160, seed=4)
        assert torch.equal(layer(x), layer(x.clone()))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(way: Way, reentrant: bool) -> None:
    layer, x, dy = fp8_linear(way=way), random(20, 160), random(20, 96, seed=2)
    wanted = gradients(layer, x, dy)

    class Checkpointed(nn.Module):
        weight, bias = layer.weight, layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(layer, x, use_reentrant=reentrant)

        def zero_grad(self, set_to_none: bool = True) -> None:
            layer.zero_grad(set_to_none)

    check_equal(gradients(Checkpointed(), x, dy), wanted)


def test_a_forward_that_is_done_again_saves_nothing() -> None:
    spy = Spy()
    layer, x = fp8_linear(way=spy.way), random(20, 160).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=True)
    assert spy.inputs == [False]
    y.sum().backward()
    assert spy.inputs == [False, True]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_gradients_accumulate(way: Way) -> None:
    layer = fp8_linear(way=way)
    parts = []
    for seed in range(4):
        parts.append(
            gradients(layer, random(20, 160, seed=seed), random(20, 96, seed=9 + seed))["dw"].clone()
        )
    layer.zero_grad()
    for seed in range(4):
        layer(random(20, 160, seed=seed)).backward(random(20, 96, seed=9 + seed))
    wanted = parts[0]
    for each in parts[1:]:
        wanted = wanted + each
    assert torch.equal(layer.weight.grad, wanted)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_autocast_casts_x_and_bias(way: Way) -> None:
    layer, x, dy = fp8_linear(way=way), random(20, 160), random(20, 96, seed=2)
    wanted = gradients(layer, x, dy)
    layer.bias = nn.Parameter(layer.bias.data.float())
    x = x.float().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.backward(dy)  # where the products of backward would be cast, too
    assert (y.dtype, x.grad.dtype, layer.bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    got = {"y": y, "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
    check_equal({name: each.to(torch.bfloat16) for name, each in got.items()}, wanted)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(RuntimeError, match=r"^weight: .*autocast to .*16"),
    ):
        layer(x)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda w: functional.linear(random(3, 160).float(), w), "input of torch.float32"),
        (lambda w: functional.linear(random(3, 160).half(), w), "input of torch.float16"),
        (lambda w: functional.linear(random(3, 160), w, torch.zeros(96)), "bias of torch.float32"),
        (lambda w: functional.linear(random(3, 96), w), r"shape \[3, 96\]"),
        (lambda w: functional.linear(random(3, 160), w, random(95)), r"bias of shape \[95\]"),
        (lambda w: functional.linear(random(3, 160)[0, 0], w), r"shape \[\]"),
        (lambda w: torch.addmm(random(160), random(3, 160), w), r"shape \[3, 160\]"),
    ],
)
def test_what_torch_would_not_multiply_is_refused(call: Callable[[Any], Any], what: str) -> None:
    with pytest.raises(RuntimeError, match=f"^weight: received .*{what}.*allowed"):
        call(fp8_linear().weight)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_codes_rewritten_before_backward(way: Way) -> None:
    """Only dgrad needs them."""
    layer, x = fp8_linear(way=way), random(3, 160)
    y = layer(x)
    layer.weight.matrix.rewritten()
    y.sum().backward()
    y = layer(x.requires_grad_())
    layer.weight.matrix.rewritten()
    with pytest.raises(RuntimeError, match=r"^weight: .*modified.*version 3; expected version 2"):
        y.sum().backward()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_arrives(way: Way, value: float) -> None:
    layer, x, dy = fp8_linear(way=way), random(20, 160), random(20, 96, seed=2)
    x[3, 5] = value
    got = gradients(layer, x, dy)
    assert not got["y"][3].isfinite().any()
    assert got["y"][4].isfinite().all()
    assert not got["dw"][:, 5].isfinite().any()
    x[3, 5], dy[7, 2] = 0, value
    got = gradients(layer, x, dy)
    assert not got["dx"][7].isfinite().any()
    assert not got["dw"][2].isfinite().any()
    assert not got["db"][2].isfinite()


def test_a_tied_use_adds_its_gradients() -> None:
    layer, x = fp8_linear(96, 96), random(5, 96)
    plain = twin(layer)
    for each in (layer, plain):
        each(each(x)).sum().backward()
    assert isinstance(layer.weight, FP8Parameter)
    assert error(layer.weight.grad, plain.weight.grad.double()) < 0.06


@pytest.mark.parametrize("features", [(160, 96), (512, 528)])
def test_scales_of_any_layout_give_the_same_bits(features: tuple[int, int]) -> None:
    """Also if what autograd saves is moved away and back."""
    inputs, outputs = features
    x, dy = random(150, inputs), random(150, outputs, seed=2)
    wanted = gradients(fp8_linear(*features), x, dy)
    layer = fp8_linear(*features, way=LAID_OUT)
    check_equal(gradients(layer, x, dy), wanted)
    with save_on_cpu():
        check_equal(gradients(layer, x, dy), wanted)
    with saved_tensors_hooks(lambda saved: saved.clone(), lambda packed: packed):
        check_equal(gradients(layer, x, dy), wanted)
