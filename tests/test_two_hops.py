"""The exchange in two hops: its arithmetic, bytes between nodes, what the second rounding costs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import (
    assert_same_bits,
    batches,
    build,
    build_gpt,
    ds_config,
    refusal,
    state_bits,
    train_losses,
    train_run,
    weight_bits,
)
from grids import grid, some_of
from meters import Traffic
from ranks import RankPools
from test_parity import EXAMPLE, assert_gradients, assert_parity, measure_gradients
from torch import Tensor, nn

from ds_fp8.estimate import memory
from ds_fp8.ops.blocks import Blocks, decode, quantize
from ds_fp8.ops.formats import BY_NAME, Format

OVERLAP = {"overlap_comm": True}
BLOCK = 128


# Where it coincides with one hop


def train(gradients: dict[str, Any], zero: dict[str, Any], stage: int) -> tuple[Any, Any, Any]:
    """Losses, weights, and bytes handed to collectives, of five steps."""
    engine = build_gpt(ds_config({"gradients": gradients}, zero=zero, stage=stage, bucket=4000))
    with Traffic() as traffic:
        losses = train_losses(engine, batches(engine), 5)
    bits = weight_bits(engine)
    engine.destroy()
    return losses, bits, dict(traffic.handed)


def assert_same_runs(runs: list[Any], others: list[Any]) -> None:
    for (losses, bits, handed), (other_losses, other_bits, other_handed) in zip(runs, others, strict=True):
        assert losses == other_losses
        assert_same_bits(bits, other_bits)
        assert handed == other_handed


@grid(world_size=[1, 2, 4], stage=[1, 2], zero=[{}, OVERLAP])
def test_nodes_of_one_rank_and_one_node_are_one_hop(
    ranks: RankPools, world_size: int, stage: int, zero: dict[str, Any]
) -> None:
    plain = ranks.run(world_size, train, {}, {}, stage)
    for size in (1, world_size):
        section = {"intra_node_size": size, "inter_node_dtype": "bf16"}
        assert_same_runs(ranks.run(world_size, train, section, zero, stage), plain)


@some_of(["stage", "inter_node_dtype"], [(1, "e4m3"), (2, "bf16"), (1, "bf16"), (2, "e4m3")], 2)
def test_overlap_changes_no_bit(ranks: RankPools, stage: int, inter_node_dtype: str) -> None:
    section = {"intra_node_size": 2, "inter_node_dtype": inter_node_dtype}
    plain, overlapped = (ranks.run(4, train, section, zero, stage) for zero in ({}, OVERLAP))
    assert_same_runs(overlapped, plain)
    for _, bits, _ in plain:
        assert_same_bits(bits, plain[0][1])  # every rank has gathered the same weights


# The arithmetic


class Given(nn.Module):
    """One parameter whose gradient is what forward is given, in BF16."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum().float()


def given_gradient(kind: str, rank: int, size: int) -> Tensor:
    """BF16: independent on every rank; the same but for a fifth, so that each rounds on its own; or so that
    the FP32 sum shows its order.
    """
    own, common = torch.Generator().manual_seed(1 + rank), torch.Generator().manual_seed(0)
    noise, shared = torch.randn(size, generator=own), torch.randn(size, generator=common)
    values = {
        "independent": noise,
        "equal": shared + noise / 5,
        "cancelling": (noise, shared * 2**20, noise, -shared * 2**20)[rank % 4],
    }
    return values[kind].bfloat16()


def reduced(gradients: dict[str, Any], kind: str, size: int) -> Tensor:
    """This rank's part of the sum, FP32, after one exchange of given gradients."""
    config = ds_config({"gradients": {"accum_dtype": "fp32", **gradients}})
    engine = build(config, Given(size))
    engine.backward(engine(given_gradient(kind, dist.get_rank(), size)))
    (reduced,) = engine.optimizer.parts.reduced
    part = decode(reduced.blocks).view(-1)
    engine.step()
    engine.destroy()
    return part


def whole(parts: list[Tensor], size: int) -> Tensor:
    return torch.cat(parts)[:size]


def rounded(values: Tensor, fmt: Format) -> Tensor:
    """Values as a format keeps them, blocks counted from the first."""
    blocks = Blocks.zeros(-(-len(values) // BLOCK), BLOCK, fmt, values.device)
    quantize(values, blocks)
    return decode(blocks).view(-1)[: len(values)]


def sum_by_hand(kind: str, ranks: int, node: int, wire: Format, between: Format, size: int) -> Tensor:
    """Rank by rank in FP32; with nodes, rounded once a node and then added node by node."""
    own = [rounded(given_gradient(kind, rank, size), wire) for rank in range(ranks)]
    sums = [sum(own[first + 1 : first + node], start=own[first]) for first in range(0, ranks, node)]
    sent = [rounded(each, between) for each in sums] if 1 < node < ranks else sums
    return sum(sent[1:], start=sent[0])


SIZE = 9 * BLOCK + 5  # 10 blocks: nothing divides

HOPS = [  # ranks, ranks a node, wire, between nodes
    (4, 2, "e4m3", None),
    (4, 2, "e4m3", "bf16"),
    (4, 2, "bf16", "e4m3"),
    (4, 2, "e5m2", None),
    (8, 2, "e4m3", None),
    (8, 4, "e4m3", None),
    (8, 4, "e4m3", "bf16"),
]


@pytest.mark.parametrize(("world_size", "node", "wire", "between"), HOPS)
def test_the_sum_is_that_of_nodes(
    ranks: RankPools, world_size: int, node: int, wire: str, between: str | None
) -> None:
    section = {"dtype": wire, "intra_node_size": node}
    section |= {"inter_node_dtype": between} if between else {}
    for kind in ("independent", "cancelling"):
        found = whole(ranks.run(world_size, reduced, section, kind, SIZE), SIZE)
        expected = sum_by_hand(kind, world_size, node, BY_NAME[wire], BY_NAME[between or wire], SIZE)
        assert_same_bits({kind: found.view(torch.int32)}, {kind: expected.view(torch.int32)})


# Bytes between nodes


def crossed(node: int, size: int, gradients: dict[str, Any]) -> dict[str, Any]:
    """Bytes that this rank sends to other nodes in one step, by collective."""
    engine = build_gpt(ds_config({"gradients": gradients}, bucket=size))
    source = batches(engine)
    train_losses(engine, source, 1)
    with Traffic(node_size=node) as traffic:
        train_losses(engine, source, 1)
    handler = engine.optimizer
    expected = sum(sum(memory.hop_bytes(handler.recipe, bucket)) for bucket in handler.parts.buckets)
    assert traffic.handed["alltoall_base_"] == expected
    engine.destroy()
    return dict(traffic.crossed)


@some_of(
    ["world_size", "node", "bucket"],
    [(4, 2, 4000), (8, 2, 10**9), (8, 4, 4000), (4, 2, 10**9), (8, 2, 4000), (8, 4, 10**9)],
    3,
)
def test_bytes_between_nodes_are_one_kth(ranks: RankPools, world_size: int, node: int, bucket: int) -> None:
    one = ranks.run(world_size, crossed, node, bucket, {})
    two = ranks.run(world_size, crossed, node, bucket, {"intra_node_size": node})
    for direct, by_nodes in zip(one, two, strict=True):
        for name in ("alltoall_base_", "_allgather_base_"):
            assert direct[name] == node * by_nodes[name] > 0, name


# What the second rounding costs


def signal_to_noise(found: Tensor, exact: Tensor) -> float:
    """In dB."""
    return 10 * math.log10((exact.square().sum() / (found.double() - exact).square().sum()).item())


def theory(kind: str, node: int, ties: float = 0.0) -> float:
    """dB that a second rounding to E4M3 costs: as much noise as the first, on a larger power.

    The sum of a node of k independent gradients has k times the power of one; of equal ones, k^2 times: 3 dB,
    10 log10(1 + k) dB. `ties`: sums of k codes of one binade lie a k-th of a code apart, many in the middle
    between two codes, which gives 2/k^2 more noise than sums that lie anywhere.
    """
    power = 1 + {"independent": 0.0, "equal": (node - 1) / (1 + 1 / 25)}[kind]
    return 10 * math.log10(1 + power * (1 + ties))


@pytest.mark.parametrize("kind", ["independent", "equal"])
@pytest.mark.parametrize(("world_size", "node"), [(4, 2), (8, 2), (8, 4)])
def test_cost_of_the_second_rounding(ranks: RankPools, world_size: int, node: int, kind: str) -> None:
    size = 1 << 17
    exact = sum(given_gradient(kind, rank, size).double() for rank in range(world_size))
    nodes = {"intra_node_size": node}
    one, two, bf16 = (
        signal_to_noise(whole(ranks.run(world_size, reduced, section, kind, size), size), exact)
        for section in ({}, nodes, {**nodes, "inter_node_dtype": "bf16"})
    )
    alike = 0 if kind == "independent" else (world_size - 1) / (1 + 1 / 25)
    assert one == pytest.approx(31.5 + 10 * math.log10(1 + alike), abs=0.1)
    assert theory(kind, node) - 0.1 < one - two < theory(kind, node, 2 / node**2) + 0.1
    assert abs(one - bf16) < 0.05


# Training


@pytest.mark.parametrize("inter_node_dtype", ["e4m3", "bf16"])
def test_gradients(ranks: RankPools, inter_node_dtype: str) -> None:
    section = {"gradients": {"intra_node_size": 2, "inter_node_dtype": inter_node_dtype}}
    assert_gradients(ranks.run(4, measure_gradients, 2, 1, 0.0, None, section)[0])


@pytest.mark.slow
def test_gradients_of_nodes_of_four(ranks: RankPools) -> None:
    section = {"gradients": {"intra_node_size": 4}}
    assert_gradients(ranks.run(8, measure_gradients, 2, 1, 0.0, None, section)[0])


@pytest.mark.slow
@pytest.mark.parametrize("inter_node_dtype", ["e4m3", "bf16"])
def test_losses_equal_stock_bf16(ranks: RankPools, inter_node_dtype: str) -> None:
    section = {"gradients": {"intra_node_size": 2, "inter_node_dtype": inter_node_dtype}}
    ours, stock = (
        ranks.run(4, train_run, ds_config(fp8, micro_batch=4), EXAMPLE, 0, 150)[0] for fp8 in (section, None)
    )
    assert_parity(ours, stock)


# What is not finite, and what is cut off


def skipped(gradients: dict[str, Any], value: float) -> tuple[bool, Any]:
    """A step in which one value of one rank's gradient is not finite, then one that is."""
    engine = build(ds_config({"gradients": gradients}, zero=OVERLAP), Given(SIZE))
    before = weight_bits(engine)
    gradient = given_gradient("independent", dist.get_rank(), SIZE)
    if dist.get_rank() == 1:
        gradient[700] = value
    engine.backward(engine(gradient))
    engine.step()
    overflow = engine.optimizer.overflow
    assert_same_bits(weight_bits(engine), before)
    engine.backward(engine(given_gradient("independent", dist.get_rank(), SIZE)))
    engine.step()
    assert not engine.optimizer.overflow
    engine.destroy()
    return overflow


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("inter_node_dtype", ["e4m3", "bf16"])
def test_what_is_not_finite_travels_through_both_hops(
    ranks: RankPools, inter_node_dtype: str, value: float
) -> None:
    section = {"intra_node_size": 2, "inter_node_dtype": inter_node_dtype}
    assert all(ranks.run(4, skipped, section, value))


def saved_and_resumed(folder: str, gradients: dict[str, Any]) -> Any:
    """Masters and states as they are after loading what one hop has saved."""
    engine = build_gpt(ds_config({}, bucket=4000))
    train_losses(engine, batches(engine), 2)
    engine.save_checkpoint(folder)
    saved = state_bits(engine.optimizer)
    engine.destroy()
    engine = build_gpt(ds_config({"gradients": gradients}, bucket=4000), seed=1)
    engine.load_checkpoint(folder)
    loaded = state_bits(engine.optimizer)
    assert train_losses(engine, batches(engine), 1)
    engine.destroy()
    return saved, loaded


def test_a_checkpoint_does_not_know_the_hops(ranks: RankPools, tmp_path: Path) -> None:
    for saved, loaded in ranks.run(4, saved_and_resumed, str(tmp_path), {"intra_node_size": 2}):
        assert_same_bits(saved, loaded)


def refuse_nodes(size: int) -> str:
    return refusal(lambda: build_gpt(ds_config({"gradients": {"intra_node_size": size}})))


def test_nodes_that_do_not_divide_the_ranks_are_refused(ranks: RankPools) -> None:
    words = "fp8.gradients.intra_node_size: received 3, allowed: divisors of the world size 4: 1, 2, 4"
    assert ranks.run(4, refuse_nodes, 3) == [words] * 4


def threads_of_groups() -> int:
    """Threads that gloo has in this process: every process group has one that polls."""
    names = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


def threads_while_engines_come_and_go(stage: int) -> list[int]:
    """Threads with an engine and after it, for two of them, one after the other."""
    found = []
    for _ in range(2):
        engine = build_gpt(ds_config({"gradients": {"intra_node_size": 2}}, stage=stage))
        train_losses(engine, batches(engine), 1)
        found.append(threads_of_groups())
        engine.destroy()
        found.append(threads_of_groups())
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed in /proc")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_destroyed_engine_leaves_no_groups(ranks: RankPools, stage: int) -> None:
    first, then, second, last = ranks.run(4, threads_while_engines_come_and_go, stage)[0]
    assert first == second > then == last
