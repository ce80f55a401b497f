"""FP8 weights under torch.compile: one graph, the same bits, new codes without a new graph."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_weights import DECODED, EMULATED, LAID_OUT, fp8_linear, hold, make_fp8, random
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional

from ds_fp8.zero_fp8.products.ways import FP8Products, Way


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.q, self.k, self.v = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.own = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        x = x + self.down(functional.gelu(self.up(x)))
        return x @ self.own.weight.t() + self.own.weight.sum().to(self.own.weight.dtype)


def block(way: Way) -> nn.Module:
    torch.manual_seed(0)
    model = Block().bfloat16()
    make_fp8(model, way)
    return model


def gradients(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(each.grad for each in model.parameters() if each.grad is not None)]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(*each) for each in zip(left, right, strict=True))


@pytest.mark.parametrize("way", [LAID_OUT, DECODED], ids=lambda way: way.name)
def test_one_graph_gives_the_bits_of_eager(way: Way) -> None:
    """With dynamic tokens at most one graph more, and with new codes none."""
    model = block(way)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tokens in (24, 40, 17):
        x = random(2, tokens, 64, seed=tokens)
        assert equal(gradients(model, compiled, x), gradients(model, model, x))
    assert counter.frame_count <= 2
    graphs = counter.frame_count
    for each in (model.q, model.own):
        matrix = each.weight.matrix
        with torch.no_grad():
            matrix.store(matrix.values() * 1.5)
    assert equal(gradients(model, compiled, x), gradients(model, model, x))
    assert counter.frame_count == graphs


def test_codes_rewritten_before_backward() -> None:
    model = block(EMULATED)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(random(2, 24, 64).requires_grad_())
    model.q.weight.matrix.rewritten()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_common_input_is_cast_once() -> None:
    """The compiler finds it: x for q, k and v, for up, for down."""
    found: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if "ds_fp8" in str(node.target))
        return graph

    model = block(EMULATED)
    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    gradients(model, torch.compile(model, backend=backend, fullgraph=True), random(2, 24, 64))
    assert sum("cast_input" in each for each in found) == 3
    assert sum("differentiate" in each for each in found) == 5
    assert not any("transpose" in each for each in found)


def test_without_gradients_and_with_autocast() -> None:
    layer, x = fp8_linear(), random(5, 160)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    layer.bias = nn.Parameter(layer.bias.data.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(gradients(layer, compiled, x.float()), gradients(layer, layer, x.float()))


def test_a_graph_serves_every_layer() -> None:
    """As layers are compiled one by one."""
    counter = CompileCounterWithBackend("aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        model = Block().bfloat16()
        make_fp8(model)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = random(2, 24, 64)
        assert equal(gradients(model, compiled, x), gradients(model, model, x))
    assert counter.frame_count == 1


WRITERS = {
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "copy_": lambda w: w.copy_(torch.zeros(96, 160)),
    "index": lambda w: w.__setitem__(0, 1),
    "data": lambda w: w.data.mul_(2),
    "detach": lambda w: w.detach().zero_(),
    "pointer": lambda w: w.data_ptr(),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_refused_leaves_the_graph(name: str) -> None:
    layer = fp8_linear()

    def call(x: Tensor) -> Any:
        WRITERS[name](layer.weight)
        return layer(x)

    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^weight: .* FP8 weight"):
        torch.compile(call, backend="eager")(random(5, 160))


def test_values_of_a_weight_are_read_by_compiled_code() -> None:
    layer = fp8_linear()

    def call(x: Tensor, values: Tensor) -> Tensor:
        norm = torch._foreach_norm([layer.weight])[0]
        return (x @ values.t()) * layer.weight.detach().abs().max() + layer.weight.size(0) * norm

    x, values = random(5, 160), layer.weight.data
    assert torch.equal(torch.compile(call, backend="aot_eager")(x, values), call(x, values))


REPLACED_BEFORE = """
from torch.nn import functional
linear = functional.linear
functional.linear = lambda *arguments: linear(*arguments)  # as DeepSpeed does for ZeRO 3

import torch
torch.compile(torch.sin, backend="eager")(torch.ones(1))

from fp8_weights import fp8_linear, random

layer, x = fp8_linear(), random(5, 160)
call = lambda x: linear(x, layer.weight, layer.bias)
assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))
assert layer.weight.matrix.decodes == 0
"""


def test_torchs_own_linear_is_a_product_when_another_has_replaced_it() -> None:
    """Imported by name, in a process in which torch's table of functions, and Dynamo's copy, lack it."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", REPLACED_BEFORE], cwd=tests, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokens", [17, 150])
@pytest.mark.parametrize("way", [EMULATED, LAID_OUT], ids=lambda way: way.name)
def test_fakes_have_the_shapes_and_strides_of_kernels(way: FP8Products, tokens: int) -> None:
    name, x, dy = way.kernels.name, random(tokens, 160), random(tokens, 96)
    matrix, turned = hold(random(96, 160)), hold(random(160, 96))
    ops = torch.ops.ds_fp8
    cast = ops.cast_input(name, x, True)
    calls = [
        *((ops.cast_input, (name, x, wgrad)) for wgrad in (True, False)),
        *(
            (ops.differentiate, (name, dy, matrix.codes, matrix.exponents, *cast[2:], needs, False))
            for needs in product([True, False], repeat=3)
        ),
        (ops.multiply, (name, *cast[:2], matrix.codes, matrix.exponents, random(96), False)),
        (ops.multiply, (name, *cast[:2], turned.codes, turned.exponents, None, True)),
        (ops.decode_weight, (name, matrix.codes, matrix.exponents)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils="test_faketensor")
