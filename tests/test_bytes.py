"""Bytes in memory and on the wire, counted from outside."""

from itertools import product
from typing import Any

import pytest
import torch
from engines import SMALL, batches, build, build_gpt, ds_config, train_losses
from meters import Traffic, live_tensors, optimizer_bytes, storages
from ranks import RankPools
from torch import Tensor, nn
from train_lm import ByteGPT, Shape

import ds_fp8
from ds_fp8.config.parsing import parse
from ds_fp8.estimate import memory
from ds_fp8.ops.backend import REFERENCE
from ds_fp8.ops.reduction import NORM_PARTS
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.partition import ParameterSpec, partition
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.recipe import recipe_of
from ds_fp8.zero_fp8.verdict import Counted
from ds_fp8.zero_fp8.wiring import resident, room, shard_of

DIVISIBLE = Shape(layers=1, width=128, heads=4, context=49)  # 2112 blocks: 16 n on each of 2 or 4 ranks


class Bag(nn.Module):
    """Parameters of the given sizes; the loss gives each of them a gradient."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.bag = nn.ParameterList(nn.Parameter(torch.ones(size)) for size in sizes)

    def forward(self, factor: Tensor) -> Tensor:
        return sum(((each * factor).sum() for each in self.bag), torch.zeros(()))


# State bytes over all ranks, by hand: blocks of 128, whole pieces a rank.
SHAPES: dict[str, tuple[tuple[int, ...], int, dict[str, int]]] = {
    # by level, then the reduced gradient in E4M3 and accumulated in FP32
    "even": (
        (1024, 2048),
        2,
        {"O1": 36_864, "O2": 15_432, "O2+": 12_336, "gradient": 3_096, "accumulated": 12_288},
    ),
    "odd": (
        (1, 129, 1000),
        2,
        {"O1": 18_432, "O2": 7_716, "O2+": 6_168, "gradient": 1_548, "accumulated": 6_144},
    ),
    "tiny": ((1,), 3, {"O1": 4_608, "O2": 1_929, "O2+": 1_542, "gradient": 387, "accumulated": 1_536}),
}


def count_states(sizes: tuple[int, ...], level: str, micro_steps: int, steps: int) -> dict[str, Any]:
    alive = live_tensors()  # held until the end, so that no address of theirs is used again
    before = storages(alive)
    engine = build(ds_config({"opt_level": level}, micro_steps=micro_steps), Bag(*sizes))
    factor = torch.ones((), dtype=torch.bfloat16)
    before |= storages([factor])
    counts = []
    for step in range(steps):
        for _ in range(micro_steps):
            engine.backward(engine(factor))
            engine.step()
        counts.append(optimizer_bytes(engine.module, before) if step in (0, steps - 1) else 0)
    handler: FP8ZeROOptimizer = engine.optimizer
    accumulating = micro_steps > 1
    states = memory.state_bytes(handler.recipe, handler.parts.buckets)
    gradient = memory.gradient_bytes(handler.recipe, handler.parts.buckets, accumulating=accumulating)
    result = {
        "first": counts[0],
        "last": counts[-1],
        "allocated": handler.nbytes,
        "states": states,
        "gradient": gradient,
        "weights": sum(storages(engine.module.parameters()).values()),
        "expected_weights": memory.weight_bytes(2, handler.parts.buckets),
    }
    engine.destroy()
    return result


@pytest.mark.parametrize("steps", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("level", ["O1", "O2", "O2+"])
@pytest.mark.parametrize("shape", SHAPES)
def test_state_bytes(ranks: RankPools, shape: str, level: str, micro_steps: int, steps: int) -> None:
    sizes, world_size, expected = SHAPES[shape]
    per_rank = ranks.run(world_size, count_states, sizes, level, micro_steps, steps)
    gradient = expected["accumulated" if micro_steps > 1 else "gradient"]
    assert sum(found["states"] for found in per_rank) == expected[level]
    assert sum(found["gradient"] for found in per_rank) == gradient
    for found in per_rank:
        own = found["states"] + found["gradient"]
        assert found["first"] == found["last"] == found["allocated"] == own
        assert found["weights"] == found["expected_weights"]


def count_traffic(config: dict[str, Any], shape: Shape) -> dict[str, Any]:
    engine = build_gpt(config, shape)
    source = batches(engine, shape=shape)
    train_losses(engine, source, 2)
    with Traffic() as traffic:
        train_losses(engine, source, 1)
    result = {
        "handed": dict(traffic.handed),
        "sent": sum(traffic.sent.values()),
        "parameters": sum(each.numel() for each in engine.module.parameters()),
        "exchange": None,
    }
    if isinstance(engine.optimizer, FP8ZeROOptimizer):
        handler = engine.optimizer
        hops = (memory.hop_bytes(handler.recipe, bucket) for bucket in handler.parts.buckets)
        result["exchange"] = sum(map(sum, hops))
        result["buckets"] = len(handler.parts.buckets)
        result["about"] = ds_fp8.describe(engine)
    engine.destroy()
    return result


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_wire_bytes(ranks: RankPools, world_size: int, stage: int) -> None:
    ours = ranks.run(world_size, count_traffic, ds_config({}, stage=stage), DIVISIBLE)[0]
    stock = ranks.run(world_size, count_traffic, ds_config(stage=stage), DIVISIBLE)[0]
    parameters = ours["parameters"]
    assert ours["handed"]["alltoall_base_"] == ours["exchange"] == parameters * 129 // 128
    assert ours["handed"]["_allgather_base_"] == parameters * 2 // world_size
    agreement = (
        4 + (NORM_PARTS + len(Counted._fields)) * 8
    )  # the loss mean that the example prints, then the step's verdict
    assert ours["handed"]["allreduce_"] == agreement
    # stock DeepSpeed all-reduces the whole BF16 gradient, which a rank sends almost twice
    assert stock["handed"]["allreduce_"] > parameters * 2
    gather = parameters * 2 * (world_size - 1) / world_size
    ratio = (ours["sent"] - gather) / (stock["sent"] - gather)
    assert ratio == pytest.approx(1.0078 / 4, rel=0.01)


@pytest.mark.parametrize(("world_size", "stage", "shape"), [(1, 1, SMALL), (2, 2, DIVISIBLE), (3, 1, SMALL)])
def test_wire_bytes_of_fp8_weights(ranks: RankPools, world_size: int, stage: int, shape: Shape) -> None:
    """An element is gathered as its code; the ranks agree on a byte per tile. Gradients travel as ever."""
    fp8 = {"opt_level": "O3", "weights": {"min_elements": 256}}
    found = ranks.run(world_size, count_traffic, ds_config(fp8, stage=stage), shape)[0]
    about = found["about"]
    verdict = 4 + (NORM_PARTS + len(Counted._fields)) * 8
    assert found["handed"]["_allgather_base_"] == about["gather_bytes"]
    assert found["handed"]["allreduce_"] == verdict + about["agreement_bytes"]
    assert found["handed"]["alltoall_base_"] == found["exchange"]
    if shape is DIVISIBLE:
        others = found["parameters"] - about["fp8_elements"]
        assert about["gather_bytes"] == (about["fp8_elements"] + 2 * others) // world_size


EACH_TIME = {  # each module fetches what it needs and lets go of it
    "stage3_param_persistence_threshold": 300,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
    "memory_efficient_linear": False,
}


@pytest.mark.parametrize("shape", [DIVISIBLE, SMALL], ids=["divisible", "small"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_wire_bytes_of_zero_3(ranks: RankPools, world_size: int, shape: Shape) -> None:
    """Weights travel in forward and in backward, gradients as ever, persistent parameters after the step."""
    ours = ranks.run(world_size, count_traffic, ds_config({}, stage=3, zero=EACH_TIME), shape)[0]
    sizes = [each.numel() for each in ByteGPT(shape).parameters()]
    fleet, kept = Fleet("data", world_size), [numel for numel in sizes if numel <= 300]
    sent = memory.fetch_bytes(2, [numel for numel in sizes if numel > 300], 128, fleet)
    about = ours["about"]
    assert (about["fetch_bytes"], about["wire_bytes_per_fetched_element"]) == (sent, 2)
    assert about["persistent_bytes"] == (2 * sum(kept) if world_size > 1 else 0)
    assert ours["handed"].get("_allgather_base_", 0) == 2 * sent + memory.fetch_bytes(2, kept, 128, fleet)
    assert ours["handed"]["alltoall_base_"] == ours["exchange"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_wire_bytes_of_fp8_weights_under_zero_3(ranks: RankPools, world_size: int) -> None:
    """A fetch sends a byte per element of an FP8 matrix, twice in a micro-step; its scales are there."""
    fp8 = {"opt_level": "O3", "weights": {"min_elements": 256}}
    found = ranks.run(world_size, count_traffic, ds_config(fp8, stage=3, zero=EACH_TIME), SMALL, seconds=60.0)
    about, fleet = found[0]["about"], Fleet("data", world_size)
    sizes = {name: each.numel() for name, each in ByteGPT(SMALL).named_parameters()}
    fetched = {name: numel for name, numel in sizes.items() if numel > 300}
    kept = [numel for name, numel in sizes.items() if name not in fetched]
    itemsizes = {name: 1 if name in about["fp8_weights"] else 2 for name in fetched}
    sent = sum(memory.fetch_bytes(itemsizes[name], [numel], 128, fleet) for name, numel in fetched.items())
    assert about["fetch_bytes"] == sent
    handed = found[0]["handed"]
    assert handed["_allgather_base_"] == 2 * sent + memory.fetch_bytes(2, kept, 128, fleet)
    assert handed["allreduce_"] == 4 + (NORM_PARTS + len(Counted._fields)) * 8 + about["agreement_bytes"]
    assert handed["alltoall_base_"] == found[0]["exchange"]


def largest_message(bucket: int) -> dict[str, Any]:
    engine = build_gpt(ds_config({}, bucket=bucket))
    source = batches(engine)
    train_losses(engine, source, 1)
    parameters = [each.numel() for each in engine.module.parameters()]
    result = {
        "buckets": [sum(slot.numel for slot in each.slots) for each in engine.optimizer.parts.buckets],
        "parameters": parameters,
    }
    engine.destroy()
    return result


def test_reduce_bucket_size_is_obeyed(ranks: RankPools) -> None:
    found = ranks.run(2, largest_message, 5000)[0]
    assert sum(found["buckets"]) == sum(found["parameters"])
    assert len(found["buckets"]) > 5
    assert all(size <= 5000 or size in found["parameters"] for size in found["buckets"])


def test_the_ruler_sees_a_tensor() -> None:
    model = ByteGPT(SMALL)
    alive = live_tensors()  # held until the end, so that no address of theirs is used again
    before = storages(alive)
    extra = torch.zeros(1000)
    assert optimizer_bytes(model, before) == extra.nbytes


EVERY_STATE = list(
    product(
        ("fp32", "fp16", "bf16", "split16", "split8"),
        ("fp32", "bf16", "fp16", "e4m3", "e5m2"),
        ("fp32", "bf16", "fp16", "ue4m4", "e4m3", "e5m2"),
        (32, 128),
    )
)
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "split16": 16, "split8": 8, "ue4m4": 8, "e4m3": 8, "e5m2": 8}
UNSCALED = ("fp32", "bf16", "split16", "split8")


def test_every_recipe_allocates_its_bytes() -> None:
    """Codes, and a byte a block where the format has a scale: allocated as the arithmetic says."""
    specs = [
        ParameterSpec(index, numel, 0, "bf16", Fleet("data", 2))
        for index, numel in enumerate((1000, 1, 4096))
    ]
    for *formats, block_size in EVERY_STATE:
        keys = ("master_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        section = {"block_size": block_size, "optimizer": dict(zip(keys, formats, strict=True))}
        config = parse({"fp8": {"enabled": True, **section}})
        assert config is not None
        recipe = recipe_of(config)
        buckets = partition(specs, bucket_elements=10**6, block_size=block_size)
        blocks = buckets[0].blocks_per_rank
        by_hand = sum(blocks * (block_size * BITS[each] // 8 + (each not in UNSCALED)) for each in formats)
        shard = shard_of(buckets[0], 0, recipe, resident(recipe, torch.device("cpu")), REFERENCE, Counts())
        assert memory.state_bytes(recipe, buckets) == by_hand
        assert shard.nbytes == by_hand
        reduced = room(buckets[0], 0, recipe.reduced, torch.device("cpu"))
        assert reduced.nbytes == memory.gradient_bytes(recipe, buckets, accumulating=False)
        assert memory.state_bytes_per_parameter(recipe) == by_hand / (blocks * block_size)
