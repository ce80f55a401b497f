"""One scale per tensor: its arithmetic, its states at any world size, and what it refuses."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from engines import (
    SMALL,
    assert_same_bits,
    build,
    build_gpt,
    ds_config,
    packed,
    train_run,
    weight_bits,
    whole_states,
)
from ranks import RankPools
from test_checkpoint import resume, save_and_go_on
from test_fp8_sum import engine_of
from test_reshard import assert_same, config, move, train_and_save
from test_world_size import Dictated
from torch import Tensor

import ds_fp8
from ds_fp8.config.section import FP8Config
from ds_fp8.estimate import memory
from ds_fp8.ops import blocks, per_tensor
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import VARIABLE, choose, choose_for_tensors
from ds_fp8.ops.blocks import Blocks, decode
from ds_fp8.ops.formats import BY_NAME, E4M3, FP16, FP32, Format
from ds_fp8.ops.moments import UNIT
from ds_fp8.ops.reduction import norm_square
from ds_fp8.ops.rounding import Rounding
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.recipe import recipe_of
from ds_fp8.zero_fp8.wiring import backend_for

CPU = torch.device("cpu")
TENSOR: dict[str, Any] = {"scaling": "tensor"}
BETAS = (0.9, 0.95)
SCALARS = AdamScalars(1, 1e-2, *BETAS, 1e-8, 0.1, decoupled=True, bias_correction=True, clamp=None)


RING = recipe_of(
    FP8Config.model_validate({"enabled": True, "scaling": "tensor", "gradients": {"reduction": "fp8"}})
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales_of(held: Blocks) -> list[int]:
    assert held.scales is not None
    return sorted(set(held.scales.tolist()))


# Arithmetic


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "fp16"])
def test_all_rows_have_the_scale_of_the_largest_value(name: str) -> None:
    """The codes and the scale of one block as long as the tensor."""
    fmt, values = BY_NAME[name], normal(1000) * torch.logspace(-6, 3, 1000)
    out, one = Blocks.zeros(8, 128, fmt, CPU), Blocks.zeros(1, 1024, fmt, CPU)
    per_tensor.quantize(values, out)
    blocks.quantize(values, one)
    assert scales_of(out) == scales_of(one)
    assert torch.equal(decode(out).view(-1), decode(one).view(-1))
    blockwise = Blocks.zeros(8, 128, fmt, CPU)
    blocks.quantize(values, blockwise)
    assert scales_of(blockwise) != scales_of(out), "the values are all of one size: nothing was shown"


def test_a_sum_has_one_scale() -> None:
    """FP32 in rank order, rounded once."""
    pieces, sizes = [], (1.0, 1e-3, 30.0)
    for seed, size in enumerate(sizes):
        piece = Blocks.zeros(4, 128, E4M3, CPU)
        per_tensor.quantize(normal(512, seed=seed) * size, piece)
        pieces.append(piece)
    exact = decode(pieces[0]) + decode(pieces[1]) + decode(pieces[2])
    shard, expected = Blocks.zeros(4, 128, E4M3, CPU), Blocks.zeros(1, 512, E4M3, CPU)
    parts = per_tensor.accumulate(pieces, shard, overwrite=True)
    blocks.quantize(exact.view(-1), expected)
    assert torch.equal(decode(shard).view(1, -1), decode(expected))
    assert norm_square(parts) == decode(shard).double().square().sum()
    assert parts[-1] == 0


def states(rows: int, exp_avg_sq: Format) -> AdamState:
    held = (Blocks.zeros(rows, 128, fmt, CPU) for fmt in (FP16, E4M3, exp_avg_sq))
    return AdamState(*held, stores_sqrt=False)  # type: ignore[arg-type]


def sweep(state: AdamState, g: Tensor, sizes: list[int]) -> Tensor:
    """One step of tensors with these numbers of rows; their weights."""
    ends = list(accumulate(sizes))
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    plan = [Segment(each, number, 0) for number, each in enumerate(rows)]
    held = Blocks(g.view(-1, 128), None, FP32)
    weights = torch.zeros_like(held.codes)
    per_tensor.adam_step(Sweep(state, held, weights, plan, SCALARS, torch.ones(2), Rounding(0)))
    return weights


def test_exp_avg_sq_itself_is_stored_to_nearest() -> None:
    """Not its root: what is below half of the smallest code is zero, as published."""
    g = normal(4, 128).abs() + 0.5
    g[0, :3] = torch.tensor([1e-5, 3e-4, 1e-6])
    state = states(4, FP16)
    sweep(state, g.view(-1), [4])
    v = (g * g * (1 - BETAS[1])).double()
    assert state.exp_avg_sq.scales is not None
    unit = 2.0 ** (state.exp_avg_sq.scales[0].item() - 127) * FP16.smallest
    stored = state.second_moment(UNIT**-2).double()
    assert ((stored - v).abs() <= torch.maximum(v * 2.0**-11, torch.tensor(unit / 2))).all()
    assert stored[0, 2] == 0
    assert v[0, 2] < unit / 2


def test_every_tensor_has_scales_of_its_own() -> None:
    state = states(6, FP16)
    sweep(
        state, (normal(6, 128) * torch.tensor([1.0, 1, 1e-3, 1e-3, 1e-3, 1e2])[:, None]).view(-1), [2, 3, 1]
    )
    for held in (state.exp_avg, state.exp_avg_sq):
        assert held.scales is not None
        first, second, third = (set(part.tolist()) for part in held.scales.split([2, 3, 1]))
        assert len(first) == len(second) == len(third) == 1
        assert first != second != third


def test_a_sweep_follows_adam() -> None:
    """Against the formula in float64, from zero states: half a code of E4M3, of FP16."""
    g = normal(8, 128)
    state = states(8, FP16)
    weights = sweep(state, g.view(-1), [8]).double()
    m, v = g.double() * (1 - BETAS[0]), g.double().square() * (1 - BETAS[1])
    step = (m / (1 - BETAS[0])) / ((v / (1 - BETAS[1])).sqrt() + 1e-8) * -1e-2
    torch.testing.assert_close(weights, step, rtol=2.0**-10, atol=1e-7)
    torch.testing.assert_close(decode(state.exp_avg).double(), m, rtol=2.0**-4, atol=m.abs().max() * 2.0**-18)


# Runs


def train(fp8: dict[str, Any], stage: int, steps: int) -> dict[str, Any]:
    engine = build(ds_config(fp8, stage=stage, bucket=2500), Dictated())
    for step in range(steps):
        engine.backward(engine(step))
        engine.step()
    found = {
        "packed": packed(engine.optimizer),
        "weights": weight_bits(engine),
        "rank_bytes": memory.rank_bytes(
            engine.optimizer.recipe, engine.optimizer.parts.buckets, accumulating=False
        ),
        "allocated": engine.optimizer.nbytes,
        "told": {key: ds_fp8.describe(engine)[key] for key in ("rank_bytes_min", "rank_bytes_max")},
    }
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_states_do_not_depend_on_the_world_size(ranks: RankPools, stage: int) -> None:
    """Every rank has the same gradients, powers of two of which add up without rounding."""
    alone, two, four = (ranks.run(n, train, TENSOR, stage, 3) for n in (1, 2, 4))
    expected = whole_states([each["packed"] for each in alone])
    for run in (two, four):
        assert_same_bits(whole_states([each["packed"] for each in run]), expected)
        for each in run:
            assert_same_bits(each["weights"], alone[0]["weights"])


def test_memory_of_a_rank_is_told_from_the_least_to_the_most(ranks: RankPools) -> None:
    per_rank = ranks.run(3, train, TENSOR, 2, 1)
    allocated = [each["allocated"] for each in per_rank]
    for found in per_rank:
        assert found["rank_bytes"] == allocated
        assert found["told"] == {"rank_bytes_min": min(allocated), "rank_bytes_max": max(allocated)}
    assert min(allocated) < max(allocated), "whole tensors of unlike sizes are not even"


def test_more_ranks_than_tensors(ranks: RankPools) -> None:
    """Ranks without a tensor take part in every collective."""
    found = ranks.run(4, two_tensors)
    assert found == [found[0]] * 4


def two_tensors() -> list[float]:
    engine = engine_of(TENSOR, 300, 5)
    for _ in range(2):
        engine.backward(engine(torch.ones(300), torch.ones(5)))
        engine.step()
    found = [float(each.sum()) for each in engine.module.vectors]
    engine.destroy()
    return found


def test_stages_equal_bit_for_bit_without_accumulation(ranks: RankPools) -> None:
    one, two = (
        ranks.run(2, train_run, ds_config(TENSOR, stage=stage, bucket=20_000), SMALL, 0, 10)[0]
        for stage in (1, 2)
    )
    assert one["losses"] == two["losses"]
    assert_same_bits(one["weights"], two["weights"])


def health() -> dict[str, Any]:
    engine = build(ds_config({**TENSOR, "stats": {"interval": 1}}, bucket=2500), Dictated())
    engine.backward(engine(0))
    engine.step()
    found: dict[str, Any] = ds_fp8.stats(engine)["total"]
    engine.destroy()
    return found


def test_health_counts_second_moments_that_are_lost(ranks: RankPools) -> None:
    found = ranks.run(2, health)[0]
    assert "exp_avg_sq_rescued" not in found
    assert 0 <= found["exp_avg_sq_underflow"] < 1
    assert found["exp_avg_clamped"] == 0
    assert 20 < found["gradient_snr_db"] < 60


# Checkpoints

FORMATS = {
    "tensor": TENSOR,
    "tensor, FP8 sum": {**TENSOR, "gradients": {"reduction": "fp8"}},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_goes_on_bit_for_bit(ranks: RankPools, tmp_path: Path, name: str) -> None:
    went_on = ranks.run(2, save_and_go_on, str(tmp_path), FORMATS[name], 2)
    resumed = ranks.run(2, resume, str(tmp_path), FORMATS[name], 2)
    for mine, theirs in zip(resumed, went_on, strict=True):
        assert mine[0] == theirs[0]
        assert_same_bits(mine[1], theirs[1])
        assert_same_bits(mine[2], theirs[2])


def test_3_to_2_to_1_to_3_ranks(ranks: RankPools, tmp_path: Path) -> None:
    start = ranks.run(3, train_and_save, str(tmp_path / "0"), config(TENSOR, bucket=10_000))
    for hop, world_size in enumerate((2, 1, 3)):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        assert_same(start, ranks.run(world_size, move, *folders, config(TENSOR, bucket=10_000)))


def second_moments(folder: str, fp8: dict[str, Any]) -> list[Tensor]:
    allowed = {**fp8, "checkpoint": {"allow_conversion": True}}
    engine = build_gpt(config(allowed, bucket=10_000), seed=7)
    engine.load_checkpoint(folder)
    found = [safe_get_full_optimizer_state(each, "exp_avg_sq") for each in engine.module.parameters()]
    engine.destroy()
    return found


@pytest.mark.parametrize(("saved", "loaded"), [({}, TENSOR), (TENSOR, {})])
def test_conversion_to_and_from_blocks(
    ranks: RankPools, tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any]
) -> None:
    """v moves between its root and itself; another scaling is refused without leave."""
    ranks.run(2, train_and_save, str(tmp_path), config(saved, bucket=10_000))
    before, after = (ranks.run(2, second_moments, str(tmp_path), each)[0] for each in (saved, loaded))
    for mine, theirs in zip(after, before, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, rtol=2.0**-9, atol=theirs.max().item() * 2.0**-24)
    with pytest.raises(AssertionError, match=r"scaling \w+ -> \w+.*allow_conversion"):
        ranks.run(2, move, str(tmp_path), str(tmp_path / "other"), config(loaded, bucket=10_000))


def set_and_get() -> list[tuple[Tensor, Tensor]]:
    engine = build_gpt(ds_config(TENSOR))
    pairs = []
    for number, parameter in enumerate(engine.module.parameters()):
        value = normal(*parameter.shape, seed=number).square()
        safe_set_full_optimizer_state(parameter, value, "exp_avg_sq")
        pairs.append((value, safe_get_full_optimizer_state(parameter, "exp_avg_sq")))
    engine.destroy()
    return pairs


def test_second_moments_are_set_and_read(ranks: RankPools) -> None:
    for value, held in ranks.run(2, set_and_get)[0]:
        torch.testing.assert_close(held, value, rtol=2.0**-10, atol=value.max().item() * 2.0**-24)


def test_refused_without_deepspeed() -> None:
    with pytest.raises(
        ValueError, match=r'^fp8\.scaling: received "tensor", allowed: "block" for an FP8AdamW'
    ):
        FP8AdamW([torch.nn.Parameter(torch.zeros(3))], fp8={"scaling": "tensor"})


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_every_backend_has_its_kernels(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The writing ops are those of whole tensors; with a sum in FP8 what has no kernel is told."""
    monkeypatch.setenv(VARIABLE, name)
    chosen, blockwise, ring = choose_for_tensors(CPU), choose(CPU), backend_for(RING, CPU)
    assert chosen.name == blockwise.name == ring.name == name
    assert chosen.instead is None
    assert "fp8.gradients.reduction fp8" in str(ring.instead)
    for op in ("quantize", "accumulate", "adam_step"):
        assert getattr(chosen, op) is not getattr(blockwise, op)
