"""No pair of values is left to `make test-all`, and no cell is lost."""

from itertools import combinations, product
from typing import Any

from grids import grid

DIMENSIONS: dict[str, list[Any]] = {"one": [1, 2, 3], "two": [{}, {"key": 1}], "three": ["a", "b"]}


def test_a_grid_has_every_pair_in_the_quick_cells_and_every_cell() -> None:
    names, cells = grid(**DIMENSIONS).args
    quick = [cell for cell in cells if isinstance(cell, list)]
    late = [list(cell.values) for cell in cells if not isinstance(cell, list)]
    assert names == [*DIMENSIONS]
    assert len(quick) < 12
    assert sorted(map(str, quick + late)) == sorted(map(str, map(list, product(*DIMENSIONS.values()))))
    for first, second in combinations(range(len(names)), 2):
        met = [(cell[first], cell[second]) for cell in quick]
        assert all(pair in met for pair in product(DIMENSIONS[names[first]], DIMENSIONS[names[second]]))
