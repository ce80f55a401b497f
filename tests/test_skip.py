"""A gradient that is not finite, on any rank, skips the step everywhere and changes nothing."""

from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import assert_same_bits, batches, build_gpt, ds_config, state_bits, weight_bits
from ranks import RankPools
from torch import Tensor

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 100}}


def poison(engine: Any, rank: int, value: float) -> Any:
    """Put `value` into one element of a gradient on one rank until the handle is removed."""

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[5] = value
        return spoiled

    parameter = engine.module.blocks[0].up.weight
    return parameter.register_hook(spoil) if dist.get_rank() == rank else None


def step(engine: Any, source: Any) -> None:
    engine.backward(engine(next(source)))
    engine.step()


def skip_one(stage: int, value: float) -> dict[str, Any]:
    engine = build_gpt(ds_config({}, stage=stage, scheduler=WARMUP))
    source = batches(engine)
    for _ in range(3):
        step(engine, source)
    states, weights = state_bits(engine.optimizer), weight_bits(engine)
    lr, schedule = engine.get_lr(), engine.lr_scheduler.last_batch_iteration
    steps = engine.optimizer.optimizer.steps

    handle = poison(engine, 1, value)
    step(engine, source)
    if handle is not None:
        handle.remove()
    assert_same_bits(state_bits(engine.optimizer), states)
    assert_same_bits(weight_bits(engine), weights)
    result = {
        "overflow": engine.optimizer.overflow,
        "skipped": engine.skipped_steps,
        "counted": engine.optimizer.optimizer.steps - steps,
        "lr": (lr, engine.get_lr()),
        "schedule": (schedule, engine.lr_scheduler.last_batch_iteration),
    }
    step(engine, source)
    result["after"] = engine.optimizer.overflow
    result["moved"] = any(not torch.equal(now, weights[name]) for name, now in weight_bits(engine).items())
    engine.destroy()
    return result


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_rank_skips(ranks: RankPools, stage: int, value: float) -> None:
    for found in ranks.run(2, skip_one, stage, value):
        assert found["overflow"]
        assert found["skipped"] == 1
        assert found["counted"] == 0
        assert found["lr"][0] == found["lr"][1]
        assert found["schedule"][0] == found["schedule"][1]
        assert not found["after"]
        assert found["moved"]


def skip_until_error(limit: int | None) -> tuple[int, str]:
    section = {} if limit is None else {"max_consecutive_skips": limit}
    engine = build_gpt(ds_config(section))
    source = batches(engine)
    step(engine, source)
    poison(engine, 1, float("nan"))
    message = ""
    skipped = 0
    while not message and skipped < 100:
        skipped += 1
        try:
            step(engine, source)
        except RuntimeError as error:
            message = str(error)
    engine.destroy()
    return skipped, message


@pytest.mark.parametrize(("limit", "expected"), [(None, 50), (3, 3)])
def test_too_many_skips_in_a_row_raise(ranks: RankPools, limit: int | None, expected: int) -> None:
    for skipped, message in ranks.run(2, skip_until_error, limit):
        assert skipped == expected
        assert "fp8.max_consecutive_skips" in message
        assert "blocks.0.up.weight" in message


def skips_with_a_break() -> int:
    engine = build_gpt(ds_config({"max_consecutive_skips": 3}))
    source = batches(engine)
    for _ in range(3):
        handle = poison(engine, 0, float("inf"))
        step(engine, source)
        step(engine, source)
        if handle is not None:
            handle.remove()
        step(engine, source)
    skipped: int = engine.skipped_steps
    engine.destroy()
    return skipped


def test_a_good_step_starts_the_count_again(ranks: RankPools) -> None:
    assert ranks.run(2, skips_with_a_break) == [6, 6]


def step_without_backward() -> str:
    engine = build_gpt(ds_config({}))
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_step_needs_a_gradient(ranks: RankPools) -> None:
    assert "engine.backward" in ranks.run(1, step_without_backward)[0]
