"""The partition: parameters -> buckets -> blocks -> ranks. Integers only.

Parameters fill buckets in reverse order, as backward produces their gradients. A bucket holds parameters of
one param group, dtype and fleet, which model-parallel peers hold alike or of which each has a part. Each
starts on a block boundary; the bucket's last blocks may be padding, so that every rank owns the same number
of consecutive blocks and every collective of the bucket is even. A block lies inside one parameter and is
counted from the parameter's own first element: what a block holds does not depend on the world size, only
who owns it does.

Under ZeRO 3 every parameter is cut evenly between the ranks of its fleet, in slices rounded up to whole
blocks: slice r is the r-th, and may be short or empty at the parameter's end. A rank's slices of a bucket's
parameters lie side by side, each with room for a whole one, so runs are even here, too.

Where a scale belongs to a whole tensor, whole tensors go to ranks instead, by FP8-LM's Algorithm 1: over all
buckets, largest first, to the rank that has least (arXiv 2310.18313 section 2.3). A rank's run of a bucket is
then as long as its tensors, and a block is the granule that tensors are padded to.

Iterate over `Bucket.pieces(rank)`: which rank owns which block is computed nowhere else.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate

from ds_fp8.zero_fp8.placement.ranks import Fleet


@dataclass(frozen=True)
class ParameterSpec:
    """The facts about a parameter that decide the partition."""

    index: int  # global: position among the model's parameters, the same on every rank
    numel: int
    group: int  # param group of the optimizer
    dtype: Hashable
    fleet: Fleet  # the ranks that hold a copy
    replicated: bool = (
        False  # model-parallel peers, where there are some, hold the same: one of them counts it
    )


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a bucket: consecutive blocks or, if sliced, some of every rank's run."""

    parameter: int  # global index
    numel: int
    first_block: int  # of the bucket; of a sliced one, of every rank's run
    blocks: int
    slice_blocks: int | None = None  # of each slice; None: not sliced

    def held(self, rank: int, run: slice) -> tuple[slice, int]:
        """The parameter's blocks that a rank owns, which may be none, and where they lie in its run."""
        if self.slice_blocks is not None:
            first = min(rank * self.slice_blocks, self.blocks)
            return slice(first, min(first + self.slice_blocks, self.blocks)), self.first_block
        first = max(run.start, self.first_block)
        stop = min(run.stop, self.first_block + self.blocks)
        return slice(first - self.first_block, stop - self.first_block), first - run.start


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that one rank owns: whole blocks, of which the last may be short."""

    slot: Slot
    first_row: int  # within the owner's shard of the bucket
    blocks: int
    first_element: int  # of the parameter
    numel: int  # elements, without the padding of a short last block

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.blocks)

    @property
    def elements(self) -> slice:
        return slice(self.first_element, self.first_element + self.numel)


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients travel together, and which of their blocks each rank owns."""

    index: int
    group: int  # param group of the optimizer
    fleet: Fleet  # the ranks that share it
    slots: tuple[Slot, ...]
    block_size: int
    bounds: Sequence[int]  # [ranks + 1] the block with which each rank's run begins, and the end
    blocks_per_rank: int  # blocks owned by the most loaded rank
    replicated: bool = False  # as of its parameters

    @property
    def world_size(self) -> int:
        return self.fleet.size

    @property
    def blocks(self) -> int:
        """All blocks of the bucket, with padding."""
        return self.bounds[-1]

    def rows_of(self, rank: int) -> slice:
        """The blocks of the bucket that `rank` owns."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def blocks_of(self, rank: int) -> int:
        """Number of blocks that `rank` owns."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def pieces(self, rank: int) -> Iterator[Piece]:
        """The pieces of parameters that `rank` owns, in the order of the shard."""
        rows = self.rows_of(rank)
        for slot in self.slots:
            held, first_row = slot.held(rank, rows)
            if held.start < held.stop:
                start, blocks = held.start * self.block_size, held.stop - held.start
                numel = min(slot.numel - start, blocks * self.block_size)
                yield Piece(slot, first_row, blocks, start, numel)

    def from_all(self, nbytes: int) -> int:
        """Bytes of a message of `nbytes` from every rank."""
        return self.world_size * nbytes

    def offset(self, slot: Slot) -> int:
        """Element with which the parameter begins in the bucket's flat weight buffer; its slice, in a run."""
        return slot.first_block * self.block_size


def partition(
    parameters: Sequence[ParameterSpec], *, bucket_elements: int, block_size: int
) -> tuple[Bucket, ...]:
    """Buckets that are cut between blocks, as evenly as blocks allow."""
    buckets = []
    for index, members in enumerate(_fill(parameters, bucket_elements)):
        fleet, slots = members[0].fleet, _slots(members, block_size)
        even = -(-(slots[-1].first_block + slots[-1].blocks) // fleet.size)
        bounds = range(0, even * fleet.size + 1, even)
        what = (index, members[0].group, fleet, slots, block_size, bounds, even)
        buckets.append(Bucket(*what, replicated=members[0].replicated))
    return tuple(buckets)


def partition_sliced(
    parameters: Sequence[ParameterSpec], *, bucket_elements: int, block_size: int
) -> tuple[Bucket, ...]:
    """Buckets of parameters that are cut one by one, as DeepSpeed's ZeRO 3 fetches them."""
    buckets = []
    for index, members in enumerate(_fill(parameters, bucket_elements)):
        fleet, slots, run = members[0].fleet, [], 0
        for each in members:
            blocks = -(-each.numel // block_size)
            share = slice_blocks(each.numel, block_size, fleet.size)
            slots.append(Slot(each.index, each.numel, run, blocks, share))
            run += share
        bounds = range(0, run * fleet.size + 1, run)
        buckets.append(Bucket(index, members[0].group, fleet, tuple(slots), block_size, bounds, run))
    return tuple(buckets)


def slice_blocks(numel: int, block_size: int, ranks: int) -> int:
    """Blocks of each rank's slice of a parameter under ZeRO 3, padding included."""
    return -(-numel // (block_size * ranks))


def padding_of_slices(numel: int, block_size: int, ranks: int) -> int:
    """Elements that the slices of all ranks have beyond the parameter's own; of one rank it is whole."""
    return slice_blocks(numel, block_size, ranks) * block_size * ranks - numel if ranks > 1 else 0


def partition_whole(
    parameters: Sequence[ParameterSpec], *, bucket_elements: int, block_size: int
) -> tuple[Bucket, ...]:
    """Buckets that are cut between parameters, whose owners Algorithm 1 finds."""
    blocks = {each.index: -(-each.numel // block_size) for each in parameters}
    owners = _owners(parameters, blocks)
    buckets = []
    for index, members in enumerate(_fill(parameters, bucket_elements)):
        fleet = members[0].fleet
        members.sort(key=lambda each: owners[each.index])
        shares = [0] * fleet.size
        for each in members:
            shares[owners[each.index]] += blocks[each.index]
        group, slots, bounds = members[0].group, _slots(members, block_size), (0, *accumulate(shares))
        buckets.append(Bucket(index, group, fleet, slots, block_size, bounds, max(shares)))
    return tuple(buckets)


def _owners(parameters: Sequence[ParameterSpec], blocks: Mapping[int, int]) -> dict[int, int]:
    """The rank of each parameter, by Algorithm 1 within each fleet."""
    owners: dict[int, int] = {}
    for fleet in {each.fleet for each in parameters}:
        indices = [each.index for each in parameters if each.fleet == fleet]
        ranks = assign([blocks[index] for index in indices], fleet.size)
        owners |= dict(zip(indices, ranks, strict=True))
    return owners


def assign(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank of each size: the largest first, to the rank that has least (the first of several)."""
    loads, owners = [(0, rank) for rank in range(ranks)], [0] * len(sizes)  # loads: a heap
    for index in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        load, owners[index] = loads[0]
        heapreplace(loads, (load + sizes[index], owners[index]))
    return owners


def _fill(parameters: Sequence[ParameterSpec], bucket_elements: int) -> list[list[ParameterSpec]]:
    """Fill buckets of at most `bucket_elements` elements; a larger parameter is a bucket alone.

    Buckets are numbered in the order in which they fill, those still open at the end after them in
    the order in which they were opened. `parameters` have at least one element each.
    """
    full: list[list[ParameterSpec]] = []
    filling: dict[Hashable, list[ParameterSpec]] = {}
    elements: dict[Hashable, int] = {}
    for parameter in sorted(parameters, key=lambda each: each.index, reverse=True):
        kind = (parameter.group, parameter.dtype, parameter.fleet, parameter.replicated)
        if kind in filling and elements[kind] + parameter.numel > bucket_elements:
            full.append(filling.pop(kind))
        elements[kind] = parameter.numel + (elements[kind] if kind in filling else 0)
        filling.setdefault(kind, []).append(parameter)
    return [*full, *filling.values()]


def _slots(members: Sequence[ParameterSpec], block_size: int) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    first_block = 0
    for member in members:
        blocks = -(-member.numel // block_size)
        slots.append(Slot(member.index, member.numel, first_block, blocks))
        first_block += blocks
    return tuple(slots)
