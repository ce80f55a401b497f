"""precision.py, first_steps.py, update_error.py: what they measure with, and that a killed study goes on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ds_fp8.ops.formats import E4M3

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import o3_casts  # noqa: E402
import o3_losses  # noqa: E402
import precision  # noqa: E402
import precision_report  # noqa: E402
import recipes as recipes_of  # noqa: E402
import update_error  # noqa: E402
from claims import Claim, print_claims  # noqa: E402
from regimes import REGIMES, gradients  # noqa: E402
from simulated import MixedPrecision, RoundedAdamW, round_tensor  # noqa: E402

QUIET = Console(file=open("/dev/null", "w"))  # noqa: SIM115


def quick(script: str, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_update_error(tmp_path: Path) -> None:
    result, printed = quick("update_error.py", tmp_path / "update_error.json")
    errors = {
        (row["name"], row["clamp"]): [each["error"] for each in row["regimes"].values()]
        for row in result["rows"]
    }
    assert max(errors["fp32, fp32", True]) < 1e-6
    assert min(errors["e4m3, fp16", True]) > 0.01
    assert errors["O2+", True] == errors["int8, ue4m4", True]  # a split16 master is an FP32 one
    assert max(errors["O2, bf16 master", True]) > max(errors["O2", True])
    assert {each.name for each in update_error.PEERS} <= {name for name, _ in errors} | {*result["not_run"]}
    assert len(result["claims"]) == 22
    assert all(name in printed for name in (*REGIMES, "O2+, slow: error", "claims"))


@pytest.mark.slow
def test_studies_of_o3(tmp_path: Path) -> None:
    losses, printed = quick("o3_losses.py", tmp_path / "losses.json")
    assert {name: len(seeds) for name, seeds in losses["runs"]["training"].items()} == {
        "stock BF16": 2,
        "O2": 2,
        "O3": 2,
    }
    assert [each["step"] for each in losses["health"]["1"]] == [1, 4]
    assert losses["health"]["0"][1]["total"]["x_saturated"] > 0
    assert "nats per byte from stock BF16" in printed
    again, printed = quick("o3_losses.py", tmp_path / "losses.json")
    assert again["runs"] == losses["runs"]
    assert "seed 0, O3" not in printed, "a study that was killed goes on"
    casts, printed = quick("o3_casts.py", tmp_path / "casts.json")
    assert len(casts["rows"]) == 2 * 2 * 5
    assert all(claim["holds"] for claim in casts["claims"])
    assert "dy columns" in printed


def test_shares_of_a_cast() -> None:
    """Two blocks with scales of 1 and 2^-7: 2^-11 becomes zero, 440 becomes 448, 0 does not count."""
    values = torch.zeros(1, 256, dtype=torch.bfloat16)
    values[0, :4] = torch.tensor([400.0, 440.0, 2.0**-11, 0.0])
    values[0, 128] = 3.0
    found = o3_casts.of_input(values)
    assert found["x rows"] == {"underflow": 1 / 4, "saturated": 1 / 4, "amax_spread": 7.0}
    assert found["x tiles"]["amax_spread"] == 7.0
    columns = {"underflow": 0.0, "saturated": 1 / 4, "amax_spread": 19.0}  # 400 and 440: 1; 2^-11: 2^-19
    assert o3_casts.of_gradient(values)["dy columns"] == columns
    zeros = o3_casts.of_input(torch.zeros(1, 16, dtype=torch.bfloat16))
    assert zeros["x rows"] == dict.fromkeys(o3_casts.FIGURES, 0.0)


def test_o3_is_paired_with_stock() -> None:
    runs = {
        name: {str(seed): {"training": 2.0 + seed, "validation": 1.0 + seed + more} for seed in range(3)}
        for name, more in (("stock BF16", 0.0), ("O3", 0.25))
    }
    found = o3_losses.pairs(runs)
    assert {key: (each.mean, each.standard_error, each.spread) for key, each in found.items()} == {
        ("O3", "training"): (0.0, 0.0, 1.0),
        ("O3", "validation"): (0.25, 0.0, 1.0),
    }


def test_gradients_of_a_regime() -> None:
    stress = list(gradients(REGIMES["stress"], 64, seed=0))
    assert len(stress) == 200
    never = torch.stack(stress[:3]).eq(0).all(dim=0)
    assert never.float().mean() == pytest.approx(0.05, abs=0.01)
    size = torch.stack(stress).square().mean(dim=0)[~never].sqrt().log()
    assert size.std() == pytest.approx((1 + 1.5**2) ** 0.5, rel=0.15)  # of 64 rows
    assert all(torch.equal(*pair) for pair in zip(stress, gradients(REGIMES["stress"], 64, 0), strict=True))


def test_states_of_one_scale_a_tensor() -> None:
    values = torch.tensor([448.0, 1.06, -300.0, 0.4, 0.0])  # scale 1: codes 1 and 1.125, 288 and 320
    round_tensor(values, E4M3)
    assert values.tolist() == [448.0, 1.0, -288.0, 0.40625, 0.0]
    weights = [torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(1))) for _ in "ab"]
    exact, rounded = torch.optim.AdamW(weights[:1]), RoundedAdamW(weights[1:], exp_avg_sq=E4M3)
    for optimizer, weight in ((exact, weights[0]), (rounded, weights[1])):
        weight.grad = weight.detach() ** 3
        optimizer.step()
    assert torch.equal(*weights)  # the first step is taken before anything is stored
    states = exact.state[weights[0]], rounded.state[weights[1]]
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    round_tensor(states[0]["exp_avg_sq"], E4M3)
    assert torch.equal(states[0]["exp_avg_sq"], states[1]["exp_avg_sq"])


def test_a_bf16_model_follows_its_fp32_masters() -> None:
    model = torch.nn.Linear(4, 4)
    engine = MixedPrecision(model, lambda masters: torch.optim.SGD(masters, lr=1e-3), clipping=1e-3)
    before = [weight.detach().clone() for weight in model.parameters()]
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16)).float().sum() * 1e6)
        engine.step()
    masters = engine.optimizer.param_groups[0]["params"]
    for weight, master, old in zip(model.parameters(), masters, before, strict=True):
        assert torch.equal(weight, master.to(torch.bfloat16))
        moved = (master - old.float()).norm()
        assert 0 < moved <= 3e-6 * (1 + 1e-3)  # rate times clipping, three times


def test_what_does_not_hold_is_said() -> None:
    wide = Console(width=132, record=True, file=QUIET.file)
    print_claims([Claim.below("error", 0.5, 0.4), Claim.at_most("loss", 0.5, 0.5)], wide)
    lines = wide.export_text().splitlines()
    assert any("error" in line and "0.5000" in line and "not reproduced here" in line for line in lines)
    assert any("loss" in line and "holds" in line and "not reproduced" not in line for line in lines)


@pytest.mark.parametrize(
    ("square", "close"), [([0.02, 0.02, 0.02], True), ([0.1, -0.01, -0.02], False), ([0.0, 0.0, 0.01], False)]
)
def test_seeds_that_contradict_each_other_prove_nothing(square: list[float], close: bool) -> None:
    def results(*validation: float) -> precision_report.Results:
        figures = {"before": 3.0, "training": 1.0}
        return {f"{seed}": {**figures, "validation": 2 + each} for seed, each in enumerate(validation)}

    zeros, held = results(0, 0, 0), results(0.004, 0.004, 0.004)
    runs = {stage: dict.fromkeys(recipes_of.RECIPES, zeros) for stage in precision.STAGES}
    runs["training"] |= {
        recipes_of.FP8_SQUARE: results(*square),
        recipes_of.O2: held,
        recipes_of.PLUS: results(0.009, -0.009, 0.009),
    }
    runs["fine-tuning"][recipes_of.FP8_MASTER] = results(0.4, 0.6, 0.2)
    runs["fine-tuning"][recipes_of.O1] = results(0.008, 0.008, 0.008)
    rows = precision_report.summarise(runs)
    claims = {each.text: each.holds for each in precision_report.judge(rows, 0.005)}
    assert claims.pop(f"{recipes_of.PLUS}: mean difference to FP32") is False
    assert claims.pop(f"{recipes_of.O1}: of FP32's improvement at a rate of 1e-05") is False
    assert claims.pop(f"{recipes_of.FP8_SQUARE}: worse than FP32 by") is close
    assert claims.pop(f"{recipes_of.FP8_MASTER}: of FP32's improvement at a rate of 1e-05") is False
    assert len(claims) == 8
    assert all(claims.values())
    assert precision_report.judge([row for row in rows if row["recipe"] == recipes_of.FP32], 0.005) == []
    master = next(each for each in rows if "kept" in each and each["recipe"] == recipes_of.FP8_MASTER)
    assert master["kept"] == pytest.approx(0.6)


def test_first_steps(tmp_path: Path) -> None:
    """One seed: not late, where exp_avg to nearest in E4M3 is."""
    result, printed = quick("first_steps.py", tmp_path / "first_steps.json")
    means = {(row["name"], row["gradients"]): row["mean"] for row in result["rows"]}
    for (name, gradients_are), mean in means.items():
        if "e4m3" in name:
            assert mean > 0.003
        else:
            assert abs(mean) < 0.003, (name, gradients_are)
    assert "nats above FP32 moments" in printed


@pytest.mark.slow
def test_precision(tmp_path: Path) -> None:
    result, printed = quick("precision.py", tmp_path / "precision.json")
    rows = {(row["stage"], row["recipe"]): row for row in result["rows"]}
    assert {*rows} == {(stage, name) for stage in precision.STAGES for name in recipes_of.RECIPES}
    for stage in precision.STAGES:
        assert rows[stage, recipes_of.FP32]["difference"] == 0
        bf16, o1 = (rows[stage, name]["validation"] for name in ("#1 BF16", "O1"))
        assert o1 == pytest.approx(bf16, abs=1e-3)
    assert rows["fine-tuning", recipes_of.FP32]["kept"] == 1
    assert abs(rows["training", recipes_of.FP8_MASTER]["difference"]) > 5e-3
    assert len(result["claims"]) == 2 * len(recipes_of.LEVELS) + 2
    assert all(name in printed for name in recipes_of.RECIPES)


@pytest.mark.slow
def test_several_runs_at_once(tmp_path: Path) -> None:
    """The same losses as one after the other, in the same file."""
    recipes = ["--recipes", recipes_of.FP32, recipes_of.PLUS]
    together, _ = quick("precision_parallel.py", tmp_path / "a.json", "--at_once", "2", *recipes)
    apart, _ = quick("precision.py", tmp_path / "b.json", *recipes)
    assert together["rows"] == apart["rows"]
    assert len(together["claims"]) == 2


class KilledError(Exception):
    """As a study is."""


def fake_run(calls: list[tuple[str, int]], stop: int) -> Any:
    def run(job: precision.Job, size: Any, weights: Path) -> dict[str, float]:
        if len(calls) == stop:
            raise KilledError
        calls.append((job.stage, job.seed))
        if (job.stage, job.recipe) == ("training", recipes_of.FP32):
            torch.save({}, weights)
        return {"before": 2.0, "training": 1.0, "validation": 1.0 + len(calls), "seconds": 0.0}

    return run


def flat(runs: precision_report.Runs) -> dict[tuple[str, str, str], dict[str, float]]:
    return {
        (stage, name, seed): figures
        for stage, by_recipe in runs.items()
        for name, by_seed in by_recipe.items()
        for seed, figures in by_seed.items()
    }


def test_a_killed_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls, size = tmp_path / "precision.json", [], precision.SIZES["tiny"]
    settings = {"steps": 4}
    runs = len(recipes_of.RECIPES) * len(precision.STAGES) * 2
    monkeypatch.setattr(precision, "run", fake_run(calls, stop=20))
    with pytest.raises(KilledError):
        precision.study(out, precision.resumed(out, settings), size, 2, recipes_of.RECIPES, QUIET)
    kept = flat(precision.resumed(out, settings)["runs"])
    assert len(kept) == 20
    monkeypatch.setattr(precision, "run", fake_run(calls, stop=runs))
    precision.study(out, precision.resumed(out, settings), size, 2, recipes_of.RECIPES, QUIET)
    assert len(calls) == runs
    found = flat(precision.resumed(out, settings)["runs"])
    assert {each["validation"] for each in found.values()} == {1.0 + number for number in range(1, runs + 1)}
    assert kept.items() <= found.items()
    with pytest.raises(ValueError, match="with steps 4, allowed: 600, or another file"):
        precision.resumed(out, {"steps": 600})


def test_fp32_is_trained_again_if_its_weights_are_gone_and_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, size = tmp_path / "precision.json", [], precision.SIZES["tiny"]
    monkeypatch.setattr(precision, "run", fake_run(calls, stop=100))
    few = [recipes_of.FP32, recipes_of.O2]
    precision.study(out, precision.resumed(out, {}), size, 1, few, QUIET)
    (tmp_path / "precision_seed0.pt").unlink()
    calls.clear()
    precision.study(out, precision.resumed(out, {}), size, 1, few, QUIET)
    assert calls == []
    precision.study(out, precision.resumed(out, {}), size, 1, [*few, recipes_of.PLUS], QUIET)
    assert calls == [("training", 0), ("training", 0), ("fine-tuning", 0)]
