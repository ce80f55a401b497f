"""How stock DeepSpeed places a param group. Everything is in elements.

Under ZeRO 1 and 2 the group is one flat buffer, of which each rank owns an equal part. Under ZeRO 3 each
parameter is cut into equal slices.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


def part_of_rank(sizes: Sequence[int], ranks: int) -> int:
    """Elements that a rank owns, aligned to two."""
    return -(-sum(sizes) // (2 * ranks)) * 2


def gradients_of_ranks(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """Gradient elements that each rank keeps: of parameters that reach into its part, and padding."""
    part, ends = part_of_rank(sizes, ranks), list(accumulate(sizes))
    kept = []
    for first in range(0, ranks * part, part):
        low, high = bisect_right(ends, first), bisect_left(ends, first + part)
        reaching = ends[min(high, len(ends) - 1)] - (ends[low] - sizes[low]) if low < len(ends) else 0
        kept.append((reaching, min(part, max(0, first + part - ends[-1]))))
    return kept


def slices(sizes: Sequence[int], ranks: int) -> list[int]:
    """Each parameter's slice under ZeRO 3."""
    return [-(-numel // ranks) for numel in sizes]


def gathered(sizes: Sequence[int], ranks: int) -> list[int]:
    """The slices of all ranks of each parameter, with padding; alone a rank gathers nothing."""
    return [ranks * each if ranks > 1 else 0 for each in slices(sizes, ranks)]


def sub_groups(sizes: Sequence[int], ranks: int, limit: int) -> list[tuple[int, int]]:
    """The sub-groups that ZeRO 3 steps one by one: elements of a rank's slices, and number of parameters."""
    groups, elements, members = [], 0, 0
    for each in slices(sizes, ranks):
        elements, members = elements + each, members + 1
        if elements >= limit:
            groups.append((elements, members))
            elements = members = 0
    return [*groups, (elements, members)]


def largest_reduction(sizes: Sequence[int], ranks: int, bucket: int) -> int:
    """The most gradients that ZeRO 3 copies to reduce them: a full bucket, or a parameter that exceeds it."""
    padded = [ranks * each for each in slices(sizes, ranks)]
    return min(sum(padded), max(bucket, *padded))
