"""`accumulate` as a Triton kernel equals the reference bit for bit, its figures but for the order of sums."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_support import (
    CONVERSIONS,
    CPU,
    DEVICE,
    FINITE_KINDS,
    FLOAT32_MAX,
    GARBAGE,
    ROW_KINDS,
    assert_same_blocks,
    conversion,
    cycled,
    guarded,
    inner,
    not_finite,
    rows_of,
    to,
)

from ds_fp8.ops import blocks_triton, reduction, reduction_triton
from ds_fp8.ops.blocks import Blocks, quantize
from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP32, Format

WIRES = (E4M3, E5M2, BF16)
SHARDS = (FP32, BF16, E4M3, E5M2)

TILES = 2  # of a program, in tests that need many: the interpreter pays by the tile, and for empty ones too

each_wire = pytest.mark.parametrize("wire", WIRES, ids=lambda fmt: fmt.name)
each_shard = pytest.mark.parametrize("fmt", SHARDS, ids=lambda fmt: fmt.name)


def messages(values: list[Tensor], wire: Format, gap: int) -> Tensor:
    """One message a rank, [ranks, bytes]: codes, scales, and a gap of garbage that keeps codes aligned."""
    rows, block_size = values[0].shape
    length = rows * (block_size * wire.itemsize + (1 if wire.scaled else 0)) + gap
    buffer = torch.full((len(values), -(-length // 16) * 16), GARBAGE, dtype=torch.uint8)
    for piece, each in zip(pieces_of(buffer, wire, rows, block_size), values, strict=True):
        quantize(each.view(-1), piece)
    return buffer


def pieces_of(buffer: Tensor, wire: Format, rows: int, block_size: int) -> list[Blocks]:
    size = rows * block_size * wire.itemsize
    return [
        Blocks(
            message[:size].view(wire.dtype).view(rows, block_size),
            message[size : size + rows] if wire.scaled else None,
            wire,
        )
        for message in buffer
    ]


def check(
    values: list[Tensor], old: Tensor, wire: Format, fmt: Format, *, fresh: bool, hardware: bool, gap: int = 0
) -> Tensor:
    """Both sums of the ranks' values and what the shard holds; returns the figures."""
    buffer = messages(values, wire, gap)
    before = buffer.clone()
    outer = guarded(old, fmt)
    twin, received = to(outer, DEVICE), buffer.to(DEVICE)
    expected = reduction.accumulate(pieces_of(buffer, wire, *old.shape), inner(outer), fresh=fresh)
    with conversion(hardware):
        pieces = pieces_of(received, wire, *old.shape)
        found = reduction_triton.accumulate(pieces, inner(twin), fresh=fresh).cpu()
    assert torch.equal(received.cpu(), before), "the messages were written to"
    what = f"{len(values)} x {wire.name} into {'fresh' if fresh else 'old'} {fmt.name}"
    assert_same_blocks(to(twin, CPU), outer, what, alike=not_finite if wire.scaled else torch.isnan)
    assert found[1] == expected[1], f"{what}: {found[1]} non-finite blocks, expected {expected[1]}"
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    return expected


@pytest.fixture(scope="module")
def few_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction_triton, "TILES", TILES)
        yield


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("hardware", CONVERSIONS)
@pytest.mark.parametrize("fresh", [True, False])
@each_shard
@each_wire
def test_every_pair_of_formats(wire: Format, fmt: Format, fresh: bool, hardware: bool) -> None:
    """Every kind of row alone and met with every other, on more rows than a program has."""
    kinds = [*ROW_KINDS, *(kind for kind in FINITE_KINDS for _ in FINITE_KINDS), "normal"]
    others = [*ROW_KINDS, *FINITE_KINDS * len(FINITE_KINDS), "normal"]
    values = [rows_of(kinds, 32, seed=1), rows_of(others, 32, seed=2)]
    figures = check(values, rows_of(others, 32, seed=3), wire, fmt, fresh=fresh, hardware=hardware)
    assert figures[0] > 0
    assert figures[1] > 0


@pytest.mark.parametrize("ranks", range(1, 10))
def test_ranks_are_added_in_order(ranks: int) -> None:
    """With as many tiles a program as there are, and two programs."""
    rows = reduction_triton.TILES * (blocks_triton.PER_WARP // 256) + 3
    values = [rows_of(["normal"] * rows, 256, seed=rank) for rank in range(ranks)]
    check(values, rows_of(["normal"] * rows, 256, seed=99), E4M3, FP32, fresh=False, hardware=False)


AROUND_OVERFLOW = [
    torch.full((4, 64), -1e37),
    torch.full((4, 64), FLOAT32_MAX),
    torch.full((4, 64), -FLOAT32_MAX / 2),
]


def test_half_a_code_below_overflow_without_a_scale() -> None:
    """BF16 that rounds up to inf is inf, whatever is added to it."""
    assert check(AROUND_OVERFLOW, torch.zeros(4, 64), BF16, FP32, fresh=True, hardware=False)[1] == 4


@pytest.mark.usefixtures("few_tiles")
@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    wire=st.sampled_from(WIRES),
    fmt=st.sampled_from(SHARDS),
    block_size=st.sampled_from((32, 64, 128, 256)),
    rows=st.integers(0, 40),
    kinds=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=6),
    ranks=st.integers(1, 9),
    turn=st.integers(0, 5),
    fresh=st.booleans(),
    gap=st.integers(0, 70),
    hardware=st.sampled_from(CONVERSIONS),
    seed=st.integers(0, 1000),
)
def test_any_sum(
    *,
    wire: Format,
    fmt: Format,
    block_size: int,
    rows: int,
    kinds: list[str],
    ranks: int,
    turn: int,
    fresh: bool,
    gap: int,
    hardware: bool,
    seed: int,
) -> None:
    """Kinds of row in the same order on every rank, or turned; no row at all is a sum too."""

    def values(rank: int) -> Tensor:
        return rows_of(cycled(kinds, rows, rank * turn), block_size, seed + rank)

    pieces = [values(rank) for rank in range(ranks)]
    check(pieces, values(ranks), wire, fmt, fresh=fresh, hardware=hardware, gap=gap)
