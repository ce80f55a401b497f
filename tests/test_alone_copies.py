"""Copies of FP8AdamW go on bit for bit: deepcopy, pickle, torch.save, torch.distributed.checkpoint.

torch.optim.AdamW is the yardstick: what its copies do, ours do, by the same calls.
"""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from ds_fp8 import FP8AdamW

STOCHASTIC = {"optimizer": {"master_dtype": "split8", "rounding": "stochastic", "seed": 7}}
LEVELS: tuple[dict[str, Any], ...] = ({}, {"opt_level": "O1"}, {"opt_level": "O2+"}, STOCHASTIC)
each_level = pytest.mark.parametrize("fp8", LEVELS, ids=["O2", "O1", "O2+", "stochastic"])
Run = tuple[nn.Module, FP8AdamW]


def fresh(fp8: dict[str, Any], seed: int = 0, lr: float = 1e-2) -> Run:
    """Two param groups; odd widths, a frozen parameter and, in FP32, values that FP16 cannot hold."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 33), nn.GELU(), nn.Linear(33, 8))
    split = fp8 is STOCHASTIC or fp8.get("opt_level") == "O2+"
    net.to(torch.bfloat16 if split else torch.float32)
    net[2].bias.requires_grad_(False)
    first, *others = net.parameters()
    groups = [{"params": [first], "weight_decay": 0.1}, {"params": others, "lr": lr / 2}]
    return net, FP8AdamW(groups, lr=lr, betas=(0.9, 0.95), fp8=fp8)


def train(run: Run, steps: range, scheduler: LambdaLR | None = None) -> None:
    net, optimizer = run
    dtype = next(net.parameters()).dtype
    for step in steps:
        inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        (net(inputs) - inputs[:, :8].sin()).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def bits(run: Run) -> list[Any]:
    """Weights, states, counters and hyperparameters."""
    net, optimizer = run
    states = [optimizer.state.get(each, {}) for each in net.parameters()]
    groups = [
        {key: value for key, value in each.items() if key != "params"} for each in optimizer.param_groups
    ]
    values = [
        *net.parameters(),
        *(each for state in states for each in state.values() if isinstance(each, Tensor)),
    ]
    numbers = [[each for each in state.items() if not isinstance(each[1], Tensor)] for state in states]
    return [
        [bytes(each.detach().contiguous().view(-1).view(torch.uint8).numpy()) for each in values],
        numbers,
        [{**group, "betas": tuple(group["betas"])} for group in groups],
    ]


def reread(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_state_dict(fp8: dict[str, Any], run: Run, _: Path) -> Run:
    saved = reread([each.state_dict() for each in run])
    copied = fresh(fp8, seed=3, lr=1.0)
    for each, state in zip(copied, saved, strict=True):
        each.load_state_dict(state)
    return copied


def by_checkpoint(fp8: dict[str, Any], run: Run, folder: Path, **options: bool) -> Run:
    """As torch's own recipes do: into the state dict of a run that has not stepped."""
    how, copied = StateDictOptions(**options), fresh(fp8, seed=3, lr=1.0)
    dcp.save(dict(zip("mo", get_state_dict(*run, options=how), strict=True)), checkpoint_id=folder)
    states = dict(zip("mo", get_state_dict(*copied, options=how), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(*copied, model_state_dict=states["m"], optim_state_dict=states["o"], options=how)
    return copied


def by_optimizer_state_dict(fp8: dict[str, Any], run: Run, _: Path) -> Run:
    """Only the optimizer's, after the weights; through a file that holds plain values only."""
    saved, copied = reread(get_optimizer_state_dict(*run)), fresh(fp8, seed=3, lr=1.0)
    copied[0].load_state_dict(run[0].state_dict())
    set_optimizer_state_dict(*copied, optim_state_dict=saved)
    return copied


Copier = Callable[[dict[str, Any], Run, Path], Run]
WAYS: dict[str, Copier] = {
    "deepcopy": lambda _, run, __: copy.deepcopy(run),
    "pickle": lambda _, run, __: pickle.loads(pickle.dumps(run)),
    "torch.save": by_state_dict,
    "checkpoint": by_checkpoint,
    "checkpoint, flattened": partial(by_checkpoint, flatten_optimizer_state_dict=True),
    "checkpoint, on the host": partial(by_checkpoint, full_state_dict=True, cpu_offload=True),
    "optimizer state dict": by_optimizer_state_dict,
    "deepcopy of a copy": lambda fp8, run, folder: copy.deepcopy(by_state_dict(fp8, run, folder)),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@each_level
@each_way
def test_a_copy_goes_on_bit_for_bit(fp8: dict[str, Any], way: Copier, tmp_path: Path) -> None:
    """Weights, states, steps, clamp, random bits; and neither the original nor the copy feels the other."""
    run, twin = fresh(fp8), fresh(fp8)
    for each in (run, twin):
        train(each, range(3))
    copied = way(fp8, run, tmp_path / "dcp")
    assert bits(run) == bits(twin)
    assert bits(copied) == bits(twin)
    train(copied, range(3, 6))
    assert bits(run) == bits(twin)
    for each in (run, twin):
        train(each, range(3, 6))
    assert bits(copied) == bits(run) == bits(twin)


@each_level
@each_way
def test_a_copy_from_before_the_first_step_too(fp8: dict[str, Any], way: Copier, tmp_path: Path) -> None:
    """torch.distributed.checkpoint steps an optimizer once to see its states; that step does not count."""
    run, twin = fresh(fp8), fresh(fp8)
    copied = way(fp8, run, tmp_path / "dcp")
    for each in (run, twin, copied):
        train(each, range(3))
    assert bits(copied) == bits(run) == bits(twin)


def test_weights_loaded_after_a_first_checkpoint_count() -> None:
    """A master is made at the first step, from the weight of then."""
    run, twin, pretrained = fresh({}), fresh({}), fresh({}, seed=5)[0].state_dict()
    get_state_dict(*run)
    for each in (run, twin):
        each[0].load_state_dict(pretrained)
        train(each, range(2))
    assert bits(run) == bits(twin)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_with_its_scheduler_goes_on(way: Callable[[Any], Any]) -> None:
    """The learning rates of the copy are the copied scheduler's, as with torch's."""
    ends = []
    for kind in (FP8AdamW, torch.optim.AdamW):
        net = fresh({})[0]
        optimizer = kind(net.parameters(), lr=1e-2)
        scheduler = LambdaLR(optimizer, warm_up)
        train((net, optimizer), range(3), scheduler)
        copied = way((net, optimizer, scheduler))
        for run in (copied, (net, optimizer, scheduler)):
            train(run[:2], range(3, 6), run[2])
        assert all(map(torch.equal, net.parameters(), copied[0].parameters()))
        ends.append((optimizer.param_groups[0]["lr"], copied[1].param_groups[0]["lr"]))
    assert ends[0] == ends[1]


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 5)


def test_a_copy_takes_new_groups_and_keeps_its_formats() -> None:
    """Also if the mapping that named them has changed meanwhile."""
    fp8 = {"opt_level": "O1"}
    run = fresh(fp8)
    train(run, range(1))
    fp8["opt_level"] = "O2"
    _, optimizer = copied = copy.deepcopy(run)
    extra = nn.Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(5)
    train(copied, range(1, 2))
    assert optimizer.param_groups[2]["fp8"]["master"] == "fp32"
    assert len(optimizer.clamp_squares) == 3


def test_hooks_see_the_whole_state_dict() -> None:
    """Those on saving and on loading, in torch's order: what a hook puts in its place is what is loaded."""
    run, copied, seen = fresh({}), fresh({}, seed=3), []
    train(run, range(2))
    run[1].register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    run[1].register_state_dict_post_hook(lambda _, saved: {"packed": saved})
    copied[1].register_load_state_dict_pre_hook(lambda _, given: given["packed"])
    copied[1].register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    copied[0].load_state_dict(run[0].state_dict())
    copied[1].load_state_dict(run[1].state_dict())
    assert seen == ["before saving", 3]
    assert bits(copied) == bits(run)


def test_states_of_other_formats_do_not_pass_through_a_checkpoint(tmp_path: Path) -> None:
    """BF16 and FP16 states have as many bytes; the groups say which they are."""
    run = fresh({"optimizer": {"master_dtype": "bf16", "rounding": "stochastic"}})
    train(run, range(2))
    with pytest.raises((ValueError, RuntimeError, dcp.api.CheckpointException)):
        by_checkpoint({}, run, tmp_path / "dcp")
    saved, other = get_optimizer_state_dict(*run), fresh({})
    with pytest.raises(ValueError, match=r"fp8\.master: received 'bf16', expected 'fp16'"):
        set_optimizer_state_dict(*other, optim_state_dict=saved)
