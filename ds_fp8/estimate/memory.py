"""Bytes a parameter and bytes on the wire, as plain arithmetic; what stock DeepSpeed takes, too.

One source for the banner, the command line, the documentation and the tests, which count what is really
allocated and sent and compare.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ds_fp8.ops.formats import FP32, Format
from ds_fp8.zero_fp8.placement.partition import Bucket
from ds_fp8.zero_fp8.recipe import Recipe

MESSAGE_ALIGNMENT = 16  # bytes a message between two ranks is padded to


def bytes_an_element(fmt: Format, block_size: int, scale_bytes: int = 1) -> float:
    """A code and its share of the block's scale."""
    return fmt.itemsize + (scale_bytes / block_size if fmt.scaled else 0)


def state_bytes_a_parameter(recipe: Recipe) -> float:
    """Master weight, exp_avg and exp_avg_sq."""
    states = (recipe.master, recipe.exp_avg, recipe.exp_avg_sq)
    return sum(bytes_an_element(fmt, recipe.block_size) for fmt in states)


def gradient_bytes_a_parameter(recipe: Recipe, *, accumulating: bool) -> float:
    """The reduced gradient; `accumulating`: several micro-steps reach it before a step."""
    fmt = FP32 if accumulating and recipe.promote else recipe.shard
    return bytes_an_element(fmt, recipe.block_size, recipe.gradient_scale_bytes)


def wire_bytes_an_element(recipe: Recipe) -> float:
    """What a gradient element weighs on its way to its owner."""
    return bytes_an_element(recipe.wire, recipe.block_size, recipe.wire_scale_bytes)


def block_bytes(blocks: int, block_size: int, fmt: Format, scale_bytes: int = 1) -> int:
    return blocks * (block_size * fmt.itemsize + fmt.scaled * scale_bytes)


def state_bytes(recipe: Recipe, buckets: Sequence[Bucket], rank: int = 0) -> int:
    """Bytes of one rank's master weights, exp_avg and exp_avg_sq, padding included."""
    return sum(
        block_bytes(bucket.blocks_of(rank), recipe.block_size, fmt)
        for bucket in buckets
        for fmt in (recipe.master, recipe.exp_avg, recipe.exp_avg_sq)
    )


def gradient_bytes(recipe: Recipe, buckets: Sequence[Bucket], rank: int = 0, *, accumulating: bool) -> int:
    """Bytes of one rank's reduced gradient, padding included."""
    fmt = FP32 if accumulating and recipe.promote else recipe.shard
    return sum(
        block_bytes(bucket.blocks_of(rank), recipe.block_size, fmt, recipe.gradient_scale_bytes)
        for bucket in buckets
    )


def rank_bytes(recipe: Recipe, buckets: Sequence[Bucket], *, accumulating: bool) -> list[int]:
    """Bytes of states and reduced gradient of every rank."""
    fmt, ranks = FP32 if accumulating and recipe.promote else recipe.shard, buckets[0].world_size
    states = (recipe.master, recipe.exp_avg, recipe.exp_avg_sq)
    block = sum(block_bytes(1, recipe.block_size, each) for each in states)
    block += block_bytes(1, recipe.block_size, fmt, recipe.gradient_scale_bytes)
    uneven = ranks if recipe.by_tensor else 1  # else every rank owns as many blocks as the first
    owned = [block * sum(bucket.blocks_of(rank) for bucket in buckets) for rank in range(uneven)]
    return owned if recipe.by_tensor else ranks * owned


def weight_bytes(itemsize: int, buckets: Sequence[Bucket]) -> int:
    """Bytes of the weights on every rank, padding included; itemsize: bytes of the model's dtype."""
    return sum(bucket.blocks * bucket.block_size * itemsize for bucket in buckets)


def message_bytes(recipe: Recipe, blocks: int, fmt: Format) -> int:
    """Bytes of a message of so many blocks."""
    whole = block_bytes(blocks, recipe.block_size, fmt, recipe.wire_scale_bytes)
    return -(-whole // MESSAGE_ALIGNMENT) * MESSAGE_ALIGNMENT


def hop_bytes(recipe: Recipe, bucket: Bucket) -> list[int]:
    """Bytes that one rank hands to each hop of a bucket's exchange; its own part is among them."""
    ranks = bucket.world_size
    shares = {bucket.blocks_per_rank: ranks}
    if recipe.by_tensor:
        shares = Counter(map(bucket.blocks_of, range(ranks)))
    hops = [sum(owners * message_bytes(recipe, share, recipe.wire) for share, owners in shares.items())]
    if recipe.two_hops(ranks):
        nodes = ranks // recipe.intra_node_size
        hops.append(nodes * message_bytes(recipe, bucket.blocks_per_rank, recipe.between_nodes))
    return hops


def exchange_bytes(recipe: Recipe, bucket: Bucket) -> int:
    """Bytes that one rank hands to the exchange of a bucket, over its hops."""
    return sum(hop_bytes(recipe, bucket))


def in_flight_bytes(recipe: Recipe, buckets: Sequence[Bucket], *, overlap: bool) -> int:
    """Bytes of messages, sent and received, that the fullest rank holds at most.

    One bucket is on its first hop; with overlap the one before it is on its last.
    """
    held = []  # sent and received on the first hop, and on the last
    for bucket in buckets:
        first, *second = hop_bytes(recipe, bucket)
        received = bucket.world_size * message_bytes(recipe, bucket.blocks_per_rank, recipe.wire)
        held.append((first + received, 2 * second[0] if second else first + received))
    earlier = max(each[-1] for each in held) if overlap and len(buckets) > 1 else 0
    return max(each[0] for each in held) + earlier


def gather_bytes(recipe: Recipe, itemsize: int, buckets: Sequence[Bucket]) -> int:
    """Bytes that a gather of weights takes besides them, at most: slices on their way between nodes."""
    if not recipe.two_hops(buckets[0].world_size):
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
        received = bucket.world_size * message_bytes(recipe, bucket.blocks_per_rank, recipe.wire)
        before = held if stage == 1 else own
        held = before - own
        largest = max(largest, under_way + sent + max(before, held + received))
        last = 2 * second[0] if second else sent + received
        under_way = last if overlap else 0
    return largest


def facts(recipe: Recipe, *, ranks: int, several: bool) -> dict[str, Any]:
    """Formats, bytes and hops; several: micro-steps reach the reduced gradient before a step."""
    nodes = ranks // recipe.intra_node_size if recipe.two_hops(ranks) else 1
    return {
        "gradients": recipe.wire.name,
        "reduced_gradient": (FP32 if several and recipe.promote else recipe.shard).name,
        "master": recipe.master.name,
        "rounding": "stochastic" if recipe.stochastic else "nearest",
        "exp_avg": recipe.exp_avg.name,
        "exp_avg_sq": recipe.exp_avg_sq.name,
        "autoscale": recipe.autoscale,
        "scaling": "tensor" if recipe.by_tensor else "block",
        "block_size": recipe.block_size,
        "state_bytes_a_parameter": state_bytes_a_parameter(recipe),
        "gradient_bytes_a_parameter": gradient_bytes_a_parameter(recipe, accumulating=several),
        "wire_bytes_a_gradient_element": wire_bytes_an_element(recipe),
        "intra_node_size": ranks // nodes,
        "nodes": nodes,
        "between_nodes": recipe.between_nodes.name if nodes > 1 else None,
    }


# Stock DeepSpeed keeps a param group in one flat buffer, of which each rank owns an equal part. In elements:


def stock_part(sizes: Sequence[int], ranks: int) -> int:
    """What a rank owns, aligned to two elements."""
    return -(-sum(sizes) // (2 * ranks)) * 2


def stock_gradients(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """What each rank keeps of the gradient: parameters that reach into its part, whole, and padding."""
    part, ends = stock_part(sizes, ranks), list(accumulate(sizes))
    kept = []
    for first in range(0, ranks * part, part):
        low, high = bisect_right(ends, first), bisect_left(ends, first + part)
        reaching = ends[min(high, len(ends) - 1)] - (ends[low] - sizes[low]) if low < len(ends) else 0
        kept.append((reaching, min(part, max(0, first + part - ends[-1]))))
    return kept
