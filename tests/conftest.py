"""Shared fixtures: the ranks, and `torch.empty` that shows what was never written."""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from ranks import RankPools, on_examples_path

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined
torch.set_num_threads(1)
on_examples_path()


def pytest_collection_finish() -> None:
    """What was imported and collected stays: collections pass over it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks.run(world_size, function, *arguments)`: results by rank."""
    pools = RankPools()
    yield pools
    pools.stop()
