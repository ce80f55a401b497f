"""Checkpoints reach states through `lend` only, so states may live anywhere: here, nowhere near a shard."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same_bits, whole_states
from foreign_files import STATES
from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BY_NAME
from ds_fp8.zero_fp8.checkpoint import contracts, manifest, writer
from ds_fp8.zero_fp8.checkpoint.convert import Converted
from ds_fp8.zero_fp8.checkpoint.reader import Checkpoint
from ds_fp8.zero_fp8.placement.partition import Bucket, ParameterSpec, partition
from ds_fp8.zero_fp8.placement.ranks import Fleet

TAG = Path(__file__).with_name("tags_v1") / "O2"
BUCKET = 2000  # of the run that saved the tag, on two ranks


class Elsewhere:
    """A shard whose states are lent as copies, which are written back when they are returned."""

    def __init__(self, bucket: Bucket, rank: int, formats: tuple[str, str, str]) -> None:
        self.pieces = tuple(bucket.pieces(rank))
        self.block_size = bucket.block_size
        rows = bucket.blocks_of(rank)
        blocks = (
            Blocks.zeros(rows, bucket.block_size, BY_NAME[name], torch.device("cpu")) for name in formats
        )
        self._home = AdamState(*blocks)
        self.rows = rows

    def cut(self, rows: slice) -> Iterator[slice]:
        for first in range(rows.start, rows.stop, 3):
            yield slice(first, min(first + 3, rows.stop))

    def where_they_are(self, rows: slice = slice(None)) -> Iterator[tuple[slice, AdamState]]:
        """In two lots."""
        start, stop, _ = rows.indices(self.rows)
        middle = (start + stop) // 2
        for first, last in ((start, middle), (middle, stop)):
            if first < last:
                yield slice(first - start, last - start), self._home[first:last]

    @contextmanager
    def lend(self, rows: slice = slice(None)) -> Iterator[AdamState]:
        home = self._home[rows]
        lent = replace(home, **{key: copied(getattr(home, key)) for key in contracts.STATES})
        yield lent
        for key in contracts.STATES:
            getattr(home, key).copy_(getattr(lent, key))


def copied(blocks: Blocks) -> Blocks:
    scales = None if blocks.scales is None else blocks.scales.clone()
    return replace(blocks, codes=blocks.codes.clone(), scales=scales)


def opened() -> Checkpoint:
    found = manifest.read(TAG)
    assert found is not None
    return Checkpoint(TAG, found)


def shards_of(checkpoint: Checkpoint, rank: int, world_size: int, formats: tuple[str, str, str]) -> list[Any]:
    numels = [torch.Size(parameter.shape).numel() for parameter in checkpoint.parameters.values()]
    fleet = Fleet("data", world_size)
    specs = [ParameterSpec(index, numel, 0, "bf16", fleet) for index, numel in enumerate(numels)]
    buckets = partition(specs, bucket_elements=BUCKET, block_size=128)
    return [Elsewhere(bucket, rank, formats) for bucket in buckets]


def weights_of(shards: list[Any]) -> list[Tensor]:
    return [torch.zeros(len(shard._home.master), 128, dtype=torch.bfloat16) for shard in shards]


def saved(rank: int) -> dict[str, Any]:
    file: dict[str, Any] = torch.load(TAG / STATES.format(rank), weights_only=True)
    states: dict[str, Any] = file["optimizer_state_dict"]
    return states


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_checkpoint_comes_and_goes_byte_for_byte(world_size: int) -> None:
    checkpoint, packed = opened(), []
    names = dict(enumerate(checkpoint.parameters))
    for rank in range(world_size):
        shards = shards_of(checkpoint, rank, world_size, ("fp16", "e4m3", "fp16"))
        checkpoint.restore(shards, weights_of(shards), names)
        packed.append(writer.pack(shards, names))
        if world_size == 2:
            views = [writer.fp32_masters(*each) for each in zip(shards, weights_of(shards), strict=True)]
            expected = saved(rank)["single_partition_of_fp32_groups"]
            assert all(torch.equal(*each) for each in zip(views, expected, strict=True))
    files = [saved(rank)["base_optimizer_state"]["fp8"]["parameters"] for rank in range(2)]
    assert_same_bits(whole_states(packed), whole_states(files))


@pytest.mark.parametrize("world_size", [1, 3])
def test_values_are_converted_into_what_is_lent(world_size: int) -> None:
    checkpoint, converted = opened(), Converted(opened())
    names = dict(enumerate(checkpoint.parameters))
    for rank in range(world_size):
        shards = shards_of(checkpoint, rank, world_size, ("fp32", "fp32", "fp32"))
        converted.restore(shards, weights_of(shards), names)
        for shard in shards:
            for piece in shard.pieces:
                expected = checkpoint.values(names[piece.slot.parameter], piece.elements)
                for key in contracts.STATES:
                    rows = getattr(shard._home, key).codes[piece.rows].view(-1)[: piece.numel]
                    assert torch.equal(rows, getattr(expected, key)), key
