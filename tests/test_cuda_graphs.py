"""FP8 products in CUDA graphs. There is no GPU here: a graph is the list of ops that were called while it was
captured, and its replay calls them again into the same tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from fp8_weights import fp8_linear, random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_fp8.zero_fp8.products import shared_casts


class Graph(TorchDispatchMode):
    """As torch.cuda.CUDAGraph, of aten's ops."""

    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    @contextmanager
    def capture(self) -> Iterator[None]:
        Graph.capturing = True
        with self:
            yield
        Graph.capturing = False

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.cuda.make_graphed_callables asks of a GPU."""
    for name, function in {
        "CUDAGraph": Graph,
        "graph": lambda graph, pool=None: graph.capture(),
        "synchronize": lambda: None,
        "Stream": lambda: None,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(shared_casts, "captured", lambda _: Graph.capturing)


class Pair(nn.Module):
    """Two products of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = fp8_linear(seed=1), fp8_linear(seed=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x) * self.k(x)
        return y


def gradients(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach().clone(), x.grad, *(each.grad.clone() for each in model.parameters())]


def test_a_graphed_module_gives_the_bits_of_eager() -> None:
    """With other inputs, and with codes that a step has written since."""
    model, plain, seen = Pair(), Pair(), []
    graphed = torch.cuda.make_graphed_callables(model, (random(20, 160).requires_grad_(),))
    graphed.q.weight.register_post_accumulate_grad_hook(seen.append)
    dy = random(20, 96, seed=5)
    for seed in (2, 3):
        x = random(20, 160, seed=seed)
        found, wanted = gradients(graphed, x, dy), gradients(plain, x, dy)
        assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))
        for each in (model, plain):
            each.q.weight.matrix.store(each.q.weight.matrix.values() * 1.5)
    assert len(seen) == 2
    assert seen[0] is model.q.weight


def test_a_graph_has_the_cast_of_an_input_that_was_cast_before() -> None:
    """Without it a replay would multiply what the input was."""
    layer, x, graph = fp8_linear(), random(20, 160), Graph()
    with torch.no_grad():
        layer(x)
        with graph.capture():
            y = layer(x)
        x.copy_(random(20, 160, seed=2))
        graph.replay()
        assert torch.equal(y, layer(random(20, 160, seed=2)))
