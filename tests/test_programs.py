"""Whatever a program does with forwards, backwards, weights and hooks: gradients are as in PyTorch."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import NAMES, WITH_SLICES, Program, run
from ranks import RankPools

SECONDS = 60.0  # a program takes less than one
REFUSED = "refused: "


def runs(names: list[str], stages: list[int]) -> st.SearchStrategy[tuple[Program, int, int, bool]]:
    programs = st.lists(st.tuples(st.sampled_from(names), st.integers(0, 11)), min_size=3, max_size=14)
    return st.tuples(programs, st.sampled_from(stages), st.sampled_from([1, 3]), st.booleans())


BOTH = [(NAMES, [1, 2]), (WITH_SLICES, [3])]
IDS = ["1 and 2", "3"]


def check(ranks: RankPools, folder: str, count: int, names: list[str], stages: list[int]) -> None:
    refused = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(runs(names, stages))
    def one(drawn: tuple[Program, int, int, bool]) -> None:
        program, stage, micro_steps, overlap = drawn
        ending = [("plain", 1), ("step", 0)] * micro_steps
        found = ranks.run(2, run, [*program, *ending], stage, micro_steps, overlap, folder, seconds=SECONDS)
        refused.append(found[0].startswith(REFUSED))
        assert set(found) == {""} or refused[-1], found[0]

    one()
    assert sum(refused) <= len(refused) / 5, "too much is refused"


@pytest.mark.parametrize(("names", "stages"), BOTH, ids=IDS)
def test_gradients_are_those_of_pytorch(
    ranks: RankPools, tmp_path_factory: pytest.TempPathFactory, names: list[str], stages: list[int]
) -> None:
    check(ranks, str(tmp_path_factory.mktemp("programs")), 15 * len(stages), names, stages)


@pytest.mark.slow
@pytest.mark.parametrize(("names", "stages"), BOTH, ids=IDS)
def test_two_hundred_programs(
    ranks: RankPools, tmp_path_factory: pytest.TempPathFactory, names: list[str], stages: list[int]
) -> None:
    check(ranks, str(tmp_path_factory.mktemp("programs")), 200, names, stages)
