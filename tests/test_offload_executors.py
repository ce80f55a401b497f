"""How executors are chosen, on how many threads the host sweeps, and that nothing is read before it has come.

Without a GPU, what would be streams and events there are simulated: every copy and every sweep is recorded
with what it reads and writes, and two that touch the same bytes must be ordered by events.
"""

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engines import refusal
from ranks import RankPools
from streams import Simulation, Worker, tensors_of
from test_offload import config_of, logged, make
from torch import Tensor

from ds_fp8.ops import backend as backends
from ds_fp8.ops.adam import AdamScalars
from ds_fp8.ops.backend import REFERENCE
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BY_NAME, E4M3, FP32
from ds_fp8.ops.rounding import Rounding
from ds_fp8.zero_fp8.gradients import landing as landings
from ds_fp8.zero_fp8.gradients.landing import HostSum, Landing
from ds_fp8.zero_fp8.gradients.reduced import BlockSum
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.offload import place
from ds_fp8.zero_fp8.placement.partition import ParameterSpec, partition
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.recipe import Offload
from ds_fp8.zero_fp8.states import choice, host_sweep, ring
from ds_fp8.zero_fp8.states.arena import Arena
from ds_fp8.zero_fp8.states.choice import Estimate
from ds_fp8.zero_fp8.states.residence import Residence, staging_bytes, streamed, swept_on_host
from ds_fp8.zero_fp8.states.shard import Shard

SECONDS = 60.0
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)

# Choice


def chosen(
    executor: str, device: torch.device, found: Estimate | None, ratio: float = 1.0
) -> tuple[bool, Any]:
    """Whether the host sweeps, and what is logged. found: what is measured; None: it fails."""
    offload = Offload(executor, ratio=ratio)
    measured = patch.object(
        place,
        "measure",
        return_value=found,
        side_effect=None if found else RuntimeError("out of memory"),
    )
    alone = patch.object(place, "gather_objects", lambda value, ranks: [value])
    with measured, alone, logged() as log:
        recipe = place.Recipe(
            128, E4M3, E4M3, True, BY_NAME["fp16"], Rounding(0, True), E4M3, BY_NAME["fp16"], True
        )
        host = place._host_if_wanted(recipe, offload, device, SimpleNamespace(rank=0))  # type: ignore[arg-type]
    return host is not None, log


@pytest.mark.parametrize(
    ("executor", "device", "found", "host"),
    [
        ("stream", GPU, Estimate(0.2, 0.1), False),
        ("host", GPU, Estimate(0.1, 0.2), True),
        ("host", CPU, Estimate(0.1, 0.2), True),
        ("auto", GPU, Estimate(0.2, 0.1), True),
        ("auto", GPU, Estimate(0.1, 0.2), False),
        ("auto", GPU, None, False),
        ("auto", CPU, Estimate(0.2, 0.1), False),  # there is no link
    ],
)
def test_the_faster_one_is_chosen(
    executor: str, device: torch.device, found: Estimate | None, host: bool
) -> None:
    is_host, log = chosen(executor, device, found)
    assert is_host is host
    assert bool(log) is (executor == "auto" and device is GPU)
    if log and found:
        assert "stream 0." in log[0]
        assert "host 0." in log[0]
        assert log[0].endswith(": host" if host else ": stream")


def test_part_of_the_states_is_never_for_the_host() -> None:
    assert chosen("auto", GPU, Estimate(0.2, 0.1), ratio=0.5) == (False, [])


def test_without_a_compiler() -> None:
    """auto streams; host is refused, and the refusal names stream."""
    failing = patch.object(backends, "cpu_obstacle", return_value="there is no compiler")
    with failing:
        assert not chosen("auto", GPU, Estimate(0.2, 0.1))[0]
        said = refusal(lambda: chosen("host", GPU, Estimate(0.2, 0.1)))
    assert 'fp8.offload.executor: received "host", allowed: "stream"' in said
    assert "there is no compiler" in said


def test_the_host_is_measured() -> None:
    recipe_formats = tuple(BY_NAME[name] for name in ("split16", "e4m3", "ue4m4"))
    with patch.object(choice, "_link", return_value=0.02), patch.object(choice, "SWEPT", 1 << 16):
        host = backends.choose_for_host(1)
        found = choice.measure(recipe_formats, 128, Rounding(0), CPU, host)
    assert found.stream == pytest.approx(0.02 * (4 + 2 / 128))
    assert found.host >= 0.04  # two bytes of weights go up


@pytest.mark.parametrize(
    ("own", "machine", "ranks_here", "expected"),
    [(16, 16, 1, 16), (16, 16, 8, 2), (4, 16, 4, 4), (2, 2, 4, 1)],
)
def test_cores_of_a_rank(own: int, machine: int, ranks_here: int, expected: int) -> None:
    """All cores are shared; those that a launcher has bound to a rank are its own."""
    with (
        patch("os.sched_getaffinity", return_value=set(range(own))),
        patch("os.cpu_count", return_value=machine),
        patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(ranks_here)}),
    ):
        assert choice.cores_of_a_rank() == expected


def threads_used(config: dict[str, Any]) -> tuple[set[int], set[int]]:
    """What the kernels of sweeps and sums are given; torch itself has one thread."""
    from test_offload import train

    assert torch.get_num_threads() == 1
    from ds_fp8.ops.cpu import kernels
    from ds_fp8.ops.cpu.threads import thread_count

    swept, added = set(), set()
    step, accumulate = kernels._step, kernels._accumulate

    def stepped(*arguments: Any) -> None:
        swept.add(thread_count())
        step(*arguments)

    def summed(kernel: Any, pieces: Any, shard: Any, overwrite: bool) -> Tensor:
        if not overwrite:
            added.add(thread_count())
        return accumulate(kernel, pieces, shard, overwrite)

    with patch.object(kernels, "_step", stepped), patch.object(kernels, "_accumulate", summed):
        engine = make(config)
        train(engine, "clip", range(1))
    engine.destroy()
    return swept, added


def test_threads_are_those_of_the_section(ranks: RankPools) -> None:
    """Launchers set OMP_NUM_THREADS to 1, which DeepSpeed's own CPU Adam obeys."""
    config = config_of("O2", 2, 2, {"executor": "host", "threads": 3})
    assert ranks.run(1, threads_used, config, seconds=SECONDS) == [({3}, {3})]


# Order


@dataclass
class Room:
    room: Tensor


def shards(residence: Residence, rows: int, count: int, simulation: Simulation, where: str) -> list[Shard]:
    """Shards whose sweeps are recorded."""

    def sweep(given: Any) -> None:
        states = tensors_of(given.state.master, given.state.exp_avg, given.state.exp_avg_sq)
        touched = [*states, given.weights]
        simulation.record("sweep", where, [*tensors_of(given.gradient), *touched], touched)

    spec = ParameterSpec(0, rows * 32, 0, "bf16", Fleet("data", 1))
    (bucket,) = partition([spec], bucket_elements=rows * 32, block_size=32)
    recorded = replace(REFERENCE, adam_step=sweep)
    for part in (found := [residence.parts(rows) for _ in range(count)]):
        for each in part:
            if each.executor is not None:
                each.executor.backend = recorded  # type: ignore[misc]
    return [Shard(tuple(bucket.pieces(0)), part, Rounding(0), recorded, Counts()) for part in found]


SCALARS = AdamScalars(1, 1e-3, 0.9, 0.95, 1e-8, 0.1, True, True, 1.0)
SPLIT = tuple(BY_NAME[name] for name in ("split16", "e4m3", "ue4m4"))
WHOLE = tuple(BY_NAME[name] for name in ("fp16", "e4m3", "fp16"))


def steps(simulation: Simulation, found: list[Shard], rows: int, where: str) -> None:
    """Three steps, between which the device reads and writes the weights, as forward and gathers do."""
    weights = [torch.zeros(rows, 32, dtype=torch.bfloat16) for _ in found]
    gradient = Blocks.zeros(rows, 32, E4M3, CPU)
    for _ in range(3):
        for each in weights:
            simulation.record("forward", "main", [each], [])
        for shard, each in zip(found, weights, strict=True):
            shard.sweep(gradient, Room(each), SCALARS, torch.ones(2))
            simulation.record("gather", "main", [each], [each])
    for shard in found:
        with shard.lend(slice(0, 2)):
            pass


@pytest.mark.parametrize("rows", [3, 8, 9, 25, 60])
def test_no_state_is_touched_before_it_has_come(rows: int) -> None:
    """Chunks of 8 rows: from less than one to more than the ring holds."""
    simulation = Simulation()
    with patch("ds_fp8.zero_fp8.states.visits.CHUNK", 8 * 32), simulation.of(ring):
        residence = streamed([rows] * 2, 32, WHOLE, CPU, REFERENCE)
        steps(simulation, shards(residence, rows, 2, simulation, "main"), rows, "main")
    assert len({op.stream for op in simulation.ops}) == 3
    simulation.check()


@pytest.mark.parametrize("formats", [SPLIT, WHOLE])
@pytest.mark.parametrize("rows", [3, 9, 60])
def test_no_weight_is_touched_before_it_has_come(rows: int, formats: Any) -> None:
    simulation = Simulation()
    with patch("ds_fp8.zero_fp8.states.visits.CHUNK", 8 * 32), simulation.of(host_sweep):
        arena = Arena(staging_bytes([rows] * 2, 32, 64), None)
        residence = swept_on_host([rows] * 2, 32, formats, CPU, REFERENCE, arena, 64)
        steps(simulation, shards(residence, rows, 2, simulation, "host"), rows, "host")
    assert len({op.stream for op in simulation.ops}) == (4 if formats is SPLIT else 3)
    simulation.check()


def adding(simulation: Simulation, worker: Worker | None) -> Any:
    """Kernels whose sums are recorded, of the device or of the host's thread."""

    def accumulate(pieces: Any, shard: Blocks, *, overwrite: bool) -> Tensor:
        reads, writes = tensors_of(*pieces, *([] if overwrite else [shard])), tensors_of(shard)
        if worker is None:
            simulation.record("add", "main", reads, writes)
        else:
            worker.record("add", reads, writes)
        return torch.zeros(1)

    return replace(REFERENCE, accumulate=accumulate)


def test_no_gradient_is_touched_before_it_has_come() -> None:
    """Three buckets and three micro-steps, the last of which brings more bytes than an FP32 sum has."""
    simulation, alive = Simulation(), []
    worker = Worker(simulation)
    with simulation.of(landings), patch.object(landings, "ThreadPoolExecutor", lambda *_: worker):
        landing = Landing(CPU, adding(simulation, worker), Arena(2 * 1024, None), 6 * 32 * 4, 1024)
        homes = [Blocks.zeros(6, 32, FP32, CPU) for _ in range(3)]
        sums = [HostSum(BlockSum(adding(simulation, None)), landing) for _ in homes]
        for micro_step in (0, 1, 2, 0, 1, 2):
            for total, home in zip(sums, homes, strict=True):
                arrived = [Blocks.zeros(6, 32, E4M3, CPU) for _ in range(6 if micro_step == 2 else 2)]
                alive += arrived
                simulation.record("all-to-all", "main", [], tensors_of(*arrived))
                total.add(arrived, home, overwrite=micro_step == 0)
            for total, home in zip(sums, homes, strict=True) if micro_step == 2 else ():
                total.settle()
                simulation.record("sweep", "host", tensors_of(home), [])
                total.forget()
    assert {op.stream for op in simulation.ops} > {"main", "host", "worker"}
    simulation.check()


def waits_of(executor: str) -> int:
    """How often a step makes the host wait, in a run of many small parameters."""
    from test_offload import train

    engine = make(config_of("O2", 2, 1, {"executor": executor}))
    train(engine, "clip", range(1))
    counted = 0

    def count(*arguments: Any) -> None:
        nonlocal counted
        counted += 1

    names = [f"ds_fp8.zero_fp8.{name}" for name in ("states.lanes.Lane.wait", "states.host_sweep.wait")]
    with patch(names[0], count), patch(names[1], count):
        train(engine, "clip", range(1))
    parameters = len(list(engine.module.parameters()))
    engine.destroy()
    assert parameters > 12
    return counted


def test_the_host_waits_for_no_parameter(ranks: RankPools) -> None:
    """Not at all if states visit the device; if the host sweeps, for buffers, which hold chunks."""
    assert ranks.run(1, waits_of, "stream", seconds=SECONDS) == [0]
    assert 0 < ranks.run(1, waits_of, "host", seconds=SECONDS)[0] <= 2 * 9
