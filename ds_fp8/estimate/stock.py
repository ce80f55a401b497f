"""How stock DeepSpeed places a param group: one flat buffer, of which each rank owns an equal part.

Everything is in elements.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


def part_of_rank(sizes: Sequence[int], ranks: int) -> int:
    """What a rank owns, aligned to two elements."""
    return -(-sum(sizes) // (2 * ranks)) * 2


def gradients_of_ranks(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """What each rank keeps of the gradient: parameters that reach into its part, whole, and padding."""
    part, ends = part_of_rank(sizes, ranks), list(accumulate(sizes))
    kept = []
    for first in range(0, ranks * part, part):
        low, high = bisect_right(ends, first), bisect_left(ends, first + part)
        reaching = ends[min(high, len(ends) - 1)] - (ends[low] - sizes[low]) if low < len(ends) else 0
        kept.append((reaching, min(part, max(0, first + part - ends[-1]))))
    return kept
