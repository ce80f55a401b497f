"""FP8 weights in an engine whose user does what plain PyTorch allows."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from engines import Lines, build, ds_config
from fp8_weights import fp8_linear, random
from ranks import RankPools
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.utils.checkpoint import checkpoint

from ds_fp8.zero_fp8.products import kernels, shared_casts

O3 = {"opt_level": "O3", "weights": {"min_elements": 4096}}
SECONDS = 60.0


class Parallel(nn.Module):
    """Two matrices that get the model's input itself, so that no other input is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(64, 64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x)


@contextmanager
def engine_of(fp8: dict[str, Any], stage: int = 2) -> Iterator[Any]:
    torch.manual_seed(0)
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        engine = build(ds_config(fp8, stage=stage), Parallel())
    yield engine
    engine.destroy()


def refill(stage: int) -> list[bool]:
    """Whether outputs are those of a buffer that numpy has filled."""
    x, found = torch.zeros(4, 64, dtype=torch.bfloat16), []
    with engine_of(O3, stage) as engine, torch.no_grad():
        for seed in range(3):
            x.view(torch.int16).numpy()[:] = random(4, 64, seed=seed).view(torch.int16).numpy()
            got = engine(x)
            found.append(bool(got.any()) and torch.equal(got, engine.module(x.clone())))
            engine(x)
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_a_buffer_may_be_refilled(ranks: RankPools, stage: int) -> None:
    assert ranks.run(1, refill, stage)[0] == [True] * 3


def masters_after(fp8: dict[str, Any], default: torch.dtype) -> list[Tensor]:
    """Masters after three steps, the last of which clips, under another default dtype."""
    with engine_of(fp8) as engine:
        torch.set_default_dtype(default)
        try:
            for seed in range(3):
                x = random(4, 64, seed=seed).requires_grad_()
                loss = engine(x).float().square().sum() * 10**seed
                engine.backward(loss)
                engine.step()
        finally:
            torch.set_default_dtype(torch.float32)
        return [safe_get_full_fp32_param(each) for each in engine.module.parameters()]


TENSOR = {"opt_level": "O2", "scaling": "tensor", "gradients": {"reduction": "fp8"}}


@pytest.mark.parametrize("fp8", [{"opt_level": "O2+"}, TENSOR, O3], ids=lambda fp8: fp8["opt_level"])
def test_the_default_dtype_may_change(ranks: RankPools, fp8: dict[str, Any]) -> None:
    wanted, *others = (
        ranks.run(2, masters_after, fp8, each, seconds=SECONDS)[0]
        for each in (torch.float32, torch.float64, torch.bfloat16)
    )
    for found in others:
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def go_around(jagged: bool) -> list[str]:
    """What is logged of a step whose gradient is not finite."""
    lines = Lines()
    logging.getLogger("ds_fp8").addHandler(lines)
    with engine_of(O3) as engine:
        parts = [random(each, 64) for each in (3, 5)]
        x = torch.nested.nested_tensor(parts, layout=torch.jagged) if jagged else torch.cat(parts)
        y = engine.module(x)
        (y.values() if jagged else y * torch.inf).float().mean().backward()
        engine.step()
    logging.getLogger("ds_fp8").removeHandler(lines)
    return [each for each in lines.lines if "no product has multiplied" in each]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_weights_that_were_passed_by_are_named(ranks: RankPools) -> None:
    (line,) = ranks.run(1, go_around, True)[0]
    assert line.startswith("right.weight, left.weight: ")
    assert ranks.run(1, go_around, False)[0] == []


def count_casts(checkpointed: bool, stage: int) -> int:
    """Of inputs, in a forward and its backward."""
    x = random(4, 64).requires_grad_()
    with engine_of(O3, stage) as engine:
        if checkpointed:
            model, forward = engine.module, engine.module.forward
            model.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
        with patch.object(kernels, "cast_input", wraps=kernels.cast_input) as cast:
            engine.backward(engine(x).float().square().sum())
    return cast.call_count


@pytest.mark.parametrize(("stage", "checkpointed"), [(2, 2), (3, 3)])
def test_a_forward_casts_an_input_once(ranks: RankPools, stage: int, checkpointed: int) -> None:
    """And so does one that is done again. ZeRO 3's aliases are not known in a first one without autograd."""
    assert [ranks.run(1, count_casts, each, stage)[0] for each in (False, True)] == [1, checkpointed]


def test_an_alias_lies_in_the_same_storage() -> None:
    """Another storage may have the memory of one that something keeps."""
    x = random(4, 64).requires_grad_()
    memory = bytearray(x.detach().view(torch.uint8).numpy().tobytes())
    first, second = (
        torch.frombuffer(memory, dtype=torch.bfloat16).view(4, 64).requires_grad_() for _ in range(2)
    )
    alias = shared_casts.Alias(first)
    assert first.data_ptr() == second.data_ptr()
    assert [alias.is_alias_of(each) for each in (first, first.detach(), first.view(4, 64), second)] == [
        True,
        False,
        True,
        False,
    ]


def test_a_value_that_is_on_its_way_is_waited_for(ranks: RankPools) -> None:
    assert ranks.run(2, multiply_what_arrives) == [True] * 2


def multiply_what_arrives() -> bool:
    layer, x = fp8_linear(), random(3, 160)
    arriving = all_reduce(x, "sum", torch.distributed.group.WORLD)
    return torch.equal(layer(arriving), layer(2 * x))
