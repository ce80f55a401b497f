"""Grids of cases: every pair of values in `make test`, the whole product in `make test-all`."""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(dimensions: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few choices in which every value of a dimension meets every value of every other; greedy."""
    names = list(dimensions)
    left = {
        frozenset([(a, x), (b, y)])
        for a, b in combinations(names, 2)
        for x, y in product(dimensions[a], dimensions[b])
    }
    draw, choices = random.Random(0), []
    while left:
        pair = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        trials = [{**{name: draw.choice(dimensions[name]) for name in names}, **pair} for _ in range(50)]
        covered = [{frozenset(each) for each in combinations(trial.items(), 2)} & left for trial in trials]
        best = max(range(len(trials)), key=lambda index: len(covered[index]))
        left -= covered[best]
        choices.append(trials[best])
    return choices


def grid(**dimensions: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with the product; cells that no pair of values needs are slow."""
    places = {name: range(len(values)) for name, values in dimensions.items()}
    chosen = [tuple(each[name] for name in places) for each in pairwise(places)]
    cells = [
        [values[place] for values, place in zip(dimensions.values(), cell, strict=True)]
        for cell in sorted(product(*places.values()), key=lambda cell: cell not in chosen)
    ]
    return some_of(list(dimensions), cells, len(set(chosen)))


def some_of(names: Sequence[str], cells: Sequence[Any], count: int) -> pytest.MarkDecorator:
    """Parametrizes a test with cells of which the first `count` are not slow."""
    late = [pytest.param(*cell, marks=pytest.mark.slow) for cell in cells[count:]]
    return pytest.mark.parametrize(names, [*cells[:count], *late])
