"""What Hugging Face does in silence, and what we say to it."""

import logging
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from engines import weight_bits
from hf_runs import FP8, GPT2, ds_config, forget_accelerate, trainer_of
from hf_trainer import build_model, split_corpus
from ranks import RankPools
from torch.utils.data import DataLoader, Subset

import ds_fp8
from ds_fp8.hf import FP8StatsCallback

MEASURED = {**FP8, "stats": {"interval": 1}}
STEPS = 4


def prepare(config: dict[str, Any]) -> tuple[Accelerator, list[Any]]:
    """Plain accelerate, with a scheduler that knows the client's optimizer only.

    What is prepared: model, optimizer, scheduler, batches.
    """
    forget_accelerate()
    PartialState(cpu=True)
    accelerator = Accelerator(mixed_precision="bf16", deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = build_model(GPT2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 4) / 4)
    batches = DataLoader(Subset(split_corpus(GPT2.context)[0], range(STEPS * 16)), 8)
    return accelerator, list(accelerator.prepare(model, optimizer, scheduler, batches))


def train_with_a_client_scheduler(fp8: dict[str, Any] | None) -> dict[str, Any]:
    accelerator, (engine, optimizer, scheduler, batches) = prepare(ds_config(fp8))
    unwrapped = accelerator.unwrap_model(engine) is engine.module
    start, rates, losses = weight_bits(engine), [], []
    for batch in batches:
        loss = engine(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert not optimizer.step_was_skipped
        rates.append(engine.optimizer.param_groups[0]["lr"])
        losses.append(loss.item())
    moved = [not torch.equal(start[name], bits) for name, bits in weight_bits(engine).items()]
    active = ds_fp8.is_active(engine)
    engine.destroy()
    return {"rates": rates, "losses": losses, "moved": moved, "unwrapped": unwrapped, "active": active}


@pytest.fixture(scope="module")
def accelerated(ranks: RankPools) -> list[dict[str, Any]]:
    """With FP8 and without."""
    return [ranks.run(2, train_with_a_client_scheduler, fp8)[0] for fp8 in (FP8, None)]


def test_shared_param_groups(accelerated: list[dict[str, Any]]) -> None:
    """A scheduler made before `prepare` sets the rate of the optimizer that replaces its own."""
    ours, stock = accelerated
    assert (ours["active"], stock["active"]) == (True, False)
    assert ours["rates"] == stock["rates"]
    assert ours["rates"][-1] > 0
    assert all(ours["moved"])
    for loss, expected in zip(ours["losses"], stock["losses"], strict=True):
        assert abs(loss - expected) < 0.01


def test_unwrap_model(accelerated: list[dict[str, Any]]) -> None:
    assert [each["unwrapped"] for each in accelerated] == [True, True]


def refusal_of(folder: str, make: str, config: dict[str, Any], options: dict[str, Any]) -> str:
    """What the Trainer or plain accelerate raises up to its first step."""
    try:
        if make == "accelerate":
            prepare(config)
        else:
            trainer_of(folder, config, max_steps=1, **options).train()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("make", ["Trainer", "accelerate"])
def test_an_auto_leaf(ranks: RankPools, tmp_path: Path, make: str) -> None:
    message = ranks.run(1, refusal_of, str(tmp_path), make, ds_config({**FP8, "block_size": "auto"}), {})[0]
    assert "fp8.block_size" in message


def test_the_mismatch_list(ranks: RankPools, tmp_path: Path) -> None:
    config = ds_config(FP8, gradient_clipping=0.5, bf16={"enabled": True})
    message = ranks.run(1, refusal_of, str(tmp_path), "Trainer", config, {"bf16": False})[0]
    assert "gradient_clipping=0.5 vs hf max_grad_norm=1.0" in message
    assert "bf16.enabled=True" in message


def train_with_optimizers(folder: str) -> dict[str, Any]:
    """`optimizers=` and its way out, `optimizer_cls_and_kwargs`."""
    results = {}
    model = build_model(GPT2)
    client = torch.optim.SGD(model.parameters(), lr=0.1)
    ways = {
        "optimizers": {"optimizers": (client, None)},
        "optimizer_cls_and_kwargs": {
            "optimizer_cls_and_kwargs": (ds_fp8.FP8AdamW, {"lr": 0.25, "eps": 1e-5})
        },
    }
    for name, given in ways.items():
        trainer = trainer_of(
            folder, ds_config(FP8), model=model, max_steps=1, lr_scheduler_type="constant", trainer=given
        )
        trainer.train()
        engine = trainer.model_wrapped
        rate = engine.optimizer.param_groups[0]["lr"]
        results[name] = (type(engine.basic_optimizer).__name__, rate, ds_fp8.is_active(engine))
        engine.destroy()
    return results


def test_optimizers_is_ignored(ranks: RankPools, tmp_path: Path) -> None:
    """The Trainer drops `optimizers=` and makes its AdamW; `optimizer_cls_and_kwargs` it obeys."""
    results = ranks.run(1, train_with_optimizers, str(tmp_path))[0]
    assert results["optimizers"] == ("FP8AdamW", 1e-3, True)
    assert results["optimizer_cls_and_kwargs"] == ("FP8AdamW", 0.25, True)


def train_with_the_callback(folder: str, fp8: dict[str, Any] | None, trap: str) -> str:
    """What the callback says of a training that is not, or not quite, FP8."""
    if trap == "not registered":
        ds_fp8.unregister()
    variables = {"ACCELERATE_USE_CPU": "1"} if trap == "ACCELERATE_USE_CPU" else {}
    try:
        with patch.dict(os.environ, variables):
            trainer = trainer_of(folder, ds_config(fp8), max_steps=1)
            trainer.add_callback(FP8StatsCallback(trainer))
            trainer.train()
    except ValueError as error:
        return str(error)
    finally:
        ds_fp8.register()
    return "nothing was refused"


@pytest.mark.parametrize(
    ("fp8", "trap", "message"),
    [
        (MEASURED, "not registered", 'whose "fp8" section was not read'),
        (MEASURED, "ACCELERATE_USE_CPU", "of a DistributedDataParallel and not of a DeepSpeed engine"),
        (None, "no section", 'allowed: a ds_config with "fp8": {"enabled": true}'),
        (FP8, "no interval", "fp8.stats.interval: received 0, allowed: 1 or more"),
        (MEASURED, "none", "nothing was refused"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_the_callback_refuses_to_say_nothing(
    ranks: RankPools, tmp_path: Path, fp8: dict[str, Any] | None, trap: str, message: str
) -> None:
    assert message in ranks.run(2, train_with_the_callback, str(tmp_path), fp8, trap)[0]


def train_unregistered(folder: str) -> bool:
    ds_fp8.unregister()
    try:
        trainer = trainer_of(folder, ds_config(FP8), max_steps=1)
        trainer.train()
    finally:
        ds_fp8.register()
    active = ds_fp8.is_active(trainer.model_wrapped)
    trainer.model_wrapped.destroy()
    return active


def test_a_section_that_is_not_registered_is_ignored(ranks: RankPools, tmp_path: Path) -> None:
    """By everybody, in silence: the banner, `is_active` and the callback are how to know."""
    assert ranks.run(1, train_unregistered, str(tmp_path))[0] is False


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def train_listening(folder: str) -> tuple[list[str], int]:
    listener = Listener()
    logging.getLogger("ds_fp8").addHandler(listener)
    trainer = trainer_of(folder, ds_config(FP8), max_steps=1)
    trainer.train()
    logging.getLogger("ds_fp8").removeHandler(listener)
    trainer.model_wrapped.destroy()
    return listener.messages, deepspeed.utils.logger.level


def test_the_banner_is_seen_where_deepspeed_is_muted(ranks: RankPools, tmp_path: Path) -> None:
    messages, level = ranks.run(1, train_listening, str(tmp_path))[0]
    assert level > logging.INFO
    assert any(": ON, O2, ZeRO 2, 1 rank |" in each for each in messages)
