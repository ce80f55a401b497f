"""Many vectors quantised in one launch: a bucket's gradients, each into its place in a message.

A launch costs a GPU microseconds in which it could read megabytes, and a bucket has dozens of parameters. So
a table says where each vector lies, as its distance from the first: the pointers that a kernel is given have
a type and an alignment, a pointer read from memory has neither.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.guards import check_quantize
from ds_fp8.ops.triton.blocks import WARPS, quantize_tile
from ds_fp8.ops.triton.launching import launch
from ds_fp8.ops.triton.tiles import hardware_fp8, partials, scales_of, tile_of

LOG_VECTORS = tl.constexpr(6)
VECTORS = tl.constexpr(2**6)  # of a launch, at most
WORD = 16  # bytes that a thread moves at once


@triton.jit
def vector_of(ends, program):
    """The vector that a program quantises; the programs before ends[v] do the vectors up to v."""
    vector = 0
    for halved in tl.static_range(1, LOG_VECTORS + 1):
        half = VECTORS >> halved
        vector += tl.where(tl.load(ends + (vector + half - 1)) <= program, half, 0)
    return vector


@triton.jit
def quantize_vectors_kernel(
    values,  # of the first vector, float32, bfloat16 or float16
    codes,  # of its blocks, which are written
    scales,
    partial,  # [programs, 5] float64: counts, if COUNT
    places,  # [7, VECTORS] int64: as `places_of` makes them
    APART: tl.constexpr,  # a divisor of the vectors' distances, in elements
    CODES_APART: tl.constexpr,  # a divisor of the codes' distances
    COUNT: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    place = places + vector_of(places, program)
    tile = program - tl.load(place + VECTORS)
    numel, blocks = tl.load(place + 2 * VECTORS), tl.load(place + 3 * VECTORS)
    values += tl.multiple_of(tl.load(place + 4 * VECTORS), APART)
    codes += tl.multiple_of(tl.load(place + 5 * VECTORS), CODES_APART)
    scales += tl.load(place + 6 * VECTORS)
    quantize_tile(
        values=values,
        codes=codes,
        scales=scales,
        partial=partial,
        amax=scales,  # not read: these are no tensors with one scale
        numel=numel,
        blocks=blocks,
        tile=tile,
        TENSOR=False,
        COUNT=COUNT,
        FORMAT=FORMAT,
        HARDWARE=HARDWARE,
        BLOCK=BLOCK,
        ROWS=ROWS,
    )


def quantize_vectors(vectors: Sequence[Tensor], outs: Sequence[Blocks], counts: Tensor | None = None) -> None:
    """`ops.backend.Backend.quantize_vectors`, in one launch per VECTORS vectors."""
    for vector, out in zip(vectors, outs, strict=True):
        check_quantize(vector, out, counts)
    pairs = [pair for pair in zip(vectors, outs, strict=True) if len(pair[1])]
    for dtype in dict.fromkeys(vector.dtype for vector, _ in pairs):
        alike = [pair for pair in pairs if pair[0].dtype is dtype]
        for first in range(0, len(alike), VECTORS.value):
            launch_vectors(alike[first : first + VECTORS.value], counts)


def launch_vectors(pairs: Sequence[tuple[Tensor, Blocks]], counts: Tensor | None) -> None:
    """Vectors of one dtype and their blocks of one format."""
    values, out = pairs[0]
    rows, _ = tile_of(len(out), out.block_size, WARPS)
    places = places_of(pairs)
    programs = places[0][-1]
    partial = partials(counts, programs, values)
    launch(
        quantize_vectors_kernel,
        programs,
        WARPS,
        values=values,
        codes=out.codes,
        scales=scales_of(out),
        partial=partial,
        places=on_device(places, values.device),
        APART=divisor([vector for vector, _ in pairs]),
        CODES_APART=divisor([blocks.codes for _, blocks in pairs]),
        COUNT=counts is not None,
        FORMAT=out.format.name,
        HARDWARE=hardware_fp8(values.device),
        BLOCK=out.block_size,
        ROWS=rows,
    )
    if counts is not None:
        counts += partial.sum(dim=0)


def places_of(pairs: Sequence[tuple[Tensor, Blocks]]) -> list[tuple[int, ...]]:
    """A column for each of VECTORS: where its programs end and begin, elements, blocks, three distances.

    The distances are from the first vector's elements, codes and scales, in elements. The last vector's
    column fills the table up.
    """
    values, out = pairs[0]
    columns, end = [], 0
    for vector, blocks in pairs:
        begin, end = end, end + tile_of(len(blocks), blocks.block_size, WARPS)[1]
        apart = (
            distance(vector, values),
            distance(blocks.codes, out.codes),
            distance(scales_of(blocks), scales_of(out)),
        )
        columns.append((end, begin, vector.numel(), len(blocks), *apart))
    columns += [columns[-1]] * (VECTORS.value - len(columns))
    return list(zip(*columns, strict=True))


def distance(tensor: Tensor, first: Tensor) -> int:
    """From the first tensor to this one, in elements."""
    return (tensor.data_ptr() - first.data_ptr()) // first.element_size()


def divisor(tensors: Sequence[Tensor]) -> int:
    """A divisor of the tensors' distances: a word's elements if all begin at a word, else 1."""
    whole = all(tensor.data_ptr() % WORD == 0 for tensor in tensors)
    return WORD // tensors[0].element_size() if whole else 1


def on_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table as int64 on the device; the host does not wait for the copy."""
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
