"""The slices in stock DeepSpeed's files of ZeRO 3. Integers only.

Slice r of a parameter is its elements from r * share on, share = ceil(numel / ranks), wherever that cuts a
block; the last slices may be short or empty, and are filled up. A rank's slices of several parameters follow
each other in one vector.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_fp8.zero_fp8.placement.partition import Bucket


def share_of(numel: int, ranks: int) -> int:
    """Elements of every rank's slice, filled up."""
    return -(-numel // ranks)


def slice_of(numel: int, ranks: int, rank: int) -> slice:
    """The elements of a parameter in a rank's slice."""
    share = share_of(numel, ranks)
    return slice(min(rank * share, numel), min((rank + 1) * share, numel))


def spans(numel: int, length: int, ranks: int) -> list[tuple[int, int, int]]:
    """Which ranks hold which elements, in slices of `length`: rank, first element, the one after its last."""
    found = [(rank, rank * length, min((rank + 1) * length, numel)) for rank in range(ranks)]
    return [each for each in found if each[1] < each[2]]


def starts_of(sizes: Sequence[int], ranks: int) -> list[int]:
    """Offsets of the slices of parameters of these sizes in a rank's vector, and its length."""
    starts = [0]
    for numel in sizes:
        starts.append(starts[-1] + share_of(numel, ranks))
    return starts


@dataclass(frozen=True)
class Move:
    """Elements on their way from what a rank owns of a bucket to another's slices."""

    source: int  # first element in the owner's vector, whose pieces lie side by side without padding
    target: int  # first element in the other's
    numel: int


def moves(bucket: Bucket, owner: int, receiver: int) -> Iterator[Move]:
    """Elements of `receiver`'s slices of a bucket that `owner` has, in the order of the bucket."""
    sizes, first = [slot.numel for slot in bucket.slots], 0
    indices = [slot.parameter for slot in bucket.slots]
    starts = dict(zip(indices, starts_of(sizes, bucket.world_size), strict=False))
    for piece in bucket.pieces(owner):
        wanted = slice_of(piece.slot.numel, bucket.world_size, receiver)
        low, high = max(wanted.start, piece.elements.start), min(wanted.stop, piece.elements.stop)
        if low < high:
            target = starts[piece.slot.parameter] + low - wanted.start
            yield Move(first + low - piece.first_element, target, high - low)
        first += piece.numel


def length_of(bucket: Bucket) -> int:
    """Elements of every rank's slices of a bucket."""
    return starts_of([slot.numel for slot in bucket.slots], bucket.world_size)[-1]
