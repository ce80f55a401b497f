"""Where parameters lie: parameters -> buckets -> blocks -> ranks. Integers only.

Parameters fill buckets in reverse order, as backward produces their gradients. A bucket holds
parameters of one param group and dtype, each starting on a block boundary; its last blocks may
be padding, so that every rank owns the same number of consecutive blocks and every collective of
the bucket is even. A block lies inside one parameter and is counted from the parameter's own
first element: what a block holds does not depend on the world size, only who owns it does.

Nobody multiplies block counts by hand: `Bucket.segments` yields a rank's pieces of parameters.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterSpec:
    """What the partition needs to know of a parameter."""

    index: int  # global: position among the model's parameters, the same on every rank
    numel: int
    group: int  # param group of the optimizer
    dtype: Hashable


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a bucket."""

    parameter: int  # global index
    numel: int
    first_block: int
    blocks: int


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that one rank owns: whole blocks, of which the last may be short."""

    slot: Slot
    first_block: int  # within the owner's shard of the bucket
    blocks: int
    first_element: int  # of the parameter
    numel: int  # elements, without the padding of a short last block

    @property
    def rows(self) -> slice:
        return slice(self.first_block, self.first_block + self.blocks)

    @property
    def elements(self) -> slice:
        return slice(self.first_element, self.first_element + self.numel)


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients travel together."""

    index: int
    group: int  # param group of the optimizer
    slots: tuple[Slot, ...]
    block_size: int
    world_size: int

    @property
    def blocks_per_rank(self) -> int:
        last = self.slots[-1]
        return -(-(last.first_block + last.blocks) // self.world_size)

    @property
    def elements_per_rank(self) -> int:
        """With padding."""
        return self.blocks_per_rank * self.block_size

    def pieces(self, rank: int) -> Iterator[Piece]:
        """What `rank` owns of each parameter, in the order of the shard."""
        first = rank * self.blocks_per_rank
        end = first + self.blocks_per_rank
        for slot in self.slots:
            low = max(first, slot.first_block)
            high = min(end, slot.first_block + slot.blocks)
            if low < high:
                start = (low - slot.first_block) * self.block_size
                numel = min(slot.numel - start, (high - low) * self.block_size)
                yield Piece(slot, low - first, high - low, start, numel)

    def offset(self, slot: Slot) -> int:
        """Element of the bucket's flat weight buffer with which the parameter begins."""
        return slot.first_block * self.block_size


def partition(
    parameters: Sequence[ParameterSpec], *, bucket_elements: int, block_size: int, world_size: int
) -> tuple[Bucket, ...]:
    """Fill buckets of at most `bucket_elements` elements; a larger parameter is a bucket alone.

    Buckets are numbered in the order in which they fill, those still open at the end after them in
    the order in which they were opened. `parameters` have at least one element each.
    """
    full: list[list[ParameterSpec]] = []
    filling: dict[tuple[int, Hashable], list[ParameterSpec]] = {}
    for parameter in sorted(parameters, key=lambda each: each.index, reverse=True):
        kind = (parameter.group, parameter.dtype)
        current = filling.get(kind, [])
        if current and sum(each.numel for each in current) + parameter.numel > bucket_elements:
            full.append(filling.pop(kind))
        filling.setdefault(kind, []).append(parameter)
    return tuple(
        Bucket(index, members[0].group, _slots(members, block_size), block_size, world_size)
        for index, members in enumerate([*full, *filling.values()])
    )


def _slots(members: Sequence[ParameterSpec], block_size: int) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    first_block = 0
    for member in members:
        blocks = -(-member.numel // block_size)
        slots.append(Slot(member.index, member.numel, first_block, blocks))
        first_block += blocks
    return tuple(slots)
