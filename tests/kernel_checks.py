"""One check for each op but the sweep: kernels beside the reference, for the tests of Triton and C++ both."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from kernel_support import (
    ALL,
    BAD,
    BLOCK_SIZES,
    DTYPES,
    FINITE_KINDS,
    FLOAT32_MAX,
    GARBAGE,
    ROW_KINDS,
    Kernels,
    assert_same,
    assert_same_blocks,
    cycled,
    dirty,
    every_code,
    garbage,
    guarded,
    in_rows,
    inner,
    nasty_values,
    neighbours,
    not_finite,
    raw,
    rows_of,
    special_values,
    to,
)
from torch import Tensor

from ds_fp8.ops import blocks, reduction
from ds_fp8.ops.blocks import NOT_FINITE, Blocks, quantize, to_float32
from ds_fp8.ops.formats import BF16, E4M3, E5M2, FP16, FP32, Format
from ds_fp8.ops.health import GRADIENT_COUNTS
from ds_fp8.ops.reduction import norm_square

SHAPES = {
    "block_size": st.sampled_from(BLOCK_SIZES),
    "kinds": st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=6),
    "seed": st.integers(0, 1000),
}


def check_quantize(kernels: Kernels, values: Tensor, outer: Blocks) -> None:
    """Both from the same garbage; the reference's work is left in `outer` itself."""
    twin = to(outer, kernels.device)
    kernels.ops.quantize(values.to(kernels.device), inner(twin))
    quantize(values, inner(outer))
    assert_same_blocks(twin, outer, f"{outer.format.name} of {values.numel()} {values.dtype}")


def check_quantize_vectors(kernels: Kernels, vectors: list[Tensor], outers: list[Blocks]) -> None:
    """Every vector beside what the reference makes of it alone, and the counts of all."""
    twins = [to(outer, kernels.device) for outer in outers]
    expected, found = torch.full((2, GRADIENT_COUNTS), 5.0, dtype=torch.float64)
    found = found.to(kernels.device)
    moved = [vector.to(kernels.device) for vector in vectors]
    kernels.ops.quantize_vectors(moved, [inner(twin) for twin in twins], found)
    for number, (vector, outer, twin) in enumerate(zip(vectors, outers, twins, strict=True)):
        quantize(vector, inner(outer), expected)
        assert_same_blocks(twin, outer, f"vector {number} of {len(vectors)}, {outer.format.name}")
    assert found[:3].tolist() == expected[:3].tolist()
    torch.testing.assert_close(found[3:].cpu(), expected[3:], rtol=1e-12, atol=0)


def check_nasty_values(kernels: Kernels, fmt: Format, every: int) -> None:
    """With an anchor of the format's maximum, so that codes meet the values themselves, and without.

    every: one nasty value in `every` is taken.
    """
    values = nasty_values(fmt)[::every]
    others = special_values()[::3]
    anchors = (fmt.max, 0.0, -torch.inf, torch.nan)
    rows = torch.cat([in_rows(values, 64, anchor) for anchor in anchors[:2]])
    rows = torch.cat([rows, rows[:1] * 0.0, *(in_rows(others, 64, anchor) for anchor in anchors)])
    outer = dirty(len(rows), 64, fmt)
    check_quantize(kernels, rows.view(-1), outer)
    if outer.scales is not None:
        assert NOT_FINITE in inner(outer).scales.tolist()  # type: ignore[union-attr]


def check_scales_at_their_boundaries(kernels: Kernels, fmt: Format) -> None:
    """A block's maximum on, just below and just above every power of two times the format's maximum."""
    tops = torch.exp2(torch.arange(-160.0, 121.0, dtype=torch.float64)) * fmt.max
    sizes = neighbours(tops[tops <= FLOAT32_MAX].to(torch.float32))
    sizes = sizes[sizes.isfinite()]
    rows = torch.rand(len(sizes), 32, generator=torch.Generator().manual_seed(0)) * sizes[:, None]
    rows[torch.arange(len(sizes)), torch.arange(len(sizes)) % 32] = sizes
    rows[::2] *= -1
    outer = dirty(len(rows), 32, fmt)
    check_quantize(kernels, rows.view(-1), outer)
    assert len(inner(outer).scales.unique()) > 230  # type: ignore[union-attr]


def check_dequantize(kernels: Kernels, source: Blocks, numel: int, dtype: torch.dtype) -> None:
    """Into the first `numel` elements after eight; the others, a tile and more, stay what they are.

    What a block that is not finite decodes to is not finite either, and no more is promised.
    """
    expected = garbage(numel + 4096, dtype=dtype)
    found = expected.to(kernels.device, copy=True)
    kernels.ops.dequantize(to(source, kernels.device), found[8 : 8 + numel])
    blocks.dequantize(source, expected[8 : 8 + numel])
    alike = not_finite if source.format.scaled else torch.isnan
    assert_same(found, expected, f"{source.format.name} as {dtype}", alike=alike)


def check_every_code(kernels: Kernels, fmt: Format, dtype: torch.dtype) -> None:
    """Every code with every scale where the code has 8 bits, with some of them where it has 16."""
    codes = every_code(fmt)
    if fmt.itemsize == 1:
        raw(codes)[to_float32(codes, fmt).isnan()] = 0  # NaN stands in no block that is finite
        scales = torch.arange(1, 256)
    else:
        scales = torch.tensor([1, 2, 127, 255] if fmt.scaled else [127])
    rows = raw(codes).view(-1, 256).repeat(len(scales), 1).view(fmt.dtype)
    of_rows = scales.repeat_interleave(len(codes) // 256).to(torch.uint8) if fmt.scaled else None
    check_dequantize(kernels, Blocks(rows, of_rows, fmt), rows.numel(), dtype)


def check_fp32(kernels: Kernels, dtype: torch.dtype, every: int) -> None:
    """FP32 blocks rounded to the vector's dtype, ties and values past its maximum included.

    every: one nasty value in `every` is taken.
    """
    fmt = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}[dtype]
    past_fp16 = torch.linspace(65_504, 140_000, 1_000)
    values = torch.cat([nasty_values(fmt)[::every], special_values(), past_fp16, torch.tensor(BAD)])
    rows = in_rows(values, 64, 65520.0)
    check_dequantize(kernels, Blocks(rows, None, FP32), rows.numel(), dtype)


@dataclass(frozen=True)
class Vector:
    """Values anywhere in a buffer, the last block short by any number, and the blocks that they fill."""

    fmt: Format
    dtype: torch.dtype
    block_size: int
    rows: int
    kinds: list[str]
    missing: int
    extra_rows: int
    offset: int
    seed: int

    @property
    def values(self) -> Tensor:
        rows = rows_of(cycled(self.kinds, self.rows), self.block_size, self.seed)
        before, after = torch.full((self.offset,), torch.nan), torch.full((300,), torch.nan)
        buffer = torch.cat([before, rows.view(-1), after]).to(self.dtype)
        numel = max(0, rows.numel() - self.missing % self.block_size)
        return buffer[self.offset : self.offset + numel]

    @property
    def blocks(self) -> Blocks:
        return dirty(self.rows + self.extra_rows, self.block_size, self.fmt)


VECTORS = st.builds(
    Vector,
    fmt=st.sampled_from(ALL),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 70),
    missing=st.integers(0, 255),
    extra_rows=st.integers(0, 40),
    offset=st.integers(0, 17),
    **SHAPES,
)


def alike(vectors: list[Vector]) -> list[Vector]:
    """With the formats and block sizes of the first."""
    first = vectors[0]
    return [replace(each, fmt=first.fmt, block_size=first.block_size) for each in vectors]


SEVERAL = st.lists(VECTORS, min_size=1, max_size=5).map(alike)


@dataclass(frozen=True)
class Source:
    """Blocks, and how many elements short of their end the vector stops that they are written to."""

    fmt: Format
    dtype: torch.dtype
    block_size: int
    rows: int
    kinds: list[str]
    missing: int
    seed: int


SOURCES = st.builds(
    Source,
    fmt=st.sampled_from(ALL),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 70),
    missing=st.one_of(st.integers(0, 255), st.integers(0, 10_000)),
    **SHAPES,
)


def check_source(kernels: Kernels, source: Source) -> None:
    rows = rows_of(cycled(source.kinds, source.rows), source.block_size, source.seed)
    numel = max(0, rows.numel() - source.missing)
    check_dequantize(kernels, inner(guarded(rows, source.fmt)), numel, source.dtype)


def check_few_elements(kernels: Kernels, fmt: Format, numel: int) -> None:
    """No block, a block of one element, one that is one short or just full, and one element more."""
    outer = dirty(-(-numel // 32), 32, fmt)
    check_quantize(kernels, torch.linspace(-3, 3, numel), outer)
    check_dequantize(kernels, inner(outer), numel, torch.float32)


WIRES = (E4M3, E5M2, BF16)
SHARDS = (FP32, BF16, E4M3, E5M2)

each_shard = pytest.mark.parametrize("fmt", SHARDS, ids=lambda fmt: fmt.name)


def messages(values: list[Tensor], wire: Format, gap: int) -> Tensor:
    """One message a rank, [ranks, bytes]: codes, scales, and a gap of garbage that keeps codes aligned."""
    rows, block_size = values[0].shape
    length = rows * (block_size * wire.itemsize + (1 if wire.scaled else 0)) + gap
    buffer = torch.full((len(values), (length // 16 + 1) * 16), GARBAGE, dtype=torch.uint8)
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


def check_accumulate(
    kernels: Kernels,
    values: list[Tensor],
    old: Tensor,
    wire: Format,
    fmt: Format,
    *,
    overwrite: bool,
    gap: int = 0,
) -> Tensor:
    """Both sums of the ranks' values and what the shard holds; returns the kernels' parts of the norm."""
    buffer = messages(values, wire, gap)
    before = buffer.clone()
    outer = guarded(old, fmt)
    twin, received = to(outer, kernels.device), buffer.to(kernels.device, copy=True)
    expected = reduction.accumulate(pieces_of(buffer, wire, *old.shape), inner(outer), overwrite=overwrite)
    pieces = pieces_of(received, wire, *old.shape)
    found = kernels.ops.accumulate(pieces, inner(twin), overwrite=overwrite).cpu()
    assert torch.equal(received.cpu(), before), "the messages were written to"
    what = f"{len(values)} x {wire.name} into {'overwritten' if overwrite else 'old'} {fmt.name}"
    assert_same_blocks(twin, outer, what, alike=not_finite if wire.scaled else torch.isnan)
    assert found[-1] == expected[-1], f"{what}: {found[-1]} non-finite blocks, expected {expected[-1]}"
    assert torch.equal(found, expected), f"{what}: {norm_square(found)}, expected {norm_square(expected)}"
    return found


def check_every_kind(kernels: Kernels, wire: Format, fmt: Format, *, overwrite: bool) -> Tensor:
    """Every kind of row alone and met with every other, from two ranks; returns the kernels' norm parts."""
    kinds = [*ROW_KINDS, *(kind for kind in FINITE_KINDS for _ in FINITE_KINDS), "normal"]
    others = [*ROW_KINDS, *FINITE_KINDS * len(FINITE_KINDS), "normal"]
    values = [rows_of(kinds, 32, seed=1), rows_of(others, 32, seed=2)]
    parts = check_accumulate(kernels, values, rows_of(others, 32, seed=3), wire, fmt, overwrite=overwrite)
    assert norm_square(parts) > 0
    assert parts[-1] > 0
    return parts


def check_half_a_code_below_overflow(kernels: Kernels) -> None:
    """BF16 that rounds up to inf is inf, whatever is added to it: nothing scales it."""
    values = [torch.full((4, 64), each) for each in (-1e37, FLOAT32_MAX, -FLOAT32_MAX / 2)]
    assert check_accumulate(kernels, values, torch.zeros(4, 64), BF16, FP32, overwrite=True)[-1] == 4


@dataclass(frozen=True)
class Sum:
    """Kinds of row in the same order on every rank, or turned; no row at all is a sum too."""

    wire: Format
    fmt: Format
    block_size: int
    rows: int
    kinds: list[str]
    ranks: int
    turn: int
    overwrite: bool
    gap: int
    seed: int

    def values(self, rank: int) -> Tensor:
        return rows_of(cycled(self.kinds, self.rows, rank * self.turn), self.block_size, self.seed + rank)


def sums(wires: tuple[Format, ...]) -> st.SearchStrategy[Sum]:
    return st.builds(
        Sum,
        wire=st.sampled_from(wires),
        fmt=st.sampled_from(SHARDS),
        rows=st.integers(0, 40),
        ranks=st.integers(1, 9),
        turn=st.integers(0, 5),
        overwrite=st.booleans(),
        gap=st.integers(0, 70),
        **SHAPES,
    )


def check_sum(kernels: Kernels, each: Sum) -> Tensor:
    pieces = [each.values(rank) for rank in range(each.ranks)]
    old = each.values(each.ranks)
    return check_accumulate(kernels, pieces, old, each.wire, each.fmt, overwrite=each.overwrite, gap=each.gap)


def check_counts(kernels: Kernels, fmt: Format, dtype: torch.dtype) -> None:
    """Of every kind of row and a short last one, added to what is there; padding counts for nothing."""
    values = torch.cat([rows_of([*ROW_KINDS, "sparse", "faint"] * 5, 64, seed=1).view(-1), torch.ones(3)])
    expected, found = torch.full((2, GRADIENT_COUNTS), 5.0, dtype=torch.float64)
    found, outer = found.to(kernels.device), dirty(70, 64, fmt)
    twin = to(outer, kernels.device)
    quantize(values.to(dtype), inner(outer), expected)
    kernels.ops.quantize(values.to(dtype).to(kernels.device), inner(twin), found)
    assert_same_blocks(twin, outer, fmt.name)
    assert found[:3].tolist() == expected[:3].tolist()
    assert dtype is not torch.float32 or (expected[0] > 5) == (fmt is not FP32)
    torch.testing.assert_close(found[3:].cpu(), expected[3:], rtol=1e-12, atol=0)
