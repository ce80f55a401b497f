"""Streams and events without a GPU: what is launched is recorded with what it reads and writes.

Every stream has a clock of all streams that it has seen, as the host has, and threads. Two operations of
which one writes what the other touches must be ordered by these clocks: else a GPU may run them in any order.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fp8.ops.blocks import Blocks

Clock = dict[str, int]


def joined(*clocks: Clock) -> Clock:
    return {name: max(each.get(name, 0) for each in clocks) for name in set().union(*clocks)}


@dataclass
class Op:
    what: str
    stream: str
    clock: Clock
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]


@dataclass
class Simulation(TorchDispatchMode):
    """Streams by name, each with what it has seen of all; the host is one of them, and "main"."""

    clocks: dict[str, Clock] = field(default_factory=lambda: {"host": {}, "main": {}})
    current: str = "main"
    ops: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def lane(self, device: torch.device) -> "SimulatedLane":
        name = f"lane {len(self.clocks)}"
        self.clocks[name] = {}
        return SimulatedLane(self, name)

    def record(self, what: str, stream: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """What is launched sees what its stream has seen, and what the host has."""
        clock = joined(self.clocks[stream], self.clocks["host"])
        clock[stream] = clock.get(stream, 0) + 1
        self.clocks[stream] = clock
        spans = [
            [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in some] for some in (reads, writes)
        ]
        self.ops.append(Op(what, stream, dict(clock), *spans))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.record("copy", self.current, [args[1]], [args[0]])
        return func(*args, **(kwargs or {}))

    def mark(self, device: torch.device) -> Clock:
        return dict(self.clocks["main"])

    def follow(self, device: torch.device, event: Clock) -> None:
        self.clocks["main"] = joined(self.clocks["main"], event)

    def wait(self, event: Clock | None) -> None:
        self.clocks["host"] = joined(self.clocks["host"], event or {})

    def check(self) -> None:
        """Any two ops of which one writes what the other touches are in an order that events give."""
        for first, second in itertools.combinations(self.ops, 2):
            written = overlap(first.writes, second.reads + second.writes)
            touches = written or overlap(first.reads, second.writes)
            seen = second.clock.get(first.stream, 0) >= first.clock[first.stream]
            assert not touches or seen, f"{second.what} on {second.stream} may come before {first}"

    @contextmanager
    def of(self, *modules: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for module in modules:
                for name in ("mark", "follow", "wait"):
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, getattr(self, name)))
                stack.enter_context(patch.object(module, "Lane", self.lane))
            stack.enter_context(self)
            yield


@dataclass
class SimulatedLane:
    simulation: Simulation
    name: str

    @contextmanager
    def after(self, *events: Clock | None) -> Iterator[None]:
        clocks = self.simulation.clocks
        clocks[self.name] = joined(clocks[self.name], *(each or {} for each in events))
        before, self.simulation.current = self.simulation.current, self.name
        yield
        self.simulation.current = before

    def mark(self) -> Clock:
        return dict(self.simulation.clocks[self.name])

    def keep(self, tensor: Tensor) -> None:
        pass

    def wait(self) -> None:
        self.simulation.wait(self.mark())


def overlap(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in first for c, d in second)


def tensors_of(*blocks: Blocks) -> list[Tensor]:
    return [each for some in blocks for each in (some.codes, some.scales) if each is not None]


def spans_of(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors]


@dataclass
class Worker:
    """A thread that runs at once what it is given: it has seen what the host had then."""

    simulation: Simulation

    def submit(self, act: Any, *arguments: Any) -> "Future[Tensor]":
        clocks = self.simulation.clocks
        host, clocks["host"] = clocks["host"], joined(clocks.get("worker", {}), clocks["host"])
        act(*arguments)
        clocks["worker"], clocks["host"] = clocks["host"], host
        return Seen(self.simulation, dict(clocks["worker"]))

    def record(self, what: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """On the thread."""
        clocks = self.simulation.clocks
        clocks.setdefault("worker", {})
        self.simulation.record(what, "worker", reads, writes)
        clocks["host"] = dict(clocks["worker"])


class Seen(Future[Tensor]):
    """The operations of a thread, by the thread that asks for them."""

    def __init__(self, simulation: Simulation, clock: Clock) -> None:
        super().__init__()
        self._simulation, self._clock = simulation, clock

    def result(self, timeout: float | None = None) -> Tensor:
        self._simulation.wait(self._clock)
        return torch.zeros(1)
