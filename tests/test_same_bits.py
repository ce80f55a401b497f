"""Bits of the benchmarks for several GPUs, on gloo ranks: both what is the same and what differs is found."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from ranks import RankPools

from ds_fp8.config.parsing import parse
from ds_fp8.ops.backend import REFERENCE, choose
from ds_fp8.ops.blocks import Blocks

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import same_bits  # noqa: E402
import zero3_bits  # noqa: E402

CPU = torch.device("cpu")


def without_the_last_rank(pieces: Sequence[Blocks], shard: Blocks, *, overwrite: bool) -> torch.Tensor:
    return REFERENCE.accumulate(pieces[:-1], shard, overwrite=overwrite)


def objection(check: Callable[[], object]) -> str:
    """What an assertion says; a rank that raised would not live on."""
    try:
        check()
    except AssertionError as error:
        return str(error)
    return "none"


def against_host() -> list[str]:
    return same_bits.against_host(CPU, choose(CPU))


def against_host_with_a_wrong_kernel() -> str:
    wrong = dataclasses.replace(choose(CPU), accumulate=without_the_last_rank)
    return objection(lambda: same_bits.against_host(CPU, wrong))


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_arrivals_are_compared_bit_by_bit(ranks: RankPools, world_size: int) -> None:
    lines = ranks.run(world_size, against_host)
    assert len({*map(tuple, lines)}) == 1
    assert len(lines[0]) == 8 * world_size // 2
    assert any("nodes of 2, overlap" in line for line in lines[0]) is (world_size == 4)


def test_a_wrong_kernel_is_found_on_every_rank(ranks: RankPools) -> None:
    told = "e4m3 into e4m3, nodes of 1: rank 0: gradients of bucket 0 differ from the reference over gloo"
    assert ranks.run(2, against_host_with_a_wrong_kernel) == [told, told]


def trainings() -> list[dict[str, Any]]:
    ways = [(2, False, 1), (1, True, 1), (3, True, 1), (2, False, 1, "O3"), (3, True, 1, "O3")]
    stock = same_bits.Setting(2, False, 1, same_bits.STOCK)
    return list(same_bits.trainings([*(same_bits.Setting(*each) for each in ways), stock], 2))


def disturbed_trainings(everywhere: bool) -> str:
    """After its two steps the first training changes a weight, on rank 1 or on all."""
    import train_lm

    here = everywhere or torch.distributed.get_rank() == 1
    steps = []

    def step(engine: Any, batches: Any, original: Any = train_lm.train_step) -> float:
        steps.append(original(engine, batches))
        if here and len(steps) == 2:
            next(iter(engine.module.parameters())).data.view(-1)[0] += 1
        return steps[-1]

    with patch.object(train_lm, "train_step", step):
        return objection(trainings)


@pytest.mark.parametrize(
    ("everywhere", "told"),
    [
        (False, "O2, ZeRO 2, nodes of 1: the ranks end with different weights"),
        (True, "O2, ZeRO 1, nodes of 1, overlap: weights differ from O2, ZeRO 2, nodes of 1's"),
    ],
)
def test_other_weights_are_found(ranks: RankPools, everywhere: bool, told: str) -> None:
    assert ranks.run(2, disturbed_trainings, everywhere) == [told, told]


def test_trainings_end_alike(ranks: RankPools) -> None:
    rows = ranks.run(2, trainings)[0]
    *ours, stock = (row["weights"] for row in rows)
    assert [each == ours[0] for each in ours] == [True, True, True, False, False]
    assert ours[3] == ours[4]
    assert stock not in ours
    assert abs(rows[0]["last_loss"] - rows[-1]["last_loss"]) < same_bits.PARITY


def test_every_setting_is_trained_for_comparison() -> None:
    """Each kind at two stages at least; four ranks have two hops."""
    for ranks, nodes in ((2, {1}), (4, {1, 2})):
        ways = [each for each in same_bits.settings(ranks) if each.numerics != same_bits.STOCK]
        stages: dict[str, set[int]] = {}
        for each in ways:
            stages.setdefault(each.alike, set()).add(each.stage)
        assert {each.node_size for each in ways} == nodes
        assert {name: len(found) for name, found in stages.items() if len(found) < 2} == {}
        assert all(stages[f"O2, nodes of {size}"] == {1, 2, 3} for size in nodes)
        assert all(stages[f"O3, nodes of {size}"] == {2, 3} for size in nodes)


def digests(*cases: zero3_bits.Case) -> list[str]:
    return [zero3_bits.digest(each, CPU) for each in cases]


def test_digests_of_given_gradients(ranks: RankPools) -> None:
    cases = [zero3_bits.Case("O2", *each) for each in ((False, 1), (True, 1), (True, 2))]
    cases += [zero3_bits.Case("O3", True, 1, stage) for stage in (2, 3)]
    here, there = ranks.run(2, digests, *cases)
    assert here == there
    assert here[0] == here[1], "overlap makes no difference"
    assert len({*here}) == 4


@pytest.mark.slow
def test_digests_in_two_hops(ranks: RankPools) -> None:
    ways = [("O2", True, 1, 3), ("O3", True, 1, 2)]
    cases = [zero3_bits.Case(*way, size) for way in ways for size in (1, 2)]
    found = ranks.run(4, digests, *cases)
    assert len({*map(tuple, found)}) == 1
    assert len({*found[0]}) == 4
    assert {*cases} <= {*zero3_bits.cases(4)}
    assert all(each.node_size == 1 for each in zero3_bits.cases(2))


def differences(out: Path, expected: dict[str, str]) -> list[str]:
    return zero3_bits.run(out, expected, CPU, ["O1, overlap, 1 micro-steps"])


def test_another_digest_is_found(ranks: RankPools, tmp_path: Path) -> None:
    out, name = tmp_path / "bits.json", "O1, overlap, 1 micro-steps"
    assert ranks.run(2, differences, out, {}) == [[], []]
    expected = json.loads(out.read_text())["digests"]
    assert ranks.run(2, differences, out, expected) == [[], []]
    parts = expected[name].split(", ")
    assert [each.split()[0] for each in parts] == ["norms", "states", "weights"]
    other = ", ".join(["norms 0", parts[1], "weights 0"])
    assert ranks.run(2, differences, out, {name: other})[1] == [f"norms and weights of {name}"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "gpu").glob("zero3_*.json")), ids=lambda path: path.stem
)
def test_configs_of_zero_3(path: Path) -> None:
    config = json.loads(path.read_text())
    if "zero_optimization" in config:  # otherwise it is a result
        assert DeepSpeedZeroConfig(**config["zero_optimization"]).stage == 3
        parse(config)
