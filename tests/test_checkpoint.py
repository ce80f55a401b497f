"""A resumed run goes on bit for bit; what does not fit is refused before it changes anything."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import (
    SMALL,
    assert_same_bits,
    batches,
    build_gpt,
    ds_config,
    state_bits,
    train_losses,
    weight_bits,
)
from ranks import RankPools
from train_lm import ByteGPT

from ds_fp8.ops.masters import load_masters

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}


def save_and_go_on(folder: str, fp8: dict[str, Any], stage: int) -> tuple[list[float], Any, Any]:
    engine = build_gpt(ds_config(fp8, stage=stage, bucket=10_000, scheduler=WARMUP))
    source = batches(engine)
    train_losses(engine, source, 5)
    engine.save_checkpoint(folder, tag="five")
    losses = train_losses(engine, source, 5)
    states = state_bits(engine.optimizer), weight_bits(engine)
    engine.destroy()
    return losses, *states


def resume(folder: str, fp8: dict[str, Any], stage: int) -> tuple[list[float], Any, Any]:
    engine = build_gpt(ds_config(fp8, stage=stage, bucket=10_000, scheduler=WARMUP), seed=99)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    source = batches(engine)
    for _ in range(5):
        next(source)
    losses = train_losses(engine, source, 5)
    states = state_bits(engine.optimizer), weight_bits(engine)
    engine.destroy()
    return losses, *states


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "fp8",
    [
        {"opt_level": "O1"},
        {"opt_level": "O2"},
        {"opt_level": "O2+"},
        {"optimizer": {"master_dtype": "bf16", "exp_avg_dtype": "e5m2", "exp_avg_sq_dtype": "bf16"}},
        {"optimizer": {"master_dtype": "split8", "rounding": "stochastic", "exp_avg_sq_dtype": "e4m3"}},
    ],
    ids=["O1", "O2", "O2+", "mixed", "split8, stochastic"],
)
def test_resume_is_exact(ranks: RankPools, tmp_path: Path, fp8: dict[str, Any], stage: int) -> None:
    unbroken = ranks.run(2, save_and_go_on, str(tmp_path), fp8, stage)
    resumed = ranks.run(2, resume, str(tmp_path), fp8, stage)
    for (losses, states, weights), (again, states_again, weights_again) in zip(
        unbroken, resumed, strict=True
    ):
        assert losses == again
        assert_same_bits(states, states_again)
        assert_same_bits(weights, weights_again)


def save_masters(folder: str, fp32_master: bool, level: str = "O2") -> dict[str, torch.Tensor]:
    """Save; the masters that this rank holds, decoded: "name/first element" -> values."""
    section = {"opt_level": level, "checkpoint": {"fp32_master": fp32_master}}
    engine = build_gpt(ds_config(section, bucket=10_000))
    train_losses(engine, batches(engine), 3)
    engine.save_checkpoint(folder)
    handler, masters = engine.optimizer, {}
    for shard, weights in zip(handler.parts.shards, handler.parts.weights, strict=True):
        for piece in shard.pieces:
            values = torch.empty(piece.numel)
            with shard.lend(piece.rows) as state:
                load_masters(state.master, weights.own[piece.rows], values)
            masters[f"{handler.parameter_names[piece.slot.parameter]}/{piece.first_element}"] = values
    engine.destroy()
    return masters


@pytest.mark.parametrize("level", ["O2", "O2+"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_zero_to_fp32_reads_the_masters(
    ranks: RankPools, tmp_path: Path, world_size: int, level: str
) -> None:
    per_rank = ranks.run(world_size, save_masters, str(tmp_path), True, level)
    whole = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    seen = 0
    for masters in per_rank:
        for key, values in masters.items():
            name, first = key.split("/")
            assert torch.equal(whole[name].view(-1)[int(first) :][: len(values)], values)
            seen += len(values)
    assert seen == sum(each.numel() for each in ByteGPT(SMALL).parameters())


def test_fp32_master_can_be_left_out(ranks: RankPools, tmp_path: Path) -> None:
    for name, wanted in (("with", True), ("without", False)):
        ranks.run(2, save_masters, str(tmp_path / name), wanted)
    with_view, without = (
        sum(path.stat().st_size for path in (tmp_path / name).rglob("*optim_states.pt"))
        for name in ("with", "without")
    )
    parameters = sum(each.numel() for each in ByteGPT(SMALL).parameters())
    assert with_view - without == pytest.approx(4 * parameters, rel=0.05)


def load_into(folder: str, config: dict[str, Any], **options: Any) -> tuple[str, bool]:
    """The error of loading, and whether the optimizer's states are as before."""
    engine = build_gpt(config, seed=5)
    states, message = state_bits(engine.optimizer), ""
    try:
        engine.load_checkpoint(folder, **options)
    except ValueError as error:
        message = str(error)
    try:
        assert_same_bits(state_bits(engine.optimizer), states)
        unchanged = True
    except AssertionError:
        unchanged = False
    engine.destroy()
    return message, unchanged


@pytest.mark.parametrize(
    ("fp8", "word"),
    [
        (
            {"opt_level": "O1"},
            "master fp16 -> fp32, exp_avg int8 -> fp32, exp_avg_sq fp16 -> fp32, draws spread -> independent",
        ),
        ({"optimizer": {"draws": "independent"}}, "draws spread -> independent"),
        ({"block_size": 64}, "block_size 128 -> 64"),
        ({"optimizer": {"seed": 1}}, "seed 0 -> 1"),
    ],
)
def test_another_recipe_is_refused(ranks: RankPools, tmp_path: Path, fp8: dict[str, Any], word: str) -> None:
    ranks.run(2, save_masters, str(tmp_path), True)
    for message, unchanged in ranks.run(2, load_into, str(tmp_path), ds_config(fp8, bucket=10_000)):
        assert f"of another recipe than this run ({word})" in message
        assert "fp8.checkpoint.allow_conversion: true" in message
        assert unchanged


def save_stock(folder: str) -> None:
    engine = build_gpt(ds_config())
    train_losses(engine, batches(engine), 2)
    engine.save_checkpoint(folder)
    engine.destroy()


def test_stock_states_are_refused_and_stock_weights_load(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save_stock, str(tmp_path))
    for message, unchanged in ranks.run(2, load_into, str(tmp_path), ds_config({})):
        assert "fp8.checkpoint.allow_conversion: true" in message
        assert "load_optimizer_states=False" in message
        assert unchanged
    assert all(ranks.run(2, load_weights_only, str(tmp_path)))


def load_weights_only(folder: str) -> bool:
    """After loading weights without states, masters follow the weights."""
    engine = build_gpt(ds_config({}), seed=5)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    loaded = weight_bits(engine)
    tag = Path(folder, "latest").read_text()
    saved = torch.load(os.path.join(folder, tag, "mp_rank_00_model_states.pt"), weights_only=False)
    close = all(
        torch.allclose(parameter.float(), saved["module"][name].float(), rtol=1e-2, atol=1e-6)
        for name, parameter in engine.module.named_parameters()
    )
    engine.optimizer.saved.weights_from_masters()
    assert_same_bits(weight_bits(engine), loaded)
    engine.destroy()
    return close
