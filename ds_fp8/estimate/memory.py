"""Bytes per parameter and bytes on the wire of a run in FP8, as plain arithmetic.

One source for the banner, the command line, the documentation and the tests, which count what is really
allocated and sent and compare. `stock` has the arithmetic of stock DeepSpeed, `placement/messages.py` that of
a message.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from ds_fp8.ops.formats import BF16, E4M3, FP32, Format
from ds_fp8.ops.products import TILE, tiles
from ds_fp8.zero_fp8.offload.sizes import Crossing, Expected, expected
from ds_fp8.zero_fp8.placement import parameters
from ds_fp8.zero_fp8.placement.messages import Message
from ds_fp8.zero_fp8.placement.partition import Bucket, slice_blocks
from ds_fp8.zero_fp8.placement.ranks import Fleet, NodeLayout
from ds_fp8.zero_fp8.recipe import Offload, Recipe


def bytes_per_element(fmt: Format, block_size: int, scale_bytes: int = 1) -> float:
    """A code and its share of the block's scale."""
    return fmt.itemsize + (scale_bytes / block_size if fmt.scaled else 0)


def state_bytes_per_parameter(recipe: Recipe) -> float:
    """Master weight, exp_avg and exp_avg_sq."""
    return sum(bytes_per_element(fmt, recipe.block_size) for fmt in _state_formats(recipe))


def gradient_bytes_per_parameter(recipe: Recipe, *, accumulating: bool) -> float:
    """The reduced gradient; `accumulating`: several micro-steps reach it before a step."""
    fmt = _reduced_format(recipe, accumulating=accumulating)
    return bytes_per_element(fmt, recipe.block_size, recipe.gradient_scale_bytes)


def wire_bytes_per_gradient_element(recipe: Recipe) -> float:
    """A gradient element on its way to its owner."""
    return bytes_per_element(recipe.wire, recipe.block_size, recipe.wire_scale_bytes)


def _state_formats(recipe: Recipe) -> tuple[Format, ...]:
    return recipe.master, recipe.exp_avg, recipe.exp_avg_sq


def _reduced_format(recipe: Recipe, *, accumulating: bool) -> Format:
    return FP32 if accumulating and recipe.promote else recipe.reduced


def block_bytes(blocks: int, block_size: int, fmt: Format, scale_bytes: int = 1) -> int:
    """Codes of these blocks, and their scales if the format has any."""
    return blocks * (block_size * fmt.itemsize + fmt.scaled * scale_bytes)


def state_bytes(recipe: Recipe, buckets: Sequence[Bucket], rank: int = 0) -> int:
    """Bytes of one rank's master weights, exp_avg and exp_avg_sq, padding included."""
    return sum(
        block_bytes(bucket.blocks_of(rank), recipe.block_size, fmt)
        for bucket in buckets
        for fmt in _state_formats(recipe)
    )


def gradient_bytes(recipe: Recipe, buckets: Sequence[Bucket], rank: int = 0, *, accumulating: bool) -> int:
    """Bytes of one rank's reduced gradient, padding included."""
    fmt = _reduced_format(recipe, accumulating=accumulating)
    return sum(
        block_bytes(bucket.blocks_of(rank), recipe.block_size, fmt, recipe.gradient_scale_bytes)
        for bucket in buckets
    )


def rank_bytes(recipe: Recipe, buckets: Sequence[Bucket], *, accumulating: bool) -> list[int]:
    """Bytes of states and reduced gradient of every rank."""
    reduced, ranks = _reduced_format(recipe, accumulating=accumulating), buckets[0].world_size
    block = sum(block_bytes(1, recipe.block_size, fmt) for fmt in _state_formats(recipe))
    block += block_bytes(1, recipe.block_size, reduced, recipe.gradient_scale_bytes)
    if recipe.by_tensor:
        return [block * sum(bucket.blocks_of(rank) for bucket in buckets) for rank in range(ranks)]
    even = block * sum(bucket.blocks_per_rank for bucket in buckets)
    return [even for _ in range(ranks)]


def offloaded_bytes(
    recipe: Recipe, offload: Offload, itemsize: int, buckets: Sequence[Bucket], rank: int, *, several: bool
) -> Expected:
    """Bytes of offload in host memory and on the device. several: whether a step has several exchanges."""
    layout = NodeLayout.of(buckets[0].world_size, recipe.intra_node_size)
    rows = [bucket.blocks_of(rank) for bucket in buckets]
    return expected(recipe, offload, Crossing(rows, itemsize * recipe.block_size, layout, several))


def weight_bytes(itemsize: int, buckets: Sequence[Bucket]) -> int:
    """Bytes of the weights on every rank, padding included; itemsize: bytes of the model's dtype."""
    return sum(bucket.blocks * bucket.block_size * itemsize for bucket in buckets)


Shape = tuple[int, int]


class Cut(NamedTuple):
    """How ZeRO 3 cuts parameters."""

    block_size: int
    fleet: Fleet


def shape_of(matrix: Tensor) -> Shape:
    rows, columns = parameters.shape_of(matrix)
    return rows, columns


def code_bytes(buckets: Sequence[Bucket], shapes: Mapping[int, Shape]) -> int:
    """Bytes of these buckets' weights on every rank as FP8 codes, padding and exponents included.

    shapes: of their matrices, by global index.
    """
    return weight_bytes(E4M3.itemsize, buckets) + beside_codes(_shapes_of(buckets, shapes))


def frozen_bytes(shapes: Collection[Shape]) -> int:
    """Bytes of frozen matrices as FP8 codes: as `code_bytes`, without padding."""
    return E4M3.itemsize * sum(map(prod, shapes)) + beside_codes(shapes)


def beside_codes(shapes: Iterable[Shape]) -> int:
    """Bytes on every rank beside the codes of these matrices."""
    behind = BF16.itemsize  # the value that C++ would read in a parameter's place
    return sum(exponent_bytes(*each) + behind for each in shapes)


def agreement_bytes(buckets: Sequence[Bucket], shapes: Mapping[int, Shape]) -> int:
    """Bytes that a rank hands to the maxima by which the ranks agree on exponents in a step."""
    return sum(exponent_bytes(*shape) for shape in _shapes_of(buckets, shapes))


def room_bytes(buckets: Sequence[Bucket]) -> int:
    """Bytes of the BF16 rows from which the fullest rank makes codes, one bucket at a time."""
    return max((BF16.itemsize * each.blocks_per_rank * each.block_size for each in buckets), default=0)


def handed_bytes(itemsize: int, buckets: Sequence[Bucket]) -> int:
    """Bytes of weights that a rank hands to the gathers of a step."""
    return sum(itemsize * each.blocks_per_rank * each.block_size for each in buckets)


def _shapes_of(buckets: Sequence[Bucket], shapes: Mapping[int, Shape]) -> list[Shape]:
    return [shapes[slot.parameter] for bucket in buckets for slot in bucket.slots]


def exponent_bytes(rows: int, columns: int) -> int:
    """Bytes of a matrix's exponents."""
    return tiles(rows) * tiles(columns)


def slice_bytes(itemsize: int, sizes: Iterable[int], block_size: int, fleet: Fleet) -> int:
    """Bytes of one rank's slices of these parameters under ZeRO 3, padding included."""
    return itemsize * block_size * sum(slice_blocks(numel, block_size, fleet.size) for numel in sizes)


def sliced_bytes(itemsizes: Sequence[int], sizes: Sequence[int], frozen: Collection[int], cut: Cut) -> int:
    """Bytes of one rank's slices of a model's parameters. frozen: positions of those that have no bucket."""
    return sum(
        itemsize * numel if index in frozen and cut.fleet.size == 1 else slice_bytes(itemsize, [numel], *cut)
        for index, (itemsize, numel) in enumerate(zip(itemsizes, sizes, strict=True))
    )


def fetch_bytes(itemsize: int, sizes: Iterable[int], block_size: int, fleet: Fleet) -> int:
    """Bytes that a rank hands to the gathers that fetch these parameters once; alone it sends nothing."""
    return 0 if fleet.size == 1 else slice_bytes(itemsize, sizes, block_size, fleet)


def gathered_bytes(itemsize: int, sizes: Iterable[int], block_size: int, fleet: Fleet) -> int:
    """Bytes that these parameters take besides their slices when they are fetched; alone none are."""
    return fleet.size * fetch_bytes(itemsize, sizes, block_size, fleet)


def persistent_bytes(itemsize: int, sizes: Iterable[int], fleet: Fleet) -> int:
    """Bytes that persistent parameters take besides their slices, without padding; alone none are."""
    return 0 if fleet.size == 1 else itemsize * sum(sizes)


def hop_bytes(recipe: Recipe, bucket: Bucket) -> list[int]:
    """Bytes that one rank hands to each hop of a bucket's exchange; its own part is among them."""
    ranks = bucket.world_size
    shares = {bucket.blocks_per_rank: ranks}
    if recipe.by_tensor:
        shares = Counter(map(bucket.blocks_of, range(ranks)))
    hops = [sum(owners * _message_bytes(recipe, blocks, recipe.wire) for blocks, owners in shares.items())]
    nodes = NodeLayout.of(ranks, recipe.intra_node_size).count
    if nodes > 1:
        hops.append(nodes * _message_bytes(recipe, bucket.blocks_per_rank, recipe.between_nodes))
    return hops


def _message_bytes(recipe: Recipe, blocks: int, fmt: Format) -> int:
    """A message of `blocks` blocks; in an FP8 sum all ranks know the scales."""
    return Message(blocks, recipe.block_size, fmt, with_scales=recipe.autoscale is None).nbytes


def _received_bytes(recipe: Recipe, bucket: Bucket) -> int:
    """Bytes that the most loaded rank receives on the first hop."""
    return bucket.from_all(_message_bytes(recipe, bucket.blocks_per_rank, recipe.wire))


def in_flight_bytes(recipe: Recipe, buckets: Sequence[Bucket], *, overlap: bool) -> int:
    """Bytes of messages, sent and received, that the most loaded rank holds at most.

    One bucket is on its first hop; with overlap the one before it is on its last.
    """
    held = []  # sent and received on the first hop, and on the last
    for bucket in buckets:
        first, *second = hop_bytes(recipe, bucket)
        received = _received_bytes(recipe, bucket)
        held.append((first + received, 2 * second[0] if second else first + received))
    earlier = max(last for _, last in held) if overlap and len(buckets) > 1 else 0
    return max(first for first, _ in held) + earlier


def gather_bytes(recipe: Recipe, itemsize: int, buckets: Sequence[Bucket]) -> int:
    """Bytes that a gather of weights takes besides them, at most: slices on their way between nodes."""
    if not buckets or not recipe.two_hops(buckets[0].world_size):
        return 0
    return max(weight_bytes(itemsize, [bucket]) for bucket in buckets) // recipe.intra_node_size


def grad_bytes(itemsize: int, buckets: Sequence[Bucket]) -> int:
    """Bytes of every parameter's `.grad`, which ZeRO 1 keeps until the accumulation boundary."""
    return itemsize * sum(slot.numel for bucket in buckets for slot in bucket.slots)


def backward_bytes(
    recipe: Recipe, itemsize: int, buckets: Sequence[Bucket], *, stage: int, overlap: bool
) -> int:
    """Bytes of `.grad` and of messages in backward, at their largest.

    A bucket's `.grad` is dropped when its message is filled; what it receives comes on top of what it sends.
    With overlap the bucket before it is still on its last hop. Under ZeRO 2 a `.grad` is there from when its
    bucket fills, under ZeRO 1 from the start.
    """
    largest = under_way = 0
    held = grad_bytes(itemsize, buckets) if stage == 1 else 0
    for bucket in buckets:
        own, (sent, *second) = grad_bytes(itemsize, [bucket]), hop_bytes(recipe, bucket)
        received = _received_bytes(recipe, bucket)
        before = held if stage == 1 else own
        held = before - own
        largest = max(largest, under_way + sent + max(before, held + received))
        last = 2 * second[0] if second else sent + received
        under_way = last if overlap else 0
    return largest


def summary(recipe: Recipe, *, ranks: int, accumulating: bool) -> dict[str, Any]:
    """Formats, bytes and hops; accumulating: several micro-steps reach the reduced gradient before a step."""
    nodes = NodeLayout.of(ranks, recipe.intra_node_size)
    return {
        "gradients": recipe.wire.name,
        "reduced_gradient": _reduced_format(recipe, accumulating=accumulating).name,
        "master": recipe.master.name,
        "rounding": "stochastic" if recipe.rounding.stochastic else "nearest",
        "draws": recipe.rounding.draws,
        "exp_avg": recipe.exp_avg.name,
        "exp_avg_sq": recipe.exp_avg_sq.name,
        "autoscale": recipe.autoscale,
        "scaling": "tensor" if recipe.by_tensor else "block",
        "block_size": recipe.block_size,
        "state_bytes_per_parameter": state_bytes_per_parameter(recipe),
        "gradient_bytes_per_parameter": gradient_bytes_per_parameter(recipe, accumulating=accumulating),
        "wire_bytes_per_gradient_element": wire_bytes_per_gradient_element(recipe),
        "intra_node_size": nodes.size,
        "nodes": nodes.count,
        "between_nodes": recipe.between_nodes.name if nodes.count > 1 else None,
        **(_of_codes() if recipe.weights else {}),
    }


LARGE = 8 * TILE  # a side of a matrix whose tiles are all full


def _of_codes() -> dict[str, float]:
    """Bytes per element of a large FP8 matrix: on every rank, and on the wire per step."""
    found = E4M3.itemsize + exponent_bytes(LARGE, LARGE) / LARGE**2
    return {"weight_bytes_per_fp8_element": found, "wire_bytes_per_fp8_element": found}
