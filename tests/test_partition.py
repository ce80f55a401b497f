"""The partition: who owns which elements, for any parameters, block size and world size."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_fp8.estimate import memory
from ds_fp8.zero_fp8.placement import even_slices
from ds_fp8.zero_fp8.placement.partition import (
    Bucket,
    ParameterSpec,
    partition,
    partition_sliced,
    slice_blocks,
)
from ds_fp8.zero_fp8.placement.ranks import Fleet

WORLD_SIZES = range(1, 10)


ALONE = Fleet("data", 1)


def in_fleet(parameters: Iterable[ParameterSpec], ranks: int) -> tuple[ParameterSpec, ...]:
    """The same parameters, held by `ranks` ranks."""
    return tuple(replace(each, fleet=Fleet("data", ranks)) for each in parameters)


class Case(NamedTuple):
    parameters: tuple[ParameterSpec, ...]
    bucket_elements: int
    block_size: int
    world_size: int
    sliced: bool = False  # as ZeRO 3 cuts

    def buckets(self, world_size: int | None = None) -> tuple[Bucket, ...]:
        return (partition_sliced if self.sliced else partition)(
            in_fleet(self.parameters, world_size or self.world_size),
            bucket_elements=self.bucket_elements,
            block_size=self.block_size,
        )


sizes = st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 96, 128, 256]), st.integers(1, 3000))
kinds = st.tuples(sizes, st.integers(0, 2), st.sampled_from(["bf16", "fp32"]), st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn, sliced: tuple[bool, ...] = (False,)) -> Case:
    """Indices ascend with gaps (frozen parameters), and come in any order."""
    index, parameters = -1, []
    for numel, group, dtype, gap in draw(st.lists(kinds, min_size=1, max_size=25)):
        index += gap
        parameters.append(ParameterSpec(index, numel, group, dtype, ALONE))
    return Case(
        tuple(draw(st.permutations(parameters))),
        draw(st.one_of(st.integers(1, 300), st.integers(300, 10_000), st.just(500_000_000))),
        draw(st.sampled_from([1, 32, 64, 128, 256])),
        draw(st.sampled_from(WORLD_SIZES)),
        draw(st.sampled_from(sliced)),
    )


each_case = given(cases())
each_sliced_case = given(cases(sliced=(True,)))
each_case_of_both = given(cases(sliced=(False, True)))
partition_settings = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])


def specs(*sizes: int, ranks: int = 1) -> tuple[ParameterSpec, ...]:
    fleet = Fleet("data", ranks)
    return tuple(ParameterSpec(index, numel, 0, "bf16", fleet) for index, numel in enumerate(sizes))


def layout(buckets: Sequence[Bucket]) -> list[list[int]]:
    """Global indices by bucket, in order."""
    return [[slot.parameter for slot in bucket.slots] for bucket in buckets]


def owned_blocks(buckets: Sequence[Bucket]) -> list[tuple[int, int, int]]:
    """(parameter, first element, elements) of every block that some rank owns."""
    found = []
    for bucket in buckets:
        for rank in range(bucket.world_size):
            for piece in bucket.pieces(rank):
                for block in range(piece.blocks):
                    first = piece.first_element + block * bucket.block_size
                    end = min(first + bucket.block_size, piece.first_element + piece.numel)
                    found.append((piece.slot.parameter, first, end - first))
    return found


@partition_settings
@each_case_of_both
def test_every_element_is_owned_exactly_once(case: Case) -> None:
    owners: dict[int, Counter[int]] = defaultdict(Counter)
    for bucket in case.buckets():
        for rank in range(case.world_size):
            for piece in bucket.pieces(rank):
                owners[piece.slot.parameter].update(range(piece.elements.start, piece.elements.stop))
    assert set(owners) == {each.index for each in case.parameters}
    for each in case.parameters:
        assert owners[each.index] == Counter(range(each.numel)), f"parameter {each.index} of {each.numel}"


@partition_settings
@each_case_of_both
def test_pieces_are_whole_blocks_in_the_order_of_the_shard(case: Case) -> None:
    for bucket in case.buckets():
        for rank in range(case.world_size):
            end = 0
            for piece in bucket.pieces(rank):
                assert piece.first_element % case.block_size == 0
                assert piece.blocks == -(-piece.numel // case.block_size) > 0
                assert piece.first_row >= end, "pieces overlap in the shard"
                assert piece.rows == slice(piece.first_row, piece.first_row + piece.blocks)
                last = piece.first_element + piece.numel == piece.slot.numel
                assert last or piece.numel % case.block_size == 0, "a block inside a parameter is short"
                end = piece.first_row + piece.blocks
            assert end <= bucket.blocks_per_rank


@partition_settings
@each_case
def test_a_piece_lies_where_the_buckets_flat_buffer_says(case: Case) -> None:
    """Rank r owns blocks r n .. (r + 1) n - 1 of the buffer in which `offset` places the parameter."""
    for bucket in case.buckets():
        for rank in range(case.world_size):
            for piece in bucket.pieces(rank):
                in_buffer = (rank * bucket.blocks_per_rank + piece.first_row) * case.block_size
                assert in_buffer == bucket.offset(piece.slot) + piece.first_element


@partition_settings
@each_case
def test_ranks_own_equal_runs_with_less_than_a_block_a_rank_of_padding(case: Case) -> None:
    for bucket in case.buckets():
        used = sum(-(-slot.numel // case.block_size) for slot in bucket.slots)
        room = bucket.blocks_per_rank * case.world_size
        assert 0 <= room - used < case.world_size
        assert bucket.block_size == case.block_size
        owned = [sum(piece.blocks for piece in bucket.pieces(rank)) for rank in range(case.world_size)]
        full, rest = divmod(used, bucket.blocks_per_rank)
        padding = [0] * (case.world_size - full - (rest > 0))
        assert owned == [bucket.blocks_per_rank] * full + [rest] * (rest > 0) + padding


@partition_settings
@each_case
def test_slots_lie_side_by_side_from_block_to_block(case: Case) -> None:
    numel = {each.index: each.numel for each in case.parameters}
    for bucket in case.buckets():
        first_block = 0
        for slot in bucket.slots:
            assert slot.first_block == first_block
            assert slot.numel == numel[slot.parameter]
            assert slot.blocks == -(-slot.numel // case.block_size)
            assert bucket.offset(slot) == first_block * case.block_size
            first_block += slot.blocks


@partition_settings
@each_case_of_both
def test_buckets_keep_their_limit_unless_a_parameter_is_alone(case: Case) -> None:
    for bucket in case.buckets():
        assert bucket.slots
        assert len(bucket.slots) == 1 or sum(slot.numel for slot in bucket.slots) <= case.bucket_elements


@partition_settings
@each_case_of_both
def test_buckets_are_filled_before_the_next_is_opened(case: Case) -> None:
    spec = {each.index: each for each in case.parameters}
    by_kind: dict[tuple[int, Hashable], list[Bucket]] = defaultdict(list)
    for bucket in case.buckets():
        first = spec[bucket.slots[0].parameter]
        by_kind[first.group, first.dtype].append(bucket)
    for buckets in by_kind.values():
        for bucket, following in pairwise(buckets):
            size = sum(slot.numel for slot in bucket.slots)
            assert size + following.slots[0].numel > case.bucket_elements


@partition_settings
@each_case_of_both
def test_a_bucket_has_one_group_and_dtype_in_reverse_order(case: Case) -> None:
    spec = {each.index: each for each in case.parameters}
    last: dict[tuple[int, Hashable], int] = {}
    for number, bucket in enumerate(case.buckets()):
        assert bucket.index == number
        members = [spec[slot.parameter] for slot in bucket.slots]
        assert {each.group for each in members} == {bucket.group}
        assert len({each.dtype for each in members}) == 1
        kind = (bucket.group, members[0].dtype)
        for each in members:
            assert each.index < last.get(kind, each.index + 1), "parameters of a kind must descend"
            last[kind] = each.index


@partition_settings
@each_case
def test_blocks_do_not_depend_on_the_world_size(case: Case) -> None:
    alone = case.buckets(world_size=1)
    expected = owned_blocks(alone)
    assert len(set(expected)) == len(expected)
    for world_size in WORLD_SIZES:
        buckets = case.buckets(world_size)
        assert owned_blocks(buckets) == expected, f"world size {world_size}"
        assert [bucket.slots for bucket in buckets] == [bucket.slots for bucket in alone]


@partition_settings
@each_case_of_both
def test_the_order_in_which_parameters_are_given_does_not_matter(case: Case) -> None:
    ascending = case._replace(parameters=tuple(sorted(case.parameters, key=lambda each: each.index)))
    assert case.buckets() == ascending.buckets()


@partition_settings
@each_sliced_case
def test_slices_are_equal_and_in_order(case: Case) -> None:
    """Slice r of a parameter begins at its r-th multiple of the slice, whatever lies beside it."""
    for bucket in case.buckets():
        width = {
            slot.parameter: -(-slot.numel // (case.block_size * case.world_size)) * case.block_size
            for slot in bucket.slots
        }
        assert bucket.blocks_per_rank * case.block_size == sum(width.values())
        for rank in range(case.world_size):
            assert bucket.blocks_of(rank) == bucket.blocks_per_rank
            held = {piece.slot.parameter: piece for piece in bucket.pieces(rank)}
            for slot in bucket.slots:
                first = rank * width[slot.parameter]
                expected = range(first, min(first + width[slot.parameter], slot.numel))
                assert (slot.parameter in held) == bool(expected)
                if expected:
                    piece = held[slot.parameter]
                    assert piece.elements == slice(expected.start, expected.stop)
                    assert piece.first_row * case.block_size == bucket.offset(slot)


@partition_settings
@each_sliced_case
def test_slices_lie_side_by_side_in_every_run(case: Case) -> None:
    for bucket in case.buckets():
        row = 0
        for slot in bucket.slots:
            assert slot.slice_blocks == slice_blocks(slot.numel, case.block_size, case.world_size)
            assert (slot.first_block, slot.blocks) == (row, -(-slot.numel // case.block_size))
            row += slot.slice_blocks
        assert row == bucket.blocks_per_rank
        assert bucket.blocks == row * case.world_size


@partition_settings
@each_sliced_case
def test_blocks_of_slices_are_those_of_runs(case: Case) -> None:
    """The same blocks in the same buckets as under ZeRO 2, at every world size."""
    runs = case._replace(sliced=False).buckets()
    for world_size in WORLD_SIZES:
        buckets = case.buckets(world_size)
        assert sorted(owned_blocks(buckets)) == sorted(owned_blocks(runs)), f"world size {world_size}"
        assert layout(buckets) == layout(runs)


@partition_settings
@each_sliced_case
def test_the_estimate_has_the_slices_of_the_partition(case: Case) -> None:
    sizes, fleet = [each.numel for each in case.parameters], Fleet("data", case.world_size)
    rows = sum(bucket.blocks_per_rank for bucket in case.buckets())
    assert memory.slice_bytes(2, sizes, case.block_size, fleet) == 2 * rows * case.block_size
    alone = case.world_size == 1
    sent = memory.fetch_bytes(2, sizes, case.block_size, fleet)
    assert sent == (0 if alone else 2 * rows * case.block_size)
    assert memory.gathered_bytes(2, sizes, case.block_size, fleet) == case.world_size * sent


def test_buckets_fill_in_reverse_order() -> None:
    buckets = partition(specs(10, 20, 30, 40, ranks=2), bucket_elements=70, block_size=32)
    assert layout(buckets) == [[3, 2], [1, 0]]
    assert [slot.first_block for slot in buckets[0].slots] == [0, 2]


def test_a_parameter_larger_than_a_bucket_is_alone() -> None:
    buckets = partition(specs(10, 1000, 20, ranks=2), bucket_elements=100, block_size=32)
    assert layout(buckets) == [[2], [1], [0]]


def test_a_bucket_may_be_filled_to_the_last_element() -> None:
    assert layout(partition(specs(50, 50, ranks=1), bucket_elements=100, block_size=32)) == [[1, 0]]
    assert layout(partition(specs(51, 50, ranks=1), bucket_elements=100, block_size=32)) == [[1], [0]]


def test_open_buckets_follow_the_full_ones_in_the_order_of_opening() -> None:
    parameters = (
        ParameterSpec(0, 60, 0, "bf16", ALONE),
        ParameterSpec(1, 10, 1, "bf16", ALONE),
        ParameterSpec(2, 60, 0, "bf16", ALONE),
        ParameterSpec(3, 10, 0, "fp32", ALONE),
        ParameterSpec(4, 10, 1, "bf16", ALONE),
    )
    buckets = partition(parameters, bucket_elements=100, block_size=32)
    assert layout(buckets) == [[2], [4, 1], [3], [0]]
    assert [bucket.group for bucket in buckets] == [0, 1, 0, 0]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_more_ranks_than_blocks(world_size: int) -> None:
    """A scalar's only block belongs to rank 0; the others own padding."""
    (bucket,) = partition(specs(1, ranks=world_size), bucket_elements=100, block_size=128)
    assert bucket.blocks_per_rank == 1
    pieces = [list(bucket.pieces(rank)) for rank in range(world_size)]
    assert [len(each) for each in pieces] == [1] + [0] * (world_size - 1)
    assert pieces[0][0].elements == slice(0, 1)


def test_a_cut_parameter() -> None:
    """300 and 100 elements in blocks of 64, 7 blocks over 3 ranks: 3 + 3 + 1 and 2 of padding."""
    (bucket,) = partition(specs(100, 300, ranks=3), bucket_elements=1000, block_size=64)
    pieces = [[(p.slot.parameter, p.rows, p.elements) for p in bucket.pieces(rank)] for rank in range(3)]
    assert pieces == [
        [(1, slice(0, 3), slice(0, 192))],
        [(1, slice(0, 2), slice(192, 300)), (0, slice(2, 3), slice(0, 64))],
        [(0, slice(0, 1), slice(64, 100))],
    ]


def test_sliced_parameters() -> None:
    """300 and 100 elements in blocks of 64, each over 3 ranks: 2 + 2 + 1 blocks, and 1 + 1 + none."""
    (bucket,) = partition_sliced(specs(100, 300, ranks=3), bucket_elements=1000, block_size=64)
    pieces = [[(p.slot.parameter, p.rows, p.elements) for p in bucket.pieces(rank)] for rank in range(3)]
    assert pieces == [
        [(1, slice(0, 2), slice(0, 128)), (0, slice(2, 3), slice(0, 64))],
        [(1, slice(0, 2), slice(128, 256)), (0, slice(2, 3), slice(64, 100))],
        [(1, slice(0, 1), slice(256, 300))],
    ]


@partition_settings
@each_case_of_both
def test_even_slices_are_put_together_from_what_ranks_own(case: Case) -> None:
    """As zero_to_fp32.py does: slices of all ranks after each other, cut at the parameter's end."""
    ranks = range(case.world_size)
    for bucket in case.buckets():
        sizes = [slot.numel for slot in bucket.slots]
        starts = dict(zip(indices_of(bucket), even_slices.starts_of(sizes, case.world_size), strict=False))
        owned = [
            [(p.slot.parameter, e) for p in bucket.pieces(r) for e in range(*p.elements.indices(2**60))]
            for r in ranks
        ]
        vectors = [dict[int, tuple[int, int]]() for _ in ranks]
        for owner in ranks:
            for receiver in ranks:
                for move in even_slices.moves(bucket, owner, receiver):
                    for step in range(move.numel):
                        assert move.target + step not in vectors[receiver]
                        vectors[receiver][move.target + step] = owned[owner][move.source + step]
        for slot in bucket.slots:
            share, start = -(-slot.numel // case.world_size), starts[slot.parameter]
            whole = [vector.get(start + step) for vector in vectors for step in range(share)]
            assert whole[: slot.numel] == [(slot.parameter, element) for element in range(slot.numel)]
            assert set(whole[slot.numel :]) <= {None}
        assert all(max(vector, default=-1) < even_slices.length_of(bucket) for vector in vectors)


def indices_of(bucket: Bucket) -> list[int]:
    return [slot.parameter for slot in bucket.slots]
