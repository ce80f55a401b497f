"""Whose a parameter, its memory and its hyperparameters are: an engine's, a tensor's, a client's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import build, ds_config
from ranks import RankPools
from torch import Tensor, nn

FP8 = {"opt_level": "O1", "gradients": {"dtype": "bf16"}}


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4))


def make(module: nn.Module | None = None, stage: int = 2, micro_steps: int = 1, **options: Any) -> Any:
    config = ds_config(FP8, stage=stage, micro_steps=micro_steps, clipping=0.0, bf16=False, weight_decay=0.0)
    if "optimizer" in options:
        del config["optimizer"]
    return build(config, module or model(), **options)


def loss_of(engine: Any) -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    loss: Tensor = engine(torch.randn(6, 8, generator=generator)).square().mean()
    return loss


def train(engine: Any) -> float:
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(loss_of(engine))
        engine.step()
    return float(engine.get_global_grad_norm())


def message(act: Callable[[], object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def two_engines() -> tuple[float, float, str, str]:
    """Norms of a second engine of one module, and of a first; what the first says then."""
    module = model()
    first = make(module, micro_steps=2)
    expected = make(model(), micro_steps=2)
    for _ in range(2):
        loss_of(expected).backward()
        expected.step()
    second = make(module, micro_steps=2)
    for _ in range(2):
        loss_of(second).backward()
        second.step()
    stepped, read = (
        message(first.optimizer.step, RuntimeError),
        message(module[0].weight.get_full_hp_grad, ValueError),
    )
    norms = [float(each.get_global_grad_norm()) for each in (second, expected)]
    first.destroy()
    train(second)
    for each in (second, expected):
        each.destroy()
    return norms[0], norms[1], stepped, read


def test_a_second_engine_takes_the_parameters_over(ranks: RankPools) -> None:
    for norm, expected, stepped, read in ranks.run(2, two_engines, seconds=60):
        assert norm == expected
        assert "trained by an engine that was made after it" in stepped
        assert "gradients exist only between" in read


def shared_memory(when: str) -> str:
    module = model()
    if when == "before":
        module[1] = nn.Linear(16, 16)
        module[1].weight.data = module[2].weight.data
        return message(lambda: make(module), ValueError)
    engine = make(module)
    engine.backward(loss_of(engine))
    module[2].weight.data = (
        module[0]
        .weight.data.view(-1)[:256]
        .new_zeros(0)
        .set_(module[0].weight.data.untyped_storage(), module[0].weight.storage_offset(), (16, 16))
    )
    return message(engine.step, ValueError)


@pytest.mark.parametrize("when", ["before", "after"])
def test_parameters_tied_by_data_are_refused(ranks: RankPools, when: str) -> None:
    for said in ranks.run(2, shared_memory, when):
        assert "received the memory of" in said
        assert "the same Parameter" in said


def freed() -> str:
    engine = make()
    engine.backward(loss_of(engine))
    if dist.get_rank() == 1:
        engine.module[0].weight.untyped_storage().resize_(0)
    return message(engine.step, ValueError)


def test_memory_that_was_given_back_is_named_on_every_rank(ranks: RankPools) -> None:
    for said in ranks.run(2, freed, seconds=60):
        assert "rank 1: " in said
        assert "received a storage that was resized" in said


class NoGradient(torch.autograd.Function):
    """A layer that adds to its weight's gradient by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, mine = ctx.weight, gradient.t() @ ctx.saved_tensors[0]
        weight.grad = mine if weight.grad is None else weight.grad + mine
        return gradient @ weight, None


class Negative(torch.autograd.Function):
    """Gradients whose sign is a lazy bit."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch._neg_view(-gradient)


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.how, self.layer = how, nn.Linear(8, 4, bias=False)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.how == "none":
            return self.out(NoGradient.apply(x, weight))
        weight = Negative.apply(weight) if self.how == "negative" else weight
        return self.out(nn.functional.linear(x, weight))


def odd_norm(how: str, stage: int) -> float:
    engine = make(Odd(how), stage=stage, micro_steps=2)
    for _ in range(2):
        if how == "none":
            loss_of(engine).backward()
        else:
            engine.backward(loss_of(engine))
        engine.step()
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return norm


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_with_a_lazy_sign_are_themselves(ranks: RankPools, stage: int) -> None:
    assert ranks.run(2, odd_norm, "negative", stage) == ranks.run(2, odd_norm, "plain", stage)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_function_without_a_gradient_is_passed_over(ranks: RankPools, stage: int) -> None:
    assert min(ranks.run(2, odd_norm, "none", stage)) > 0


def node_hook(later: bool) -> float:
    """Gradients halved by a hook on the node that accumulates, or before it."""
    engine = make()
    nodes = []
    for parameter in engine.module.parameters():

        def halve(*_: Any, parameter: nn.Parameter = parameter) -> None:
            parameter.grad.mul_(0.5)

        node = torch.autograd.graph.get_gradient_edge(parameter).node
        nodes.append(node)
        if later:
            node.register_hook(halve)
        else:
            parameter.register_hook(lambda gradient: gradient * 0.5)
    norm = train(engine)
    engine.destroy()
    return norm


def test_hooks_of_nodes_see_the_gradient_too(ranks: RankPools) -> None:
    assert ranks.run(2, node_hook, True) == ranks.run(2, node_hook, False)


def client(what: str) -> tuple[float, str]:
    """How far a weight has moved, and what was refused."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
    state = optimizer.state_dict()
    engine = make(module, optimizer=optimizer)
    said = ""
    if what == "loaded":
        state["param_groups"][0]["lr"] = 1e-5
        optimizer.load_state_dict(state)
    if what == "replaced":
        optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 1e-5}]
    before = module[0].weight.detach().clone()
    engine.backward(loss_of(engine))
    if what == "step":
        said = message(optimizer.step, RuntimeError)
    if what == "maximize":
        optimizer.param_groups[0]["maximize"] = True
        said = message(engine.step, ValueError)
    elif what == "group":
        said = message(lambda: optimizer.add_param_group({"params": [nn.Parameter(before)]}), ValueError)
    elif what == "handler's group":
        said = message(lambda: engine.optimizer.add_param_group({"params": []}), ValueError)
    else:
        engine.step()
    moved = float((module[0].weight - before).abs().max())
    engine.destroy()
    assert "step" not in vars(optimizer)
    return moved, said


@pytest.mark.parametrize("what", ["loaded", "replaced"])
def test_a_clients_hyperparameters_count_in_whichever_dicts(ranks: RankPools, what: str) -> None:
    for moved, _ in ranks.run(2, client, what):
        assert moved == pytest.approx(1e-5, rel=0.2)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("step", "allowed: engine.step()"),
        ("maximize", "optimizer.params.maximize: received True, allowed: false"),
        ("group", "a param group after deepspeed.initialize, allowed: before it"),
        ("handler's group", "a param group after deepspeed.initialize, allowed: before it"),
    ],
)
def test_what_a_clients_optimizer_cannot_do_is_refused(ranks: RankPools, what: str, words: str) -> None:
    for _, said in ranks.run(2, client, what):
        assert words in said


def stale_graph() -> str:
    engine = make()
    old = loss_of(engine)
    train(engine)
    said = message(lambda: engine.backward(old), RuntimeError)
    engine.zero_grad()
    train(engine)
    engine.destroy()
    return said


def test_a_graph_of_before_the_step_is_refused_as_in_pytorch(ranks: RankPools) -> None:
    for said in ranks.run(2, stale_graph):
        assert "modified by an inplace operation" in said


def raised_and_passed_by() -> tuple[float, float]:
    """A backward that raised, and then one of a loss that came through no forward of the engine."""
    engine = make()

    def fail(_: Tensor) -> None:
        raise ArithmeticError("planted")

    hook = engine.module[0].weight.register_hook(fail)
    message(lambda: engine.backward(loss_of(engine)), ArithmeticError)
    hook.remove()
    engine.backward(loss_of(engine.module))
    engine.step()
    found = float(engine.get_global_grad_norm())
    expected = train(make())
    return found, expected


def test_nothing_is_left_of_a_backward_that_raised_whatever_comes_next(ranks: RankPools) -> None:
    for found, expected in ranks.run(2, raised_and_passed_by):
        assert found == expected
