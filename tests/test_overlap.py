"""Exchanges that run while backward goes on: the same bits, bounded memory, no deadlock."""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from deepspeed import comm as dist
from engines import SMALL, assert_same_bits, batches, build, build_gpt, ds_config, train_losses, weight_bits
from grids import grid
from meters import storages
from ranks import RankPools
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ds_fp8.estimate import memory
from ds_fp8.zero_fp8.comm.collectives import AllToAll
from ds_fp8.zero_fp8.gradients.reducer import UNDER_WAY
from ds_fp8.zero_fp8.states.shard import Shard

OVERLAP = {"overlap_comm": True}
Bits = dict[str, Tensor]


def train(config: dict[str, Any], boundaries: list[bool] | None) -> tuple[list[float], Bits]:
    """Losses and weights of five steps; `boundaries`: micro-steps that the config does not announce."""
    engine = build_gpt(config)
    source = batches(engine)
    if boundaries is None:
        losses = train_losses(engine, source, 5)
    else:
        losses = []
        for boundary in boundaries:
            engine.set_gradient_accumulation_boundary(boundary)
            losses.append(engine(next(source)))
            engine.backward(losses[-1])
            engine.step()
        losses = [loss.item() for loss in losses]
    bits = weight_bits(engine)
    engine.destroy()
    return losses, bits


def assert_same_runs(runs: list[tuple[list[float], Bits]], others: list[tuple[list[float], Bits]]) -> None:
    for (losses, bits), (other_losses, other_bits) in zip(runs, others, strict=True):
        assert losses == other_losses
        assert_same_bits(bits, other_bits)


@grid(world_size=[1, 2, 3], stage=[1, 2], micro_steps=[1, 2], bucket=[2000, 20_000, 10**9])
def test_overlap_changes_no_bit(
    ranks: RankPools, world_size: int, stage: int, micro_steps: int, bucket: int
) -> None:
    options: dict[str, Any] = {"stage": stage, "micro_steps": micro_steps, "bucket": bucket}
    plain, overlapped = (
        ranks.run(world_size, train, ds_config({}, zero=zero, **options), None) for zero in ({}, OVERLAP)
    )
    assert_same_runs(overlapped, plain)


def test_overlap_changes_no_bit_where_micro_steps_are_unannounced(ranks: RankPools) -> None:
    """The second one's arrival turns the reduced gradient FP32, in the middle of a backward."""
    boundaries = [False, False, True, False, True]
    plain, overlapped = (
        ranks.run(2, train, ds_config({}, zero=zero, bucket=4000), boundaries) for zero in ({}, OVERLAP)
    )
    assert_same_runs(overlapped, plain)


# When what is launched and waited for


class Diary:
    """Launches, waits and sweeps of one step, in order, with the number of the bucket."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def collective(self, name: str) -> Any:
        """Writes down a collective that is launched, and when it is waited for."""
        original = getattr(dist, name)

        def launch(*arguments: Any, **options: Any) -> Any:
            assert options["async_op"], f"{name} blocks"
            number = sum(event.startswith(f"{name} ") for event in self.events)
            self.events.append(f"{name} {number}")
            return Written(original(*arguments, **options), lambda: self.events.append(f"wait {number}"))

        return patch.object(dist, name, launch)

    def sweep(self) -> Any:
        original = Shard.sweep

        def sweep(shard: Shard, *arguments: Any) -> None:
            self.events.append(f"sweep {sum(event.startswith('sweep') for event in self.events)}")
            original(shard, *arguments)

        return patch.object(Shard, "sweep", sweep)


class Written:
    """A work handle whose wait is written down."""

    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self._work = work
        self._note = note

    def wait(self) -> None:
        self._note()
        self._work.wait()


def diary_of(config: dict[str, Any], part: str) -> list[str]:
    engine = build_gpt(config)
    source = batches(engine)
    train_losses(engine, source, 1)
    diary = Diary()
    loss = engine(next(source))
    if part == "backward":
        with diary.collective("all_to_all_single"):
            engine.backward(loss)
        engine.step()
    else:
        engine.backward(loss)
        with diary.collective("all_gather_into_tensor"), diary.sweep():
            engine.step()
    engine.destroy()
    return diary.events


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_two_buckets_are_under_way(ranks: RankPools, world_size: int, stage: int) -> None:
    config = ds_config({}, zero=OVERLAP, bucket=4000, stage=stage)
    events = ranks.run(world_size, diary_of, config, "backward")[0]
    buckets = len(events) // 2
    assert buckets > 5
    expected = ["all_to_all_single 0"]
    for number in range(1, buckets):
        expected += [f"wait {number - 2}"] * (number > 1) + [f"all_to_all_single {number}"]
    assert events == [*expected, f"wait {buckets - 2}", f"wait {buckets - 1}"]


def test_the_second_hop_starts_before_the_next_bucket(ranks: RankPools) -> None:
    """Every bucket makes two collectives: its second is launched just before the next one's first."""
    config = ds_config({"gradients": {"intra_node_size": 2}}, zero=OVERLAP, bucket=4000)
    events = ranks.run(4, diary_of, config, "backward")[0]
    launches = len(events) // 2
    assert launches > 10
    name = "all_to_all_single"
    expected = [f"{name} 0", "wait 0", f"{name} 1", f"{name} 2"]  # 0, 1: hops of the first bucket
    for number in range(2, launches - 1, 2):
        expected += [f"wait {number - 1}", f"wait {number}", f"{name} {number + 1}"]
        expected += [f"{name} {number + 2}"] * (number + 2 < launches)
    assert events == [*expected, f"wait {launches - 1}"]


def test_without_overlap_an_exchange_is_waited_for(ranks: RankPools) -> None:
    events = ranks.run(2, diary_of, ds_config({}, bucket=4000), "backward")[0]
    buckets = len(events) // 2
    assert events == [
        event for number in range(buckets) for event in (f"all_to_all_single {number}", f"wait {number}")
    ]


def diary_of_an_interruption() -> list[str]:
    """A backward that raises after some buckets have left, then the engine forgets it."""

    def fail(_: Tensor) -> Tensor:
        raise ArithmeticError("planted")

    engine = build_gpt(ds_config({}, zero=OVERLAP, bucket=4000))
    handle = engine.module.blocks[0].up.weight.register_hook(fail)
    loss = engine(next(batches(engine)))
    diary = Diary()
    with diary.collective("all_to_all_single"):
        with pytest.raises(ArithmeticError, match="planted"):
            engine.backward(loss)
        diary.events.append("raised")
        engine.optimizer.zero_grad()
    handle.remove()
    engine.destroy()
    return diary.events


def test_what_an_error_leaves_under_way_is_waited_for(ranks: RankPools) -> None:
    events = ranks.run(2, diary_of_an_interruption)[0]
    before, after = events[: events.index("raised")], events[events.index("raised") + 1 :]
    launched, waited = (sum(event.startswith(word) for event in before) for word in ("all_to", "wait"))
    assert after == [f"wait {number}" for number in range(waited, launched)]
    assert len(after) == 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_are_gathered_as_soon_as_they_are_swept(ranks: RankPools, world_size: int) -> None:
    events = ranks.run(world_size, diary_of, ds_config({}, bucket=4000), "step")[0]
    buckets = len(events) // 3
    assert buckets > 5
    launched = [
        event
        for number in range(buckets)
        for event in (f"sweep {number}", f"all_gather_into_tensor {number}")
    ]
    assert events == [*launched, *(f"wait {number}" for number in range(buckets))]


class Reads(TorchDispatchMode):
    """Counts values that the host reads one by one (`item`, a comparison in an `if`), each of which waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def reads_in_a_step() -> int:
    engine = build_gpt(ds_config({}))
    source = batches(engine)
    train_losses(engine, source, 1)
    engine.backward(engine(next(source)))
    with Reads() as reads:
        engine.step()
    engine.destroy()
    return reads.count


def test_a_step_reads_its_verdict_only(ranks: RankPools) -> None:
    assert ranks.run(1, reads_in_a_step) == [0]


# Memory


class InFlight(TorchDispatchMode):
    """The most bytes that were alive of what a collective is handed and fills, but for `others`."""

    def __init__(self, collective: str = "alltoall_base_", others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._collective = collective
        self._others = storages(others)
        self._buffers: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and func._opname == self._collective:
            time.sleep(0.01)  # gloo's thread lets go of the last exchange a moment after it is done
            for tensor in args[:2]:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._others:
                    self._buffers[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
            alive = [size for reference, size in self._buffers.values() if not reference.expired()]
            self.peak = max(self.peak, sum(alive))
        return func(*args, **(kwargs or {}))


class Equal(nn.Module):
    """Eight parameters of one size, each a bucket."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.ones(size)) for _ in range(8))

    def forward(self, factor: Tensor) -> Tensor:
        return sum(((each * factor).sum() for each in self.parts), torch.zeros(()))


def bytes_in_flight(config: dict[str, Any], size: int) -> dict[str, int]:
    engine = build(config, Equal(size))
    for _ in range(2):
        with InFlight() as counted:
            engine.backward(engine(torch.ones((), dtype=torch.bfloat16)))
        with InFlight("_allgather_base_", engine.module.parameters()) as gathered:
            engine.step()
    handler = engine.optimizer
    buckets = handler.parts.buckets
    expected = memory.in_flight_bytes(handler.recipe, buckets, overlap=handler.settings.overlap)
    elements = [sum(slot.numel for slot in bucket.slots) for bucket in buckets]
    engine.destroy()
    return {
        "peak": counted.peak,
        "expected": expected,
        "largest": max(elements),
        "buckets": len(buckets),
        "gathered": gathered.peak,
        "gathered_expected": memory.gather_bytes(handler.recipe, 2, buckets),
    }


SIZE = 128 * 16 * 16  # 16 blocks and more on each of 2 or 4 ranks, so that no message is padded


@pytest.mark.parametrize(
    ("world_size", "gradients", "zero", "bytes_per_element"),
    [
        (1, {}, OVERLAP, 4 * 129 / 128),
        (2, {}, {}, 2 * 129 / 128),
        (2, {}, OVERLAP, 4 * 129 / 128),
        (4, {}, OVERLAP, 4 * 129 / 128),
        (4, {"intra_node_size": 2}, {}, 2 * 129 / 128),
        (4, {"intra_node_size": 2}, OVERLAP, 3 * 129 / 128),
        (4, {"intra_node_size": 2, "inter_node_dtype": "bf16"}, OVERLAP, 2 * 129 / 128 + 2),
    ],
)
def test_bytes_in_flight(
    ranks: RankPools,
    world_size: int,
    gradients: dict[str, Any],
    zero: dict[str, Any],
    bytes_per_element: float,
) -> None:
    config = ds_config({"gradients": gradients}, zero=zero, bucket=1)
    for found in ranks.run(world_size, bytes_in_flight, config, SIZE):
        assert found["buckets"] == 8
        assert found["peak"] == found["expected"] == bytes_per_element * found["largest"]
        assert found["peak"] <= 4.04 * found["largest"]
        nodes_of = gradients.get("intra_node_size")
        of_weights = 2 * found["largest"] // nodes_of if nodes_of else 0
        assert found["gathered"] == found["gathered_expected"] == of_weights


def test_bytes_in_flight_of_unequal_buckets_are_within_the_bound(ranks: RankPools) -> None:
    config = ds_config({}, zero=OVERLAP, bucket=9000)
    for found in ranks.run(3, gpt_bytes_in_flight, config):
        assert 0 < found["peak"] <= found["expected"]
        assert found["peak"] <= 4.04 * found["largest"] + 2 * UNDER_WAY * 3 * (128 + 16)  # padding


def gpt_bytes_in_flight(config: dict[str, Any]) -> dict[str, int]:
    engine = build_gpt(config, SMALL)
    loss = engine(next(batches(engine)))
    with InFlight() as counted:
        engine.backward(loss)
    handler = engine.optimizer
    expected = memory.in_flight_bytes(handler.recipe, handler.parts.buckets, overlap=True)
    largest = max(bucket.slots[-1].first_block + bucket.slots[-1].blocks for bucket in handler.parts.buckets)
    engine.step()
    engine.destroy()
    return {"peak": counted.peak, "expected": expected, "largest": largest * 128}


# Any order


class Drawn(nn.Module):
    """Layers of one width, applied in an order that each rank draws for itself at every step."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.width = choice.randint(3, 48)
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(choice.randint(1, 9)))
        self.reentrant = choice.random() < 0.3
        self.plan: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for number in self.plan:
            layer = self.layers[number]
            x = x + torch.tanh(checkpoint(layer, x, use_reentrant=True) if self.reentrant else layer(x))
        return x.float().square().mean()


def drawn_run(seed: int, overlap: bool) -> Bits:
    """Three steps of a random model with random buckets; some layers are used by some ranks only."""
    torch.manual_seed(seed)
    choice = random.Random(seed)
    model = Drawn(choice)
    largest = sum(each.numel() for each in model.parameters())
    stage, bucket = choice.choice([1, 2, 2]), choice.randint(1, largest + largest // 4)
    engine = build(ds_config({}, stage=stage, bucket=bucket, zero={"overlap_comm": overlap}), model)
    for step in range(3):
        own = random.Random(f"{seed} {step} {dist.get_rank()}")
        count = own.randint(1, len(model.layers) + 1)
        model.plan = [own.randrange(len(model.layers)) for _ in range(count)]
        generator = torch.Generator().manual_seed(100 * seed + 10 * step + dist.get_rank())
        x = torch.randn(4, model.width, generator=generator).bfloat16().requires_grad_()
        engine.backward(engine(x))
        engine.step()
    bits = weight_bits(engine)
    engine.destroy()
    return bits


def drawn_runs(seeds: range) -> None:
    for seed in seeds:
        assert_same_bits(drawn_run(seed, True), drawn_run(seed, False))


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_fifty_random_models_do_not_deadlock(ranks: RankPools, first: int) -> None:
    ranks.run(3, drawn_runs, range(first, first + 10), seconds=60)


class OfAnotherStream:
    """A buffer on a GPU that was made on another stream than the current one."""

    is_cuda = True

    def __init__(self) -> None:
        self.kept_for: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.kept_for.append(stream)


def test_buffers_are_reused_after_the_stream_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that waits for an exchange need not be that on which its buffers were made."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    exchange, buffers = object.__new__(AllToAll), (OfAnotherStream(), OfAnotherStream())
    exchange._work, (exchange._sent, exchange._received) = Mock(), buffers  # type: ignore[assignment]
    exchange.wait()
    assert [each.kept_for for each in buffers] == [["current"]] * 2
