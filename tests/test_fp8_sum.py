"""The paper's reduction: codes added in FP8 in ring order, one scale for all ranks, and mu."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from deepspeed import comm as dist
from engines import build, build_gpt, ds_config, train_run
from meters import Traffic
from ranks import RankPools
from torch import Tensor, nn
from train_lm import Shape

import ds_fp8
from ds_fp8.cli import main
from ds_fp8.estimate import memory
from ds_fp8.ops import fp8_sum
from ds_fp8.ops.blocks import Blocks, decode
from ds_fp8.ops.formats import E4M3, E5M2, Format
from ds_fp8.zero_fp8.gradients import autoscale
from ds_fp8.zero_fp8.gradients.fp8_sum import FP8Sum

CPU = torch.device("cpu")
SIZE = 200_000  # 1e-5 of them are two
TINY = Shape(layers=1, width=32, heads=2, context=16)


def section(policy: str = "dynamic", **more: Any) -> dict[str, Any]:
    return {"scaling": "tensor", "gradients": {"reduction": "fp8", "autoscale": policy}, **more}


def codes(values: list[float], fmt: Format = E4M3) -> Blocks:
    rows = torch.zeros(1, 32)
    rows[0, : len(values)] = torch.tensor(values)
    return Blocks(rows.to(fmt.dtype), None, fmt)


def added(*pieces: list[float], fmt: Format = E4M3) -> tuple[list[float], int]:
    out = codes([], fmt)
    saturated = fp8_sum.ring_sum([codes(each, fmt) for each in pieces], out)
    return decode(out)[0, : len(pieces[0])].tolist(), int(saturated)


# Arithmetic


def test_two_exact_sums() -> None:
    """The values of MS-AMP's own test."""
    assert added([5, 16], [8, 24]) == ([13, 40], 0)


def test_every_addition_rounds() -> None:
    """1 is lost beside 16, to even, again and again; added first, the ones count."""
    assert added([16.0], *[[1.0]] * 4) == ([16.0], 0)
    assert added(*[[1.0]] * 4, [16.0]) == ([20.0], 0)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_a_sum_that_leaves_the_range_saturates_and_is_counted(fmt: Format) -> None:
    sums, saturated = added([fmt.max, -fmt.max, fmt.max], [fmt.max, -fmt.max, -fmt.max], fmt=fmt)
    assert sums == [fmt.max, -fmt.max, 0.0]
    assert saturated == 2


def test_scales() -> None:
    """448 just fits; mu multiplies, and what is then out of range becomes the largest code."""
    amax = torch.tensor([448.0, 449.0, 1.0, 0.0, math.inf])
    one = fp8_sum.inverse_scales(amax, torch.ones(5), E4M3)
    assert one[[0, 1, 2, 4]].tolist() == [1.0, 0.5, 256.0, 0.0]
    assert one[3] > 0
    assert fp8_sum.inverse_scales(amax[:1], torch.tensor([0.75]), E4M3).tolist() == [0.75]
    out = codes([])
    fp8_sum.quantize(torch.tensor([448.0, -300.0, 3.0]), torch.tensor(2.0), out)
    assert decode(out)[0, :3].tolist() == [448.0, -448.0, 6.0]


def test_largest_sees_what_is_not_finite() -> None:
    assert fp8_sum.largest(torch.tensor([1.0, -3.0])).item() == 3
    for bad in (math.inf, -math.inf, math.nan):
        assert fp8_sum.largest(torch.tensor([1.0, bad], dtype=torch.bfloat16)).item() == math.inf


# On ranks


class Vectors(nn.Module):
    """Its loss's gradient is what it is given."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])

    def forward(self, *gradients: Tensor) -> Tensor:
        return sum(
            ((each * gradient).sum() for each, gradient in zip(self.vectors, gradients, strict=True)),
            start=torch.zeros(()),
        )


def engine_of(fp8: dict[str, Any], *sizes: int, stage: int = 2, **options: Any) -> Any:
    options = {"bf16": False, "clipping": 0.0, **options}
    return build(ds_config(fp8, stage=stage, **options), Vectors(*sizes))


def reduced(engine: Any, *gradients: Tensor) -> list[Tensor]:
    """A backward; the ranks' sums."""
    engine.backward(engine(*gradients))
    return [each.get_full_hp_grad() * dist.get_world_size() for each in engine.module.vectors]


def sum_of_two(stage: int) -> list[list[float]]:
    engine = engine_of(section("post"), 3, 2, stage=stage)
    mine = [[5.0, 16.0, 448.0], [448.0, 1.0]] if dist.get_rank() == 0 else [[8.0, 24.0, 0.0], [1.0, 448.0]]
    found = [each.tolist() for each in reduced(engine, *map(torch.tensor, mine))]
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_two_exact_sums_on_two_ranks(ranks: RankPools, stage: int) -> None:
    """448 + 1 is not in range: the scale is for one rank's values, not for the sum's."""
    for found in ranks.run(2, sum_of_two, stage):
        assert found == [[13.0, 40.0, 448.0], [448.0, 448.0]]


def in_order(fp8: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    engine = engine_of(fp8, 1000, 700, 300)
    gradients = [torch.randn(each.numel(), generator=generator) for each in engine.module.vectors]
    found = reduced(engine, *gradients)
    owners = {
        piece.slot.parameter: rank
        for bucket in engine.optimizer.parts.buckets
        for rank in range(bucket.world_size)
        for piece in bucket.pieces(rank)
    }
    engine.destroy()
    return [*found, *gradients], [owners[index] for index in sorted(owners)]


def test_ranks_add_in_the_order_of_a_ring(ranks: RankPools) -> None:
    """From the rank after the owner on, with numpy's arithmetic and torch's cast."""
    results = ranks.run(3, in_order, section())
    owners = results[0][1]
    assert sorted(owners) == [0, 1, 2]
    for index, owner in enumerate(owners):
        parts = [found[3 + index].numpy() for found, _ in results]
        top = max(np.abs(part).max() for part in parts)
        scale = 2.0 ** math.ceil(math.log2(top / 448))
        rounded = [torch.from_numpy(part / scale).to(torch.float8_e4m3fn).float() for part in parts]
        total = rounded[(owner + 1) % 3]
        for step in (2, 3):
            total = (total + rounded[(owner + step) % 3]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        for found, _ in results:
            torch.testing.assert_close(found[index], total * scale, rtol=1e-6, atol=0)


def drive(top: int, steps: int, policy: str) -> list[tuple[float, float]]:
    """mu and the share at the largest code after each step: `top` of 200,000 gradients are at 448."""
    engine = engine_of(section(policy, stats={"interval": 1}), SIZE)
    gradient = torch.ones(SIZE)
    gradient[:top] = 448.0
    found = []
    for _ in range(steps):
        engine.backward(engine(gradient))
        engine.step()
        total = ds_fp8.stats(engine)["total"]
        assert total["autoscale_min"] == total["autoscale_max"]
        found.append((total["autoscale_min"], total["reduced_saturated"]))
    engine.destroy()
    return found


GROWN = float(np.float32(2 ** (1 / 1000)))


def test_mu_halves_above_the_threshold_and_grows_below_it(ranks: RankPools) -> None:
    """On two ranks 448 + 448 saturates, 224 + 224 is at the largest code, 112 + 112 is not."""
    above = ranks.run(2, drive, 3, 4, "dynamic")[0]
    assert [share for _, share in above] == [3 / SIZE, 3 / SIZE, 0.0, 0.0]
    assert [mu for mu, _ in above] == [0.5, 0.25, 0.25 * GROWN, pytest.approx(0.25 * GROWN**2, rel=1e-7)]
    below = ranks.run(2, drive, 2, 2, "dynamic")[0]
    assert below == [(GROWN, 2 / SIZE), (pytest.approx(GROWN**2, rel=1e-7), 2 / SIZE)]


def test_growth_doubles_in_a_thousand_steps() -> None:
    group: Any = None
    scale = autoscale.Autoscale("dynamic", {0: 10}, [], group, 0.5, CPU)
    with patch.object(autoscale, "sum_over_ranks"):
        for _ in range(1000):
            scale.settle()
    assert scale.of([0]).item() == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize(("policy", "mu"), [("pre", 0.5), ("post", 1.0)])
def test_pre_and_post_keep_mu(ranks: RankPools, policy: str, mu: float) -> None:
    assert [each for each, _ in ranks.run(2, drive, 3, 3, policy)[0]] == [mu] * 3


def saturating(steps: int) -> list[float]:
    """The share at the largest code, where all ranks have the same gradient of few sizes."""
    engine = engine_of(section(stats={"interval": 1}), SIZE, 5_000)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.rand(each.numel(), generator=generator) + 0.9 for each in engine.module.vectors]
    found = []
    for _ in range(steps):
        engine.backward(engine(*gradients))
        engine.step()
        found.append(ds_fp8.stats(engine)["total"]["reduced_saturated"])
    engine.destroy()
    return found


def test_dynamic_scaling_brings_saturation_under_the_threshold(ranks: RankPools) -> None:
    found = ranks.run(4, saturating, 20)[0]
    assert found[0] == 1.0, "the sum of four must saturate for this to show anything"
    assert found[-1] < autoscale.THRESHOLD, found


def unused_and_not_finite(bad: float) -> list[Any]:
    """The second vector is not used on rank 1, then rank 1's first is not finite."""
    engine = engine_of(section("pre"), 4, 4)
    ours = torch.ones(4)
    loss = engine(ours, ours) if dist.get_rank() == 0 else (engine.module.vectors[0] * ours).sum()
    engine.backward(loss)
    sums = [each.get_full_hp_grad() * 2 for each in engine.module.vectors]
    engine.step()
    before = [each.detach().clone() for each in engine.module.vectors]
    engine.backward(engine(torch.full((4,), bad if dist.get_rank() == 1 else 1.0), ours))
    engine.step()
    same = all(torch.equal(a, b) for a, b in zip(before, engine.module.vectors, strict=True))
    engine.destroy()
    return [*(each.tolist() for each in sums), engine.optimizer.overflow, same]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_unused_parameters_and_gradients_that_are_not_finite(ranks: RankPools, bad: float) -> None:
    for found in ranks.run(2, unused_and_not_finite, bad):
        assert found == [[2.0] * 4, [1.0] * 4, True, True]


@pytest.mark.parametrize("accum", [None, "fp32", "bf16", "e4m3"])
def test_micro_steps_add_up(ranks: RankPools, accum: str | None) -> None:
    fp8 = section("pre")
    fp8["gradients"]["accum_dtype"] = accum
    assert ranks.run(2, accumulated, fp8) == [[[12.0, 24.0]]] * 2


def accumulated(fp8: dict[str, Any]) -> list[list[float]]:
    engine = engine_of(fp8, 2, micro_steps=3)
    for _ in range(3):
        engine.backward(engine(torch.tensor([6.0, 12.0])))
        found = engine.module.vectors[0].get_full_hp_grad() * 2
        engine.step()
    engine.destroy()
    return [found.tolist()]


# Checkpoints


def train_and_save(folder: str, steps: int) -> dict[str, float]:
    engine = engine_of(section(), SIZE, 100, 1000)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        gradients = [torch.randn(each.numel(), generator=generator) for each in engine.module.vectors]
        gradients[0][:3] = 40.0
        gradients[1] *= 0
        engine.backward(engine(*gradients))
        engine.step()
    engine.save_checkpoint(folder, tag="saved")
    return state_of(engine)


def state_of(engine: Any) -> dict[str, float]:
    handler = engine.optimizer
    mu: dict[str, float] = handler.parts.gradient_scales.state(handler.parameter_names)
    engine.destroy()
    return mu


def load(folder: str, policy: str) -> dict[str, float]:
    engine = engine_of(section(policy), SIZE, 100, 1000)
    engine.load_checkpoint(folder)
    return state_of(engine)


def test_mu_is_saved_and_restored_exactly(ranks: RankPools, tmp_path: Path) -> None:
    saved = ranks.run(2, train_and_save, str(tmp_path), 7)
    assert saved[0] == saved[1]
    assert len(set(saved[0].values())) == 2, "every tensor has a mu of its own"
    for world_size in (2, 3, 1):
        assert ranks.run(world_size, load, str(tmp_path), "dynamic") == [saved[0]] * world_size
    assert set(ranks.run(2, load, str(tmp_path), "pre")[0].values()) == {0.5}


def load_universal(folder: str) -> dict[str, float]:
    config = {**ds_config(section(), bf16=False), "checkpoint": {"load_universal": True}}
    engine = build(config, Vectors(SIZE, 100, 1000))
    engine.load_checkpoint(folder)
    return state_of(engine)


def test_a_universal_checkpoint_carries_mu(ranks: RankPools, tmp_path: Path) -> None:
    saved = ranks.run(2, train_and_save, str(tmp_path / "run"), 7)
    main(["to-universal", str(tmp_path / "run"), str(tmp_path / "universal" / "saved")])
    for world_size in (2, 3):
        found = ranks.run(world_size, load_universal, str(tmp_path / "universal"))
        assert found == [saved[0]] * world_size


def test_a_run_that_adds_in_fp32_leaves_mu_at_its_start(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save_fp32, str(tmp_path))
    assert set(ranks.run(2, load, str(tmp_path), "dynamic")[0].values()) == {1.0}


def save_fp32(folder: str) -> None:
    engine = engine_of({"scaling": "tensor"}, SIZE, 100, 1000)
    engine.save_checkpoint(folder, tag="saved")
    engine.destroy()


# Bytes and health


def traffic() -> dict[str, Any]:
    engine = build_gpt(ds_config(section(), bucket=2_000), TINY)
    train = torch.zeros(4, TINY.context + 1, dtype=torch.long)
    engine.backward(engine(train))
    engine.step()
    with Traffic() as counted:
        engine.backward(engine(train))
        engine.step()
    handler = engine.optimizer
    expected = sum(sum(memory.hop_bytes(handler.recipe, each)) for each in handler.parts.buckets)
    found = {
        "sent": counted.handed["alltoall_base_"],
        "expected": expected,
        "elements": sum(each.blocks * each.block_size for each in handler.parts.buckets),
        "buckets": len(handler.parts.buckets),
        "allocated": handler.nbytes,
        "told": memory.rank_bytes(handler.recipe, handler.parts.buckets, accumulating=False)[dist.get_rank()],
    }
    engine.destroy()
    return found


def test_bytes(ranks: RankPools) -> None:
    """A byte an element and no scales, but for messages that are padded."""
    for found in ranks.run(3, traffic):
        assert found["sent"] == found["expected"]
        assert 0 <= found["sent"] - found["elements"] <= 3 * 15 * found["buckets"]
        assert found["allocated"] == found["told"]


def test_stages_equal_bit_for_bit(ranks: RankPools) -> None:
    one, two = (
        ranks.run(2, train_run, ds_config(section(), stage=stage, bucket=5_000), TINY, 0, 10)[0]
        for stage in (1, 2)
    )
    assert one["losses"] == two["losses"]


def test_overlap_changes_no_bit(ranks: RankPools) -> None:
    apart, over = (
        ranks.run(
            2, train_run, ds_config(section(), bucket=2_000, zero={"overlap_comm": overlap}), TINY, 0, 10
        )[0]
        for overlap in (False, True)
    )
    assert apart["losses"] == over["losses"]


def test_the_first_sum_is_kept_as_it_is(ranks: RankPools) -> None:
    """Not rounded again: its codes are the shard's."""
    for kind, fmt in ranks.run(2, shard_kind):
        assert (kind, fmt) == (FP8Sum.__name__, "torch.float32")


def shard_kind() -> tuple[str, str]:
    engine = engine_of(section(), 10)
    reduced = engine.optimizer.parts.reduced[0]
    found = type(reduced._sum).__name__, str(reduced.blocks.scales.dtype)
    engine.destroy()
    return found
