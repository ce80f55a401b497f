"""With "fp8" absent or disabled, registered or not, DeepSpeed is stock DeepSpeed, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same_bits, batches, build_gpt, ds_config, train_losses, weight_bits
from ranks import RankPools
from torch import Tensor

import ds_fp8


def run(folder: str, registered: bool, section: dict[str, Any] | None, stage: int) -> Any:
    ds_fp8.unregister()
    if registered:
        ds_fp8.register()
    config = ds_config(stage=stage)
    if section is not None:
        config["fp8"] = section
    engine = build_gpt(config)
    losses = train_losses(engine, batches(engine), 10)
    engine.save_checkpoint(folder)
    weights, kind = weight_bits(engine), type(engine.optimizer).__name__
    active = ds_fp8.is_active(engine)
    engine.destroy()
    ds_fp8.register()
    return losses, weights, kind, active


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its path."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Tensor] = {}
    for key, each in items:
        found |= tensors(each, f"{path}/{key}")
    return found


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.pt")):
        found |= tensors(torch.load(path, weights_only=False), str(path.relative_to(folder)))
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("section", [None, {"enabled": False}, {}], ids=["absent", "disabled", "empty"])
def test_off_is_stock(ranks: RankPools, tmp_path: Path, section: dict[str, Any] | None, stage: int) -> None:
    stock = ranks.run(2, run, str(tmp_path / "stock"), False, None, stage)
    ours = ranks.run(2, run, str(tmp_path / "ours"), True, section, stage)
    for (losses, weights, kind, _), (losses2, weights2, kind2, active) in zip(stock, ours, strict=True):
        assert losses == losses2
        assert_same_bits(weights, weights2)
        assert kind == kind2 == "DeepSpeedZeroOptimizer"
        assert not active
    first, second = (checkpoint_tensors(tmp_path / name) for name in ("stock", "ours"))
    assert len(first) > 20
    assert_same_bits(first, second)


def run_stage_0(registered: bool) -> Any:
    ds_fp8.unregister()
    if registered:
        ds_fp8.register()
    engine = build_gpt(ds_config(stage=0))
    losses = train_losses(engine, batches(engine), 5)
    engine.destroy()
    ds_fp8.register()
    return losses


def test_off_is_stock_without_zero(ranks: RankPools) -> None:
    assert ranks.run(2, run_stage_0, False) == ranks.run(2, run_stage_0, True)
