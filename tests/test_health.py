"""Health: counted by the ops, added up over ranks, told to monitors, and nothing but the counts changes."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    assert_same_bits,
    batches,
    build,
    build_gpt,
    ds_config,
    state_bits,
    train_losses,
    weight_bits,
)
from ranks import RankPools
from test_world_size import SIZES, Dictated, gradient
from torch import Tensor, nn

import ds_fp8
from ds_fp8.ops.blocks import Blocks, quantize
from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.health import GRADIENT_COUNTS, GradientCounts

MEASURED = {"stats": {"interval": 2}}
OF_GRADIENTS = {
    "gradient_underflow",
    "gradient_saturated",
    "gradient_non_finite_blocks",
    "gradient_snr_db",
}
OF_STATES = {"exp_avg_clamped", "exp_avg_underflow", "exp_avg_sq_rescued"}


def dictated(fp8: dict[str, Any], stage: int, steps: int) -> list[Any]:
    """Health after each step of a run whose gradients are known."""
    engine = build(ds_config(fp8, stage=stage, bucket=2500, clipping=0.0), Dictated())
    found = []
    for step in range(steps):
        engine.backward(engine(step))
        engine.step()
        found.append(ds_fp8.stats(engine))
    engine.destroy()
    return found


def expected_gradients(step: int) -> GradientCounts:
    counts = torch.zeros(GRADIENT_COUNTS, dtype=torch.float64)
    for index, size in enumerate(SIZES):
        out = Blocks.zeros(-(-size // 128), 128, E4M3, torch.device("cpu"))
        quantize(gradient(step, index).bfloat16(), out, counts)
    return GradientCounts(*counts.tolist())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_figures_of_a_known_gradient(ranks: RankPools, world_size: int, stage: int) -> None:
    """Every rank has the same one, so that shares and the ratio do not depend on their number."""
    for found in ranks.run(world_size, dictated, {"opt_level": "O2+", **MEASURED}, stage, 4):
        assert [each and each["step"] for each in found] == [None, 2, 2, 4]
        assert all(each is None or each["taken"] for each in found)
        for step in (2, 4):
            total, counts = found[step - 1]["total"], expected_gradients(step - 1)
            assert total["gradient_underflow"] == counts.underflows / sum(SIZES)
            assert total["gradient_saturated"] == counts.saturated / sum(SIZES)
            assert total["gradient_non_finite_blocks"] == 0
            assert total["gradient_snr_db"] == pytest.approx(10 * math.log10(counts.signal / counts.noise))
            assert 25 < total["gradient_snr_db"] < 40
            assert set(total) == OF_GRADIENTS | OF_STATES
            assert found[step - 1]["groups"] == [total]


class Extreme(nn.Module):
    """Two parameters: of one, most gradients are tiny beside one of their block; of the other, none is."""

    def __init__(self) -> None:
        super().__init__()
        self.uneven, self.even = (nn.Parameter(torch.ones(256)) for _ in range(2))
        self.size = torch.full((256,), 1e-7)
        self.size[::128] = 1.0

    def forward(self, sign: float) -> Tensor:
        return (self.uneven * self.size).sum().float() * sign + self.even.sum().float()


def extreme(bad: float, wire: str = "e4m3") -> dict[str, Any]:
    model = Extreme()
    groups = [{"params": [model.uneven]}, {"params": [model.even], "lr": 1e-4}]
    fp8 = {"opt_level": "O2+", "stats": {"interval": 1}, "gradients": {"dtype": wire}}
    config = ds_config(fp8, clipping=0.0)
    engine = build(config, model, optimizer=torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)))
    for sign in (1.0, bad):
        engine.backward(engine(sign))
        engine.step()
    found = ds_fp8.stats(engine)
    engine.destroy()
    assert found is not None
    return found


def test_groups_are_told_apart(ranks: RankPools) -> None:
    found = ranks.run(2, extreme, 1.0)[0]
    uneven, even = found["groups"]
    assert uneven["gradient_underflow"] == 254 / 256
    assert uneven["exp_avg_sq_rescued"] == even["gradient_underflow"] == 0
    assert even["gradient_saturated"] == 0
    assert found["total"]["gradient_underflow"] == 254 / 512


def test_a_second_moment_that_would_be_lost_is_counted(ranks: RankPools) -> None:
    """BF16 brings tiny gradients. The first step leaves the smallest code: half of one in the next scale."""
    uneven, even = ranks.run(2, extreme, 1.0, "bf16")[0]["groups"]
    assert uneven["gradient_underflow"] == 0
    assert 0.4 < uneven["exp_avg_sq_rescued"] < 0.6
    assert uneven["exp_avg_underflow"] == 0, "quotients are of one size where values are not"
    assert even["exp_avg_sq_rescued"] == 0


def test_a_skipped_step_tells_of_gradients_only(ranks: RankPools) -> None:
    found = ranks.run(2, extreme, math.inf)[0]
    assert found["step"] == 2
    assert not found["taken"]
    assert set(found["total"]) == OF_GRADIENTS
    assert found["groups"][0]["gradient_non_finite_blocks"] == 4  # two blocks on either rank
    assert found["groups"][1]["gradient_non_finite_blocks"] == 0


def trained(fp8: dict[str, Any]) -> tuple[Any, Any]:
    engine = build_gpt(ds_config(fp8, micro_steps=2, bucket=10_000))
    train_losses(engine, batches(engine), 5)
    bits = state_bits(engine.optimizer), weight_bits(engine)
    engine.destroy()
    return bits


def test_measuring_changes_no_bit(ranks: RankPools) -> None:
    for fp8 in ({"opt_level": "O1"}, {"opt_level": "O2"}, {"opt_level": "O2+"}):
        plain = ranks.run(2, trained, fp8)[0]
        measured = ranks.run(2, trained, {**fp8, "stats": {"interval": 2}})[0]
        assert_same_bits(measured[0], plain[0])
        assert_same_bits(measured[1], plain[1])


def asked_to_count(fp8: dict[str, Any]) -> list[tuple[int, int]]:
    """For each of five steps: calls of the ops, and those that were asked to count."""
    engine = build_gpt(ds_config(fp8))
    handler, calls = engine.optimizer, [0, 0]

    def watch(name: str) -> Any:
        op = getattr(handler.parts.backend, name)

        def watched(*arguments: Any) -> Any:
            counts = arguments[0].counts if name == "adam_step" else arguments[2]
            calls[0], calls[1] = calls[0] + 1, calls[1] + (counts is not None)
            return op(*arguments)

        object.__setattr__(handler.parts.backend, name, watched)
        return op

    originals = {name: watch(name) for name in ("quantize", "adam_step")}
    found, source = [], batches(engine)
    for _ in range(5):
        calls[:] = [0, 0]
        train_losses(engine, source, 1)
        found.append((calls[0], calls[1]))
    for name, op in originals.items():
        object.__setattr__(handler.parts.backend, name, op)
    engine.destroy()
    return found


def test_steps_that_are_not_measured_launch_what_they_would_without(ranks: RankPools) -> None:
    without = ranks.run(2, asked_to_count, {})[0]
    found = ranks.run(2, asked_to_count, {"stats": {"interval": 3}})[0]
    assert [calls for calls, _ in found] == [calls for calls, _ in without]
    assert [counted for _, counted in without] == [0] * 5
    assert [counted for _, counted in found] == [0, 0, found[2][0], 0, 0]


def monitored(folder: str) -> None:
    config = ds_config({"stats": {"interval": 2}})
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine = build_gpt(config)
    train_losses(engine, batches(engine), 4)
    engine.destroy()


def test_events_reach_the_monitor(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, monitored, str(tmp_path))
    files = {path.stem: path for path in tmp_path.rglob("Train_FP8_*.csv")}
    assert set(files) == {f"Train_FP8_{name}" for name in OF_GRADIENTS | OF_STATES}
    rows = list(csv.reader(files["Train_FP8_gradient_snr_db"].open()))[1:]
    assert [int(step) for step, _ in rows] == [2, 4]
    assert all(20 < float(value) < 40 for _, value in rows)


def misuse() -> str:
    engine = build_gpt(ds_config({}))
    with pytest.raises(ValueError, match="stats") as refused:
        ds_fp8.stats(engine)
    engine.destroy()
    return str(refused.value)


def test_stats_without_an_interval_is_refused(ranks: RankPools) -> None:
    assert ranks.run(1, misuse)[0].startswith("fp8.stats.interval: received 0, allowed: 1 or more")
    with pytest.raises(ValueError, match="does not use ds_fp8"):
        ds_fp8.stats(object())
