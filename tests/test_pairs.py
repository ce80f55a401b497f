"""Each pair of features works, with five steps beside the plain run, or is refused by a message.

`pairs.AXES` and `pairs.REFUSED` are the table. A pair that becomes possible loses its line in REFUSED.
"""

import functools
from pathlib import Path
from typing import Any, get_args

import pairs
import pytest
from engines import assert_same_bits
from pairs import AXES, REFUSED, Pair, Values, complete, cover, every_pair, pair, pairs_of
from ranks import RankPools

from ds_fp8.config.ds_config import STAGES
from ds_fp8.config.section import LEVELS, GradientsSection, OffloadSection

SECONDS = 120.0
LOSS = 0.03  # nats between FP8 and stock BF16 in each of five steps, while the loss falls by 1.5 and more
SHARE = 0.1  # of what the loss of stock falls by, if that is less
NORM = 0.03  # of the first gradient norm; later ones are of other weights
RUNS = cover()


def name(values: Values) -> str:
    return "-".join(values.values())


def words(each: Pair) -> str:
    return " + ".join(sorted(value for _, value in each))


class Kept:
    """Results of runs that several tests compare with, by what decides them."""

    def __init__(self, ranks: RankPools) -> None:
        self.run = functools.cache(functools.partial(self._run, ranks))

    def of(self, values: Values, number: int, *, fp8: bool) -> dict[str, Any]:
        found: dict[str, Any] = self.run(tuple(values.items()), number, fp8)
        return found

    @staticmethod
    def _run(ranks: RankPools, values: tuple[tuple[str, str], ...], number: int, fp8: bool) -> dict[str, Any]:
        found: dict[str, Any] = ranks.run(number, pairs.train, dict(values), fp8, seconds=SECONDS)[0]
        return found


@pytest.fixture(scope="module")
def kept(ranks: RankPools) -> Kept:
    return Kept(ranks)


def case(values: Values) -> Any:
    """Compiling what other libraries wrap takes seconds."""
    late = values["torch"] == "compile" and values["model"] != "plain"
    return pytest.param(values, id=name(values), marks=[pytest.mark.slow] if late else [])


@pytest.mark.parametrize("values", [case(each) for each in RUNS])
def test_works(kept: Kept, values: Values) -> None:
    number, plain = pairs.ranks_of(values), pairs.plain_of(values)
    ours, stock = kept.of(values, number, fp8=True), kept.of(pairs.stock_of(values), number, fp8=False)
    bound = min(LOSS, SHARE * (stock["losses"][0] - stock["losses"][-1]))
    for step, (loss, expected) in enumerate(zip(ours["losses"], stock["losses"], strict=True)):
        assert abs(loss - expected) < bound, f"step {step}: loss {loss:.4f}, stock {expected:.4f}"
    assert ours["norms"][0] == pytest.approx(stock["norms"][0], rel=NORM)
    assert is_so(values, ours["about"])
    if plain != values:
        same = kept.of(plain, number, fp8=True)
        assert ours["losses"] == same["losses"]
        assert_same_bits(ours["weights"], same["weights"])


def is_so(values: Values, about: dict[str, Any]) -> bool:
    """Whether `describe` says of the engine what was asked for."""
    found = {
        "stage": str(about["zero_stage"]),
        "level": about["opt_level"],
        "offload": about.get("offload", "none"),
        "gradients": "FP8 sum"
        if about["autoscale"]
        else "tensor"
        if about["scaling"] == "tensor"
        else "block",
    }
    if about["nodes"] > 1:
        found["gradients"] = "two hops"
    parallel = (about["sequence_parallel_size"], about["model_parallel_size"])
    return found.items() <= values.items() and parallel == {"ALST": (2, 1), "AutoTP": (1, 2)}.get(
        values["model"], (1, 1)
    )


@pytest.mark.parametrize(
    ("each", "message"), REFUSED.items(), ids=lambda each: words(each) if isinstance(each, frozenset) else ""
)
def test_is_refused(ranks: RankPools, each: Pair, message: str) -> None:
    values = complete(each)
    assert message in ranks.run(pairs.ranks_of(values), pairs.refusal_of, values, seconds=SECONDS)[0]


# ZeRO 3 at O3 if that is not refused.
FURTHEST = "O2+" if pair("3", "O3") in REFUSED else "O3"


@pytest.mark.parametrize(
    "away", [{"stage": "3", "level": FURTHEST, "offload": "host"}, {"stage": "1", "level": "O3"}], ids=name
)
def test_resumes_across_features(ranks: RankPools, tmp_path: Path, away: Values) -> None:
    """ZeRO 2 at O2, elsewhere, and back: the loss is that of a run that stays."""
    home = complete(frozenset())
    stays = [home, home, home], [home, {**home, **away}, home]
    staying, moving = (
        ranks.run(2, pairs.resume, each, str(tmp_path / str(number)), seconds=SECONDS)[0]
        for number, each in enumerate(stays)
    )
    assert moving[:2] == staying[:2]
    for step, (loss, expected) in enumerate(zip(moving, staying, strict=True)):
        assert abs(loss - expected) < 2 * LOSS, f"step {step}: loss {loss:.4f}, without a move {expected:.4f}"


def test_no_pair_is_missing() -> None:
    """Every pair is refused or in a run, and none is both."""
    covered = set().union(*map(pairs_of, RUNS))
    assert {words(each) for each in set(every_pair()) - covered - REFUSED.keys()} == set()
    assert {words(each) for each in covered & REFUSED.keys()} == set()
    assert REFUSED.keys() <= set(every_pair())


def test_no_value_is_missing() -> None:
    """The axes have what the section and ZeRO have."""
    executors = set(get_args(OffloadSection.model_fields["executor"].annotation)) - {"auto"}
    reductions = get_args(GradientsSection.model_fields["reduction"].annotation)
    assert set(AXES["stage"]) == set(map(str, STAGES))
    assert set(AXES["level"]) == set(LEVELS)
    assert set(AXES["offload"]) == {"none", *executors}
    assert reductions == ("fp32", "fp8")
    assert set(AXES["gradients"]) == set(pairs.FP8)
