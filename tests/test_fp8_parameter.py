"""What may be done to an FP8 weight, and what happens then."""

import copy
import dataclasses
import io
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from fp8_weights import DECODED, EMULATED, fp8_linear, hold, random, take_over, twin
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from ds_fp8.zero_fp8.gradients.schedule import accumulating_node
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.matrix import Matrix

READERS: dict[str, Callable[[Any], Any]] = {
    "float": lambda w: w.float(),
    "double": lambda w: w.to(torch.float64),
    "clone": lambda w: w.clone(),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "row": lambda w: w[3],
    "rows": lambda w: torch.stack(list(w)),
    "cat": lambda w: torch.cat([w, w]),
    "values and weight": lambda w: torch.cat([w.data, w]),
    "view": lambda w: w.view(-1),
    "sum": lambda w: w.sum(),
    "op": torch.ops.aten.sum.default,
    "packet": torch.ops.aten.abs,
    "norm": torch.linalg.vector_norm,
    "foreach": lambda w: torch._foreach_norm([w, w]),
    "compare": lambda w: w == w.data,
    "isfinite": torch.isfinite,
    "list": lambda w: w.tolist(),
    "data": lambda w: w.data,
    "data of data": lambda w: w.data.data,
    "detach": lambda w: w.detach(),
    "take": lambda w: w.take(torch.arange(5)),
    "matmul": lambda w: random(2, 96) @ w,
    "method addmm": lambda w: random(160).addmm(random(2, 96), w),
    "scaled addmm": lambda w: torch.addmm(random(160), random(2, 96), w, alpha=2),
    "bilinear": lambda w: functional.linear(w, w),
    "einsum": lambda w: torch.einsum("nk,tk->tn", w, random(2, 160)),
    "vector": lambda w: parameters_to_vector([w]),
    "new": torch.zeros_like,
    "copy": lambda w: torch.zeros(96, 160).copy_(w),
    "lerp": lambda w: torch.zeros(96, 160, dtype=torch.bfloat16).lerp_(w, 0.5),
    "foreach lerp": lambda w: _foreach_lerp([torch.ones(96, 160, dtype=torch.bfloat16)] * 2, [w, w]),
    "out": lambda w: torch.add(w, 1, out=torch.empty(96, 160, dtype=torch.bfloat16)),
    "data of another": lambda w: nn.Parameter(w.data).data,
    "leaf": lambda w: w.detach().requires_grad_(),
}


def _foreach_lerp(averages: list[Tensor], weights: list[Any]) -> list[Tensor]:
    torch._foreach_lerp_(averages, weights, 0.25)
    return averages


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(same(*each) for each in zip(left, right, strict=True))
    return bool(left == right)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_readers_get_what_the_codes_say(name: str, grad: bool) -> None:
    layer = fp8_linear()
    plain = twin(layer)
    if name in ("copy", "lerp", "foreach lerp", "out", "vector", "list") or not grad:
        with torch.no_grad():
            got, wanted = READERS[name](layer.weight), READERS[name](plain.weight)
    else:
        got, wanted = READERS[name](layer.weight), READERS[name](plain.weight)
    assert same(got, wanted)
    assert type(layer.weight) is FP8Parameter


def said_of(w: Any) -> list[Any]:
    said = [
        w.shape,
        w.size(0),
        w.dtype,
        w.device,
        w.numel(),
        w.dim(),
        len(w),
        w.is_leaf,
        w.requires_grad,
        w.grad,
    ]
    said += [w.is_contiguous(), w.stride(), w.stride(0), w.element_size(), w.nbytes, w.layout, w.type()]
    return said


def test_what_is_asked_of_no_value_decodes_nothing() -> None:
    layer = fp8_linear()
    plain = nn.Linear(160, 96, dtype=torch.bfloat16)
    assert said_of(layer.weight) == said_of(plain.weight)
    assert layer.weight.matrix.decodes == 0


def test_readers_give_their_gradient_to_the_parameter() -> None:
    layer, x = fp8_linear(), random(7, 160)
    plain = twin(layer)
    for weight in (layer.weight, plain.weight):
        ((x @ weight.t()).square().sum() + weight[2:5].sum() + torch._foreach_norm([weight])[0]).backward()
    assert isinstance(layer.weight.grad, Tensor)
    assert type(layer.weight.grad) is Tensor
    assert torch.equal(layer.weight.grad, plain.weight.grad)


class Foreign(nn.Module):
    """Somebody's own product."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


def test_a_module_that_is_no_linear_trains() -> None:
    layer, x = fp8_linear(), random(7, 160)
    got, wanted = Foreign(layer)(x), Foreign(twin(layer))(x)
    assert torch.equal(got, wanted)


WRITERS: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "index": lambda w: w.__setitem__(0, 1.0),
    "copy_": lambda w: w.copy_(torch.zeros(96, 160)),
    "init": nn.init.normal_,
    "eye": nn.init.eye_,
    "trunc": nn.init.trunc_normal_,
    "data.mul_": lambda w: w.data.mul_(2),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(96, 160)),
    "data +=": lambda w: w.data.__iadd__(1),
    "data[0]": lambda w: w.data.__setitem__(0, 1.0),
    "data.data": lambda w: w.data.data.mul_(2),
    "data.view": lambda w: w.data.view(-1)[3:].zero_(),
    "data.fill": lambda w: torch.fill_(w.data, 0),
    "detach": lambda w: w.detach().zero_(),
    "t": lambda w: w.t().mul_(2),
    "row": lambda w: w[0].zero_(),
    "split": lambda w: w.split(8)[1].zero_(),
    "chunk of data": lambda w: w.data.chunk(2)[1].zero_(),
    "out": lambda w: torch.add(torch.ones(96, 160), 1, out=w),
    "out of data": lambda w: torch.mul(torch.ones(96, 160), 1, out=w.data),
    "out of addmm": lambda w: torch.addmm(random(160), random(96, 96), random(96, 160), out=w),
    "relu": lambda w: functional.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "foreach data": lambda w: torch._foreach_mul_([torch.ones(96, 160), w.data], 2),
    "op": lambda w: torch.ops.aten.mul_.Tensor(w, torch.ones(1)),
    "packet": lambda w: torch.ops.aten.mul_(w, torch.ones(1)),
    "set_": lambda w: w.set_(torch.zeros(1)),
    "optimizer": lambda w: _stepped(torch.optim.SGD([w], lr=1.0), w),
    "fused": lambda w: _stepped(torch.optim.AdamW([w], fused=True), w),
}


def _stepped(optimizer: torch.optim.Optimizer, weight: Any) -> None:
    weight.grad = torch.ones(96, 160, dtype=torch.bfloat16)
    optimizer.step()


@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_refused_by_name(name: str) -> None:
    layer = fp8_linear()
    before = twin(layer).weight
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^weight: .*(safe_set_full|weights\.exclude)"):
        WRITERS[name](layer.weight)
    assert torch.equal(layer.weight.matrix.values(), before)


@pytest.mark.parametrize("write", [lambda w: w.data.t().mul_(2), lambda w: nn.init.normal_(w.data)])
def test_writers_are_refused_in_inference_mode(write: Callable[[Any], Any]) -> None:
    """Where tensors have no version."""
    layer = fp8_linear()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="safe_set_full_fp32_param"):
        write(layer.weight)


POINTERS: dict[str, Callable[[Any], Any]] = {
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "typed storage": lambda w: w.storage(),
    "dlpack": torch.from_dlpack,
    "share": lambda w: w.share_memory_(),
    "array interface": lambda w: w.__cuda_array_interface__,
}


@pytest.mark.parametrize("name", POINTERS)
def test_pointers_are_refused_by_name(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"^weight: .*weights\.exclude"):
        POINTERS[name](fp8_linear().weight)


def test_a_stream_keeps_the_memory_that_products_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that of values which somebody decoded for the call."""
    weight, stream, kept = fp8_linear().weight, torch.Stream(device="cpu"), []
    monkeypatch.setattr(Matrix, "record_stream", lambda *call: kept.append(call))
    weight.record_stream(stream)
    assert kept == [(weight.matrix, stream)]
    assert not weight.matrix.decodes
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="aten::record_stream"):  # a CPU has none
        weight.matrix.record_stream(stream)
    parts = {name: Mock() for name in ("codes", "exponents")}
    dataclasses.replace(weight.matrix, **parts).record_stream(stream)
    assert all(each.record_stream.mock_calls == [call(stream)] for each in parts.values())
    dataclasses.replace(weight.matrix, **parts, is_here=False).record_stream(stream)
    assert [each.record_stream.call_count for each in parts.values()] == [1, 2]


def test_what_bypasses_python_reads_nan() -> None:
    """And a parameter has two bytes behind it."""
    weight = fp8_linear().weight
    with torch._C.DisableTorchFunctionSubclass():
        assert bool(weight.isnan().all())
        assert weight.untyped_storage().nbytes() == 2
    other = nn.Parameter(torch.zeros(96, 160, dtype=torch.bfloat16))
    other.data = weight  # torch asks no override of what is assigned
    assert bool(other.isnan().all())


def test_copies_are_plain() -> None:
    layer = fp8_linear()
    plain = twin(layer)
    layer.weight.requires_grad_(False)
    pickled, saved = pickle.loads(pickle.dumps(layer)), io.BytesIO()
    torch.save({"model": layer, "values": layer.weight.data}, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    for each in (copy.deepcopy(layer), pickled, loaded["model"]):
        assert type(each.weight) is nn.Parameter
        assert not each.weight.requires_grad
        assert torch.equal(each.weight, plain.weight)
    for values in (loaded["values"], copy.deepcopy(layer.weight.data), layer.weight.data + 0):
        assert type(values) is Tensor
        assert torch.equal(values, plain.weight)
    assert type(layer.weight) is FP8Parameter


def test_state_dict_is_plain_and_the_callers_own() -> None:
    layer = nn.Sequential(fp8_linear())
    state = layer.state_dict()
    assert {type(each) for each in state.values()} == {Tensor}
    assert torch.equal(state["0.weight"], twin(layer[0]).weight)
    state["0.weight"].zero_()
    assert bool(layer[0].weight.any())
    assert layer.state_dict(keep_vars=True)["0.weight"] is layer[0].weight


def test_load_state_dict_encodes_only_while_the_owner_allows_it() -> None:
    layer, other = fp8_linear(seed=0), fp8_linear(seed=1)
    with pytest.raises(RuntimeError, match="safe_set_full_fp32_param"):
        layer.load_state_dict(other.state_dict())
    generation = layer.weight.matrix.generation
    layer.weight.matrix.writer = layer.weight.matrix.store
    layer.load_state_dict(other.state_dict())
    codes, wanted = (each.weight.matrix.codes.view(torch.uint8) for each in (layer, other))
    assert torch.equal(codes, wanted)
    assert layer.weight.matrix.generation == generation + 1
    assert type(layer.weight) is FP8Parameter


def test_assigned_state_is_another_parameter() -> None:
    layer, weight = fp8_linear(), fp8_linear(seed=1).weight
    layer.load_state_dict({"weight": weight, "bias": layer.bias}, assign=True)
    assert layer.weight is weight


NO_OPS: dict[str, Callable[[nn.Module], Any]] = {
    "to device": lambda m: m.to("cpu"),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "cpu": lambda m: m.cpu(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.bfloat16),
    "own data": lambda m: setattr(m.weight, "data", m.weight.data),
    "moved data": lambda m: setattr(m.weight, "data", m.weight.data.to("cpu")),
    "self": lambda m: setattr(m.weight, "data", m.weight),
    "train": lambda m: m.train().requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad(),
    "contiguous": lambda m: m.weight.contiguous() is m.weight or pytest.fail("another tensor"),
    "half a name": lambda m: m.weight.type() == "torch.BFloat16Tensor" or pytest.fail("another type"),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_changes_nothing_keeps_the_codes(name: str) -> None:
    layer = fp8_linear()
    weight = layer.weight
    NO_OPS[name](layer)
    assert layer.weight is weight
    assert type(weight) is FP8Parameter
    assert weight.matrix.decodes <= 2


LEAVING: dict[str, Callable[[nn.Linear], Any]] = {
    "float": lambda m: m.float(),
    "half": lambda m: m.half(),
    "double": lambda m: m.to(torch.float64),
    "copied": lambda m: setattr(m.weight, "data", m.weight.data.clone()),
    "a part": lambda m: setattr(m.weight, "data", m.weight.data[:]),
    "vector": lambda m: vector_to_parameters(parameters_to_vector(m.parameters()), m.parameters()),
    "given back": lambda m: FP8Parameter.give_back(m.weight),
}


@pytest.mark.parametrize("name", LEAVING)
def test_new_data_makes_a_parameter_plain_with_its_values(name: str) -> None:
    layer = fp8_linear()
    plain, weight = twin(layer), layer.weight
    LEAVING[name](layer)
    assert layer.weight is weight
    assert type(weight) is nn.Parameter
    assert weight.__dict__ == {}
    assert torch.equal(weight, plain.weight.to(weight.dtype))
    with torch.no_grad():
        weight.data.zero_()
        weight.add_(1)


def test_stale_values_are_new_data() -> None:
    layer = fp8_linear()
    values = layer.weight.data
    layer.weight.matrix.rewritten()
    layer.weight.data = values
    assert type(layer.weight) is nn.Parameter


@pytest.mark.parametrize(
    "find",
    [
        lambda p: p.expand_as(p).grad_fn.next_functions[0][0],
        lambda p: p.view_as(p).grad_fn.next_functions[0][0],
        lambda p: get_gradient_edge(p).node,
        accumulating_node,
    ],
)
def test_the_node_of_a_gradient_is_found(find: Callable[[Any], Any]) -> None:
    layer = fp8_linear()
    node = find(layer.weight)
    assert node.name().endswith("torch::autograd::AccumulateGrad")
    assert node.variable is layer.weight


def test_hooks_set_before_and_after_fire_once() -> None:
    fired = []
    torch.manual_seed(0)
    layer = nn.Linear(160, 96, dtype=torch.bfloat16)
    layer.weight.register_post_accumulate_grad_hook(lambda p: fired.append((p is layer.weight, p.grad.dtype)))
    node = accumulating_node(layer.weight)
    node.register_hook(lambda *_: fired.append("node"))
    take_over(layer.weight, EMULATED)
    layer.weight.register_hook(lambda g: fired.append(g.shape))
    layer(random(3, 160)).sum().backward()
    assert fired == [torch.Size([96, 160]), (True, torch.bfloat16), "node"]
    assert accumulating_node(layer.weight) is node
    assert float(clip_grad_norm_(layer.parameters(), 1.0)) > 0


def test_decodes_are_counted_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    layer, x = fp8_linear(), random(3, 160)
    matrix = layer.weight.matrix
    with caplog.at_level(logging.WARNING, "ds_fp8"):
        for _ in range(3):
            layer(x).sum().backward()
        with torch.no_grad():
            layer.weight.norm()
        assert (matrix.decodes, caplog.messages) == (1, [])
        for _ in range(3):
            (x @ layer.weight.t()).sum().backward()
    assert matrix.decodes == 4
    assert len(caplog.messages) == 1
    assert "weight: t reads" in caplog.messages[0]
    assert "weights.exclude" in caplog.messages[0]


@pytest.mark.parametrize(
    "call",
    [torch._foreach_norm, lambda p: torch._foreach_lerp_([torch.zeros(96, 160).bfloat16()] * 5, p, 0.5)],
)
def test_lists_are_decoded_one_by_one(
    call: Callable[[list[Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [fp8_linear(seed=seed) for seed in range(5)]
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    for each in layers:
        decode = each.weight.matrix.values

        def values(decode: Callable[[], Tensor] = decode) -> Tensor:
            nonlocal most
            decoded = decode()
            alive.append(weakref.ref(decoded))
            most = max(most, sum(ref() is not None for ref in alive))
            return decoded

        monkeypatch.setattr(each.weight.matrix, "values", values)
    with torch.no_grad():
        call([each.weight for each in layers])
    assert len(alive) == 5
    assert most <= 2


@pytest.fixture
def wrapped_linear() -> Iterator[None]:
    """As DeepSpeed's flops profiler has it."""
    original = functional.linear

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs)

    functional.linear = counting
    yield
    functional.linear = original


def test_a_wrapped_linear_is_a_product(wrapped_linear: None) -> None:
    layer, x = fp8_linear(), random(3, 160)
    assert "counting" in repr(functional.linear)
    got = functional.linear(weight=layer.weight, bias=layer.bias, input=x)
    assert torch.equal(got, layer(x))
    assert layer.weight.matrix.decodes == 0


def test_a_wrapped_addmm_is_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Hugging Face's Conv1D."""
    weight, bias, x, original = fp8_linear().weight, random(160), random(3, 96), torch.addmm
    wanted = torch.addmm(bias, x, weight)
    monkeypatch.setattr(torch, "addmm", partial(original))
    assert torch.equal(torch.addmm(bias, x, weight), wanted)
    assert weight.matrix.decodes == 0


def test_a_linear_that_asks_for_overrides_is_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = fp8_linear(), random(3, 160)
    wanted = layer(x)

    def asking(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return torch.overrides.handle_torch_function(asking, (weight,), input, weight, bias=bias)

    monkeypatch.setattr(functional, "linear", asking)
    assert torch.equal(layer(x), wanted)
    assert layer.weight.matrix.decodes == 0


def test_zero3s_linear_is_right_and_seen() -> None:
    """It reads the weight: the engine has to undo it."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    layer, x = fp8_linear(), random(3, 160)
    plain = twin(layer)
    got = []
    for each in (layer, plain):
        zero3_linear_wrap(x, each.weight, each.bias).square().sum().backward()
        got.append(each.weight.grad)
    assert torch.equal(*got)
    assert layer.weight.matrix.decodes > 0


def differentiate_twice(layer: nn.Linear, x: Tensor) -> None:
    first = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    first.sum().backward()


def penalize_a_constant_gradient(layer: nn.Linear, x: Tensor) -> None:
    """The gradient of x is the weight's alone."""
    first = torch.autograd.grad(layer(x).float().sum(), x, create_graph=True)[0]
    (first.float().square().sum() + layer(x).float().sum()).backward()


def differentiate_forward(layer: nn.Linear, x: Tensor) -> None:
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))


def differentiate_in_batches(layer: nn.Linear, x: Tensor) -> None:
    torch.autograd.grad(layer(x), x, random(2, 3, 96), is_grads_batched=True)


REFUSED: dict[str, tuple[Callable[[nn.Linear, Tensor], Any], str]] = {
    "twice": (differentiate_twice, "can be differentiated once only"),
    "penalty": (penalize_a_constant_gradient, "can be differentiated once only"),
    "forward mode": (differentiate_forward, "forward-mode differentiation cannot look into"),
    "in batches": (differentiate_in_batches, "is_grads_batched cannot look into"),
    "vmap": (lambda layer, x: torch.func.vmap(layer)(x), "torch.func cannot look into"),
    "jvp": (lambda layer, x: torch.func.jvp(layer, (x,), (x,)), "torch.func cannot look into"),
    "jacrev": (lambda layer, x: torch.func.jacrev(layer)(x), "torch.func cannot look into"),
    "jit.trace": (torch.jit.trace, "torch.jit.trace cannot look into"),
    "sparse": (lambda layer, x: layer(x.detach().to_sparse()), "received a sparse tensor as input"),
    "nested": (
        lambda layer, x: layer(torch.nested.nested_tensor([x, x])),
        "received a nested tensor as input",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The PyTorch API of nested tensors")
def test_what_does_not_see_into_a_product_is_refused(what: str) -> None:
    """By a message with the weight's name and what helps."""
    layer, x = fp8_linear(), random(3, 160).requires_grad_()
    do, words = REFUSED[what]
    with pytest.raises(RuntimeError, match=f"^weight: .*{words}.*weights.exclude"):
        do(layer, x)


@pytest.mark.parametrize("trained", [True, False])
def test_a_first_derivative_may_have_a_graph(trained: bool) -> None:
    """That of a frozen layer's input is a constant."""
    layer, x = fp8_linear(), random(3, 160).requires_grad_()
    layer.weight.requires_grad_(trained)
    wanted = torch.autograd.grad(layer(x).float().sum(), x)[0]
    (got,) = torch.autograd.grad(layer(x).float().sum(), x, create_graph=True)
    assert got.requires_grad == trained
    assert torch.equal(got, wanted)


def test_functional_call_and_inference_mode() -> None:
    layer, x = fp8_linear(), random(3, 160)
    wanted = layer(x)
    called = torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    with torch.inference_mode():
        inferred = layer(x)
        assert torch.equal(layer.weight.sum(), twin(layer).weight.sum())
    assert torch.equal(called, wanted)
    assert torch.equal(inferred, wanted)
    assert layer.weight.matrix.decodes == 1


@pytest.mark.parametrize(
    ("parameter", "what"),
    [
        (nn.Parameter(torch.zeros(96, 160)), "torch.float32"),
        (nn.Parameter(torch.zeros(160, 96, dtype=torch.bfloat16)), r"\[160, 96\]"),
        (fp8_linear().weight, "FP8Parameter"),
    ],
)
def test_only_a_plain_parameter_is_taken_over(parameter: nn.Parameter, what: str) -> None:
    with pytest.raises(ValueError, match=f"^mine: received .*{what}.*allowed"):
        FP8Parameter.take_over(parameter, hold(random(96, 160), "mine"), DECODED)


def test_repr_says_what_it_is() -> None:
    assert repr(fp8_linear().weight) == "FP8Parameter(weight, [96, 160], emulated)"
