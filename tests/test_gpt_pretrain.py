"""The pretraining example on a tiny model: it learns, stops in time, resumes exactly; sizes are as named."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gpt_pretrain
import pytest
import torch
from gpt_pretrain import GPT, MODELS, build_model, cosine, parse_arguments
from ranks import RankPools

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
NAMED = {"125M": 125e6, "350M": 350e6, "1.3B": 1.3e9, "7B": 7e9, "13B": 13e9}


def pretrain(config: str, *options: str) -> dict[str, Any]:
    """The example on this rank, its figures."""
    common = ["--model", "tiny", "--micro_batch", "4", "--log_interval", "3"]
    arguments = parse_arguments([*common, "--deepspeed_config", str(CONFIGS / config), *options])
    return gpt_pretrain.run(arguments, torch.device("cpu"))


@pytest.mark.parametrize("name", NAMED)
def test_shapes_have_the_parameters_of_their_names(name: str) -> None:
    with torch.device("meta"):
        model = GPT(MODELS[name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert abs(parameters / NAMED[name] - 1) < 0.02, f"{name} has {parameters:,} parameters"


def test_model_is_born_in_its_dtype_with_smaller_residual_weights() -> None:
    model = build_model(MODELS["tiny"], {"bf16": {"enabled": True}}, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.dim() == 2:
            std = 0.01 if name.endswith(("out.weight", "down.weight")) else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert parameter.float().std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert parameter.eq(float(name.endswith("weight"))).all(), name


def test_schedule_warms_up_and_falls_to_a_tenth() -> None:
    factor = partial(cosine, steps=100, warmup=10)
    assert [factor(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert factor(55) == pytest.approx(0.55)
    assert [factor(step) for step in (100, 200)] == pytest.approx([0.1, 0.1])


def test_o2_learns_as_stock_does(ranks: RankPools) -> None:
    options = ("--steps", "60", "--warmup_steps", "5", "--lr", "3e-3")
    stock, ours = (
        ranks.run(2, pretrain, config, *options)[0] for config in ("zero2_bf16.json", "zero2_o2.json")
    )
    for run in (stock, ours):
        assert len(run["losses"]) == 60
        assert run["losses"][0] > 5.2
        assert run["losses"][-1] < 3.8
        assert run["milliseconds_per_step"] > 0
    assert abs(ours["final_loss"] - stock["final_loss"]) < 0.05
    assert abs(ours["validation_loss"] - stock["validation_loss"]) < 0.05
    assert ours["state_bytes_per_parameter"] < 7
    assert stock["state_bytes_per_parameter"] > 11


@pytest.mark.parametrize("config", ["zero2_bf16.json", "zero2_o2.json"])
def test_time_limit_saves_and_resume_goes_on_exactly(ranks: RankPools, tmp_path: Path, config: str) -> None:
    options = ("--steps", "8", "--warmup_steps", "4")
    unbroken = ranks.run(2, pretrain, config, *options)[0]
    save = ("--save", str(tmp_path))
    stopped = ranks.run(2, pretrain, config, *options, *save, "--time_limit", "0")[0]
    assert stopped["stopped_early"]
    assert stopped["losses"] == unbroken["losses"][:3], "the log interval is 3 steps"
    resumed = ranks.run(2, pretrain, config, *options, *save, "--resume")[0]
    assert not resumed["stopped_early"]
    assert resumed["first_step"] == 4
    assert resumed["losses"] == unbroken["losses"][3:]
    assert resumed["validation_loss"] == unbroken["validation_loss"]
    assert (tmp_path / "latest").read_text() == "step8"


def test_checkpoints_at_intervals(ranks: RankPools, tmp_path: Path) -> None:
    options = ("--steps", "5", "--save", str(tmp_path), "--save_interval", "2")
    found = ranks.run(1, pretrain, "zero2_bf16.json", *options)[0]
    assert {each.name for each in tmp_path.glob("step*")} == {"step2", "step4", "step5"}
    assert len(found["losses"]) == 5


def test_activation_checkpointing_changes_no_loss(ranks: RankPools) -> None:
    options = ("--steps", "4", "--context", "32")
    plain = ranks.run(1, pretrain, "zero2_bf16.json", *options)[0]
    recomputed = ranks.run(1, pretrain, "zero2_bf16.json", *options, "--activation_checkpointing")[0]
    assert plain["losses"] == recomputed["losses"]


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--resume"], "--resume needs --save"), (["--context", "4096"], "takes at most 2048")],
)
def test_refused_arguments(capsys: pytest.CaptureFixture[str], options: list[str], told: str) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--deepspeed_config", "any.json", *options])
    assert told in capsys.readouterr().err


def on_backend(backend: str) -> dict[str, Any]:
    os.environ["DS_FP8_BACKEND"] = backend
    try:
        return pretrain("zero2_o2.json", "--steps", "3", "--context", "16")
    finally:
        del os.environ["DS_FP8_BACKEND"]


@pytest.mark.slow
def test_the_interpreted_kernels_train_it_as_the_reference_does(ranks: RankPools) -> None:
    reference, triton = (ranks.run(1, on_backend, each, seconds=300)[0] for each in ("reference", "triton"))
    assert triton["losses"] == reference["losses"]
    assert triton["validation_loss"] == reference["validation_loss"]


@pytest.mark.slow
def test_runs_without_a_launcher(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    config = str(CONFIGS / "zero2_bf16.json")
    script = [str(ROOT / "examples" / "gpt_pretrain.py"), "--model", "tiny", "--deepspeed_config", config]
    unlaunched = {key: value for key, value in os.environ.items() if key not in ("RANK", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, *script, "--steps", "20", "--json", str(out)],
        env={**unlaunched, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 20/20" in done.stdout
    assert "peak GB" not in done.stdout or torch.cuda.is_available()
    figures = json.loads(out.read_text())
    assert figures["world_size"] == 1
    assert figures["losses"][-1] < figures["losses"][0]
