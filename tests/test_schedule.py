"""When buckets leave during a backward under ZeRO 3: what a rank learns, and what the ranks agree on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from ds_fp8.zero_fp8.gradients import schedule as schedule_module
from ds_fp8.zero_fp8.gradients.schedule import ModuleEnds
from ds_fp8.zero_fp8.placement.partition import ParameterSpec, partition_sliced
from ds_fp8.zero_fp8.placement.ranks import Fleet

LAYERS = 3
OTHERS: list[int] = []  # what another rank contributes to the agreement


@pytest.fixture(autouse=True)
def another_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def agree(values: Tensor, group: Any) -> None:
        if OTHERS:
            torch.maximum(values, torch.tensor(OTHERS, dtype=values.dtype), out=values)

    monkeypatch.setattr(schedule_module, "max_over_ranks", agree)
    yield
    OTHERS.clear()


class Rank:
    """Layers of one parameter each, in a bucket each: parameter 0 has the last bucket."""

    def __init__(self) -> None:
        self.layers = [nn.Linear(4, 4, bias=False) for _ in range(LAYERS)]
        self.parameters = {index: layer.weight for index, layer in enumerate(self.layers)}
        specs = [ParameterSpec(index, 16, 0, "fp32", Fleet("data", 2)) for index in self.parameters]
        buckets = partition_sliced(specs, bucket_elements=1, block_size=32)
        nodes: Any = Mock()
        self.schedule = ModuleEnds(buckets, nodes, torch.device("cpu"))
        self.left: list[int] = []
        self.schedule.listen(self.parameters, self._leave)

    def _leave(self) -> None:
        order = self.schedule.order
        while len(self.left) < LAYERS and self.schedule.may_leave(order[len(self.left)]):
            self.left.append(order[len(self.left)])

    @contextmanager
    def backward(self) -> Iterator[list[int]]:
        """A round; yields the buckets that have left so far."""
        self.left.clear()
        self.schedule.renew()
        yield self.left
        self.schedule.end_round()
        self.schedule.start_round()

    def arrive(self, index: int) -> None:
        """The gradient of a layer arrives."""
        self.parameters[index].sum().backward()

    def end(self, index: int) -> None:
        self.schedule.on_module_end(self.layers[index])


def learn(rank: Rank, *layers: int) -> None:
    """A backward in which each layer has its gradient and ends."""
    with rank.backward():
        for layer in layers:
            rank.arrive(layer)
            rank.end(layer)


def test_buckets_leave_at_module_ends_and_never_at_arrivals() -> None:
    rank = Rank()
    for _ in range(2):  # while it learns, and then
        with rank.backward() as left:
            rank.arrive(2)
            assert left == []
            rank.end(2)
            assert left == [0]
            rank.arrive(1)
            rank.arrive(0)
            assert left == [0]
            rank.end(1)
            assert left == [0, 1, 2]
            rank.end(0)
    assert not rank.schedule.changed


def test_the_order_is_that_of_the_module_ends() -> None:
    rank = Rank()
    learn(rank, 0, 2, 1)
    assert rank.schedule.order == [2, 0, 1]


def test_a_bucket_that_is_not_full_at_its_place_waits() -> None:
    rank = Rank()
    learn(rank, 2, 1, 0)
    with rank.backward() as left:
        rank.end(2)
        assert left == [], "its module has ended, its gradient has not arrived"
        rank.arrive(2)
        rank.arrive(1)
        rank.end(1)
        assert left == [0, 1]
        rank.end(0)
        assert left == [0, 1]
    assert rank.schedule.changed
    rank.schedule.forget()
    learn(rank, 2, 1, 0)
    rank.schedule.changed = False
    with rank.backward():
        for layer in (2, 1, 0):
            rank.arrive(layer)
            rank.end(layer)
    assert not rank.schedule.changed


def test_a_module_that_ends_twice_ends_for_its_bucket_as_often_as_it_did() -> None:
    rank = Rank()
    for _ in range(2):
        with rank.backward() as left:
            rank.arrive(2)
            rank.end(2)
            rank.arrive(1)
            rank.end(2)
            assert left == [0, 1]
            rank.arrive(0)
            rank.end(0)


def test_ranks_agree_on_the_latest_place() -> None:
    rank = Rank()
    OTHERS[:] = [1, 0, 2, -3]
    learn(rank, 2, 1, 0)
    OTHERS.clear()
    assert rank.schedule.order == [0, 1, 2]
    with rank.backward() as left:
        rank.arrive(2)
        rank.end(2)
        assert left == [], "the other rank's first bucket is full at the second module end"
        rank.arrive(1)
        rank.end(1)
        assert left == [0, 1]
        rank.arrive(0)
        rank.end(0)


def test_a_bucket_without_a_gradient_on_another_rank_leaves_at_the_end() -> None:
    rank = Rank()
    OTHERS[:] = [schedule_module.AT_THE_END, 1, 2, -3]
    learn(rank, 2, 1, 0)
    OTHERS.clear()
    assert rank.schedule.order == [1, 2, 0]
    with rank.backward() as left:
        for layer in (2, 1, 0):
            rank.arrive(layer)
            rank.end(layer)
        assert left == [1, 2]
    assert not rank.schedule.changed


def test_a_place_that_another_rank_lacks_is_the_end() -> None:
    """The other rank has seen one module end."""
    rank = Rank()
    OTHERS[:] = [0, 0, 0, -1]
    learn(rank, 2, 1, 0)
    OTHERS.clear()
    with rank.backward() as left:
        for layer in (2, 1, 0):
            rank.arrive(layer)
            rank.end(layer)
        assert left == [0]


def test_what_arrives_outside_a_backward_does_not_count() -> None:
    rank = Rank()
    rank.arrive(2)
    rank.end(2)
    with rank.backward() as left:
        rank.end(2)
        assert left == []


def test_a_round_without_a_backward_teaches_nothing() -> None:
    rank = Rank()
    rank.schedule.end_round()
    rank.schedule.start_round()
    with rank.backward() as left:
        rank.arrive(2)
        rank.end(2)
        assert left == [0]
