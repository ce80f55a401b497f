"""What users do with ZeRO 3 beside plain training: it comes out as under ZeRO 2, or is refused by name."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from engines import (
    SMALL,
    Lines,
    assert_same_bits,
    batches,
    build,
    ds_config,
    packed,
    train_losses,
    weight_bits,
    whole_states,
    zero3,
)
from grids import some_of
from ranks import RankPools
from torch import Tensor, nn
from train_lm import ByteGPT

import ds_fp8
from ds_fp8.zero_fp8.comm.agreement import gather_objects

SECONDS = 60.0  # until what takes a few counts as a hang
Gathered = deepspeed.zero.GatheredParameters


def config_of(stage: int, level: str = "O2", **keys: int) -> dict[str, Any]:
    zero = {**zero3(persistence=100, prefetch=5000, reuse=0), **keys} if stage == 3 else {}
    return ds_config({"opt_level": level}, stage=stage, bucket=5000, zero=zero)


def gpt() -> nn.Module:
    return ByteGPT(SMALL)


def make(stage: int, model: Callable[[], nn.Module] = gpt, level: str = "O2", **keys: int) -> Any:
    torch.manual_seed(0)
    return build(config_of(stage, level, **keys), model())


def outcome(engine: Any) -> dict[str, Any]:
    """What a training has come to, on all ranks together."""
    states = whole_states(gather_objects(packed(engine.optimizer), dist.get_world_group()))
    return {"weights": weight_bits(engine), "states": states, "norm": engine.get_global_grad_norm()}


def assert_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    for key in ("weights", "states"):
        assert_same_bits(first[key], second[key])
    assert {**first, "weights": 0, "states": 0} == {**second, "weights": 0, "states": 0}


def trained(engine: Any, steps: int = 3) -> dict[str, Any]:
    losses = train_losses(engine, batches(engine), steps)
    found = {**outcome(engine), "losses": losses}
    engine.destroy()
    return found


# The same start


def created(**options: Any) -> nn.Module:
    with deepspeed.zero.Init(**options):
        return ByteGPT(SMALL)


def with_config() -> nn.Module:
    return created(config_dict_or_path=config_of(3))


def without_config() -> nn.Module:
    return created(dtype=torch.bfloat16, mem_efficient_linear=False)


def before_register() -> nn.Module:
    ds_fp8.unregister()
    try:
        return with_config()
    finally:
        ds_fp8.register()


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False).to(torch.bfloat16)
        self.up = nn.Linear(4, base.out_features, bias=False).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.up(self.down(x))
        return adapted


def adapted(model: nn.Module) -> nn.Module:
    """Adapters that are made when the base is there, cut or not."""
    model.requires_grad_(False)
    torch.manual_seed(5)
    for block in model.blocks:
        block.up, block.down = Adapted(block.up), Adapted(block.down)
    return model


class Odd(ByteGPT):
    """Parameters of one element, of none, of a block and one more, of fewer blocks than ranks."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.unused = nn.Linear(7, 5)
        self.empty = nn.Parameter(torch.zeros(0))
        self.one = nn.Parameter(torch.ones(1))
        self.long = nn.Parameter(torch.ones(129))

    def forward(self, text: Tensor) -> Tensor:
        return super().forward(text) + 0.01 * (self.one.float().sum() + self.long.float().square().sum())


class Tiny(nn.Module):
    """Fewer blocks than ranks in all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1)

    def forward(self, text: Tensor) -> Tensor:
        x: Tensor = self.layer(text[:, :5].to(self.layer.weight.dtype) / 100)
        return x.float().square().mean()


def starts() -> None:
    plain = trained(make(2))
    for start in (gpt, with_config, without_config, before_register):
        assert_same(trained(make(3, start)), plain)
    assert_same(trained(make(3, lambda: adapted(with_config()))), trained(make(2, lambda: adapted(gpt()))))
    for model in (Odd, Tiny):
        for persistence in (0, 10**6):
            ours = make(3, model, stage3_param_persistence_threshold=persistence)
            assert_same(trained(ours), trained(make(2, model)))


@some_of(["world_size"], [[3], [1], [2]], 1)
def test_a_model_starts_alike_however_it_was_made(ranks: RankPools, world_size: int) -> None:
    ranks.run(world_size, starts, seconds=SECONDS)


# One engine after the other


def one_after_the_other(first: int, second: int, destroyed: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ByteGPT(SMALL)
    earlier = build(config_of(first), model)
    losses = train_losses(earlier, batches(earlier), 2)
    if destroyed:
        earlier.destroy()
    later = build(config_of(second), model)
    found = trained(later)
    if not destroyed:
        with pytest.raises(RuntimeError, match="trained by an engine that was made after it"):
            earlier.step()
    earlier.destroy()
    return {**found, "first losses": losses}


def engines() -> None:
    expected = one_after_the_other(2, 2, destroyed=True)
    for first, destroyed in ((3, True), (3, False), (2, False)):
        assert_same(one_after_the_other(first, 3, destroyed), expected)
    with pytest.raises(ValueError, match=r'received "slices.*allowed: whole parameters under ZeRO 1 and 2'):
        one_after_the_other(3, 2, destroyed=True)


def test_engines_of_one_model(ranks: RankPools) -> None:
    ranks.run(2, engines, seconds=SECONDS)


def left() -> None:
    """By an engine that is destroyed, and of one that lives when ds_fp8 leaves DeepSpeed."""
    engine = make(3)
    train_losses(engine, batches(engine), 2)
    weights, parameters = weight_bits(engine), list(engine.module.parameters())
    ds_fp8.unregister()
    try:
        for group in (parameters, *([each] for each in parameters)):
            with Gathered(group, modifier_rank=0):
                pass
        assert_same_bits(weight_bits(engine), weights)
        train_losses(engine, batches(engine), 1)
    finally:
        ds_fp8.register()
    weights = weight_bits(engine)
    engine.destroy()
    assert_same_bits(weight_bits(engine), weights)
    assert [safe_get_full_fp32_param(each) for each in parameters] == [None for _ in parameters]
    for module in engine.module.modules():
        assert not {"pre_bwd_fn", "post_bwd_fn"} & module.__dict__.keys()
    assert not any(each._post_accumulate_grad_hooks for each in parameters)


def test_what_an_engine_leaves(ranks: RankPools) -> None:
    ranks.run(2, left, seconds=SECONDS)


# Weights that are read and written


def double(stage: int, parameters: list[nn.Parameter]) -> None:
    if stage == 2:
        for each in parameters:
            each.data = each.data * 2
        return
    with Gathered(parameters, modifier_rank=0):
        for each in parameters if dist.get_rank() == 0 else ():
            each.data.mul_(2)


def written(level: str) -> list[str]:
    lines, found = Lines(), []
    logging.getLogger("ds_fp8").addHandler(lines)
    for stage in (2, 3):
        engine = make(stage, level=level)
        train_losses(engine, batches(engine), 2)
        double(stage, [engine.module.head.weight, engine.module.norm.weight])
        found.append({"doubled": weight_bits(engine)["head.weight"].tolist(), **trained(engine)})
    logging.getLogger("ds_fp8").removeHandler(lines)
    assert_same(*found)
    return [line for line in lines.lines if "weights replaced" in line]


@pytest.mark.parametrize(("level", "said"), [("O2", 2), ("O2+", 0)])
def test_writing_within_gathered_parameters(ranks: RankPools, level: str, said: int) -> None:
    """Masters do not follow, which is said once by each engine; split ones do."""
    lines, _ = ranks.run(2, written, level, seconds=SECONDS)
    assert len(lines) == said
    assert all("head.weight, norm.weight" in line for line in lines)


class Peeking(ByteGPT):
    """Reads weights of a later block, which may be under way, and others within, in the middle of forward."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        block = self.blocks[1]
        ahead = [block.up.weight, block.down.weight, block.up.bias]
        self.others = {"ahead": ahead, "far": [self.tokens.weight]}  # no attributes, which forward fetches
        self.read: list[float] = []
        self.statuses: set[str] = set()
        self.blocks[0].up.register_forward_hook(self.peek)

    def peek(self, *_: Any) -> None:
        ahead, far = self.others.values()
        self.statuses |= {str(getattr(each, "ds_status", "")) for each in ahead}
        with whole(ahead):
            self.read += [float(each.detach().float().square().sum()) for each in ahead]
            with whole(far):
                self.read += [float(each.detach().float().square().sum()) for each in far]


def whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = Gathered(parameters) if parameters else nullcontext()
    return context


def peeked() -> set[str]:
    def run(stage: int, **keys: int) -> tuple[dict[str, Any], set[str]]:
        engine = make(stage, Peeking, **keys)
        model = engine.module
        found = trained(engine, steps=5)
        return {**found, "read": model.read}, model.statuses

    (expected, _), statuses = run(2), set()
    for prefetch, persistence in ((5000, 100), (0, 0), (5000, 10**6)):
        keys = {
            "stage3_prefetch_bucket_size": prefetch,
            "stage3_param_persistence_threshold": persistence,
        }
        found, seen = run(3, **keys)
        assert_same(found, expected)
        statuses |= seen
    return statuses


def test_weights_that_are_under_way_can_be_read(ranks: RankPools) -> None:
    for statuses in ranks.run(2, peeked, seconds=SECONDS):
        assert {each.rpartition(".")[2] for each in statuses} == {"AVAILABLE", "NOT_AVAILABLE", "INFLIGHT"}


def retained(stage: int) -> dict[str, Any]:
    """Two backwards over each graph."""
    engine = make(stage)
    source: Iterator[Tensor] = batches(engine)
    for _ in range(3):
        loss = engine(next(source))
        engine.backward(loss, retain_graph=True)
        engine.backward(2 * loss)
        engine.step()
    found = outcome(engine)
    engine.destroy()
    return found


def test_a_retained_graph_has_another_backward(ranks: RankPools) -> None:
    for two, three in zip(*(ranks.run(2, retained, stage, seconds=SECONDS) for stage in (2, 3)), strict=True):
        assert_same(three, two)


# Refused


def edits() -> list[str]:
    """Edits of one rank between backward and step; training goes on from the slices."""
    engine, said = make(3), []
    source = batches(engine)
    train_losses(engine, source, 1)
    persistent, fetched = engine.module.norm.weight, engine.module.head.weight
    changes: list[tuple[int, nn.Parameter, Callable[[Any], Tensor]]] = [
        (1, persistent, lambda each: each.data.new_zeros(7)),
        (1, persistent, lambda each: each.data.float()),
        (0, persistent, lambda each: each.data * 2),
        (1, fetched, lambda each: each.data.new_zeros(each.ds_shape)),
    ]
    for rank, parameter, change in changes:
        before = weight_bits(engine)
        engine.optimizer.fetching.fetch_persistent()
        engine.backward(engine(next(source)))
        if dist.get_rank() == rank:
            parameter.data = change(parameter)
        with pytest.raises(ValueError, match=f"rank {rank}: ") as caught:
            engine.step()
        said.append(str(caught.value))
        assert_same_bits(weight_bits(engine), before)
    persistent.data = persistent.data.clone()
    train_losses(engine, source, 1)
    engine.destroy()
    return said


def test_replaced_weights_are_refused_on_every_rank(ranks: RankPools) -> None:
    for said in ranks.run(2, edits, seconds=SECONDS):
        assert "norm.weight: received [7] of torch.bfloat16" in said[0]
        assert "norm.weight: received torch.float32 on cpu" in said[1]
        assert "norm.weight: received [32] of torch.bfloat16" in said[2]
        assert "head.weight: received [256, 32]" in said[3]
        assert all("GatheredParameters(..., modifier_rank=0)" in said[place] for place in (0, 2, 3))


def strangers() -> list[str]:
    said = []
    for change in ("exchange", "assign"):
        engine = make(3)
        if change == "exchange":
            engine.module.head = nn.Linear(32, 256, bias=False).to(torch.bfloat16)
        else:
            engine.module.load_state_dict(engine.module.state_dict(), assign=True)
        with pytest.raises(ValueError, match="was not in the model") as caught:
            train_losses(engine, batches(engine), 1)
        said.append(str(caught.value))
        engine.destroy()
    return said


def test_parameters_that_come_later_are_refused(ranks: RankPools) -> None:
    for exchanged, assigned in ranks.run(2, strangers, seconds=SECONDS):
        assert exchanged.startswith("rank 0: head.weight: received a parameter")
        assert assigned.startswith("tokens.weight: received a parameter")


def raise_half_way(stage: int) -> tuple[dict[str, Any], int]:
    """A backward that raises at one place on every rank, where ranks have launched other buckets."""
    engine = make(stage)
    source = batches(engine)
    train_losses(engine, source, 2)
    reducer = engine.optimizer.gradients
    first = next(iter(engine.module.parameters()))
    failing = first.register_hook(lambda _: 1 // 0)
    if stage == 3 and dist.get_rank() == 1:  # as if buckets took long there
        reducer._has_room = lambda: False
    with pytest.raises(ZeroDivisionError):
        engine.backward(engine(next(source)))
    launched = reducer._next
    failing.remove()
    reducer.__dict__.pop("_has_room", None)
    train_losses(engine, source, 2)
    found = outcome(engine)
    engine.destroy()
    return found, launched


def test_after_a_backward_that_raised_ranks_agree_on_what_has_left(ranks: RankPools) -> None:
    two, three = (ranks.run(2, raise_half_way, stage, seconds=SECONDS) for stage in (2, 3))
    (_, most), (_, none) = three
    assert most > none == 0
    for (one, _), (other, _) in zip(two, three, strict=True):
        assert_same(one, other)
