"""The Hugging Face Trainer with FP8: losses of BF16, resume, evaluation, export, generation."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same_bits
from hf_runs import (
    EVERYTHING,
    FP8,
    GPT2,
    LLAMA,
    assert_like_bf16,
    assert_same_run,
    ds_config,
    result_of,
    train,
    trainer_of,
)
from hf_trainer import ModelArguments
from ranks import RankPools
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from ds_fp8.hf import FP8StatsCallback

PROMPT = list(b"The ")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "seed"),
    [
        pytest.param(GPT2, 0, marks=slow),
        pytest.param(GPT2, 1, marks=slow),
        pytest.param(LLAMA, 0, marks=slow),
        pytest.param(LLAMA, 1, marks=slow),
    ],
    ids=lambda value: value.shape if isinstance(value, ModelArguments) else str(value),
)
def test_losses_equal_bf16(ranks: RankPools, tmp_path: Path, shape: ModelArguments, seed: int) -> None:
    options = {"shape": shape, "seed": seed, "max_steps": 150}
    ours, stock = (ranks.run(2, train, str(tmp_path), ds_config(fp8), options)[0] for fp8 in (FP8, None))
    assert_like_bf16(ours, stock, last=50)
    assert statistics.fmean(ours["losses"][-50:]) < ours["losses"][0] - 2, "it does not learn"


# Everything at once

WHOLE = {
    **EVERYTHING,
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the first of the checkpoints
}


def train_whole(folder: str, options: dict[str, Any], fp8: dict[str, Any] | None) -> dict[str, Any]:
    """Train with all of it, with FP8's health in TensorBoard, then generate and save."""
    config = ds_config(fp8, optimizer=options.pop("optimizer"), stage=options.pop("stage"))
    trainer = trainer_of(folder, config, **options, **WHOLE, report_to="tensorboard")
    if fp8:
        trainer.add_callback(FP8StatsCallback(trainer))
    trainer.train()
    result = result_of(trainer) | {
        "history": trainer.state.log_history,
        "best": trainer.state.best_model_checkpoint,
    }
    result["evaluated"] = trainer.evaluate()["eval_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped).eval()
    result["generated"] = generate(model)
    trainer.save_model(f"{folder}/final")
    trainer.model_wrapped.destroy()
    return result


def generate(model: Any) -> list[int]:
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    written: list[int] = tokens[0].tolist()
    return written


def assert_saved(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Plain transformers loads these bits; old ones store tied weights twice."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert_same_bits({name: state[name].view(torch.int16) for name in weights}, weights)
    if "lm_head.weight" not in weights:
        assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


@pytest.fixture(
    scope="module",
    params=[
        {"shape": GPT2, "stage": 2, "optimizer": False},
        pytest.param({"shape": LLAMA, "stage": 1, "optimizer": True}, marks=slow),
        pytest.param({"shape": LLAMA, "stage": 2, "optimizer": True}, marks=slow),
        pytest.param({"shape": GPT2, "stage": 1, "optimizer": False}, marks=slow),
    ],
    ids=lambda given: (
        f"{given['shape'].shape}-zero{given['stage']}-{'' if given['optimizer'] else 'no '}optimizer"
    ),
)
def whole(
    request: pytest.FixtureRequest, ranks: RankPools, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One training with everything, with FP8 and as stock DeepSpeed, and the folder of the former."""
    folders = [tmp_path_factory.mktemp(name) for name in ("fp8", "bf16")]
    health = {**FP8, "stats": {"interval": 5}}
    ours, stock = (
        ranks.run(2, train_whole, str(folder), request.param, fp8)[0]
        for folder, fp8 in zip(folders, (health, None), strict=True)
    )
    return {"ours": ours, "stock": stock, "folder": folders[0], "given": request.param}


class TestWhole:
    """Accumulation, clipping, schedulers, checkpointing, evaluation, the best model, generation, export."""

    def test_equals_bf16(self, whole: dict[str, Any]) -> None:
        assert_like_bf16(whole["ours"], whole["stock"], last=4)
        for ours, stock in zip(whole["ours"]["evaluations"], whole["stock"]["evaluations"], strict=True):
            assert abs(ours - stock) < 0.01
        rates = whole["ours"]["rates"]
        assert rates[0] < 5e-4, "there is no warm-up"
        assert max(rates) > 9e-4
        assert rates[-1] < 1e-4

    def test_the_best_model_is_back(self, whole: dict[str, Any]) -> None:
        best = Path(whole["ours"]["best"])
        assert best.name == "checkpoint-4"
        ours = whole["ours"]
        assert ours["evaluated"] == ours["evaluations"][0] > ours["evaluations"][2]
        assert_saved(best, ours["weights"])

    def test_the_model_loads_in_plain_transformers_and_generates(self, whole: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(whole["folder"] / "final", dtype="auto")
        assert model.dtype is torch.bfloat16
        assert_saved(whole["folder"] / "final", whole["ours"]["weights"])
        written = generate(model)
        assert written == whole["ours"]["generated"]
        assert written[: len(PROMPT)] == PROMPT
        assert len(written) > len(PROMPT)

    def test_health_is_where_report_to_says(self, whole: dict[str, Any]) -> None:
        told = {each["step"]: each for each in whole["ours"]["history"] if "fp8/gradient_underflow" in each}
        assert list(told) == [5, 10]
        assert 0 <= told[5]["fp8/gradient_underflow"] < 0.5
        assert 10 < told[10]["fp8/gradient_snr_db"] < 60
        groups = 1 if whole["given"]["optimizer"] else 2  # Trainer's own decay matrices only
        assert (f"fp8/group{groups - 1}/exp_avg_clamped" in told[5]) == (groups > 1)
        (events,) = {path.parent for path in whole["folder"].rglob("events.out.tfevents.*")}
        board = EventAccumulator(str(events)).Reload()
        scalars = {each.step: each.value for each in board.Scalars("train/fp8/gradient_snr_db")}
        assert scalars == pytest.approx({step: each["fp8/gradient_snr_db"] for step, each in told.items()})


# Resume

RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"stage": 2, "optimizer": True}, {"shape": GPT2, "gradient_accumulation_steps": 2}),
        pytest.param({"stage": 1}, {"shape": LLAMA}, marks=slow),
        pytest.param(
            {"stage": 1, "optimizer": True}, {"shape": GPT2, "lr_scheduler_type": "cosine"}, marks=slow
        ),
        pytest.param({"stage": 2}, {"shape": LLAMA, "gradient_checkpointing": True}, marks=slow),
    ],
)
def test_resume_is_the_unbroken_run(
    ranks: RankPools, tmp_path: Path, given: dict[str, Any], options: dict[str, Any]
) -> None:
    config = ds_config(FP8, **given)
    unbroken = ranks.run(2, train, str(tmp_path / "a"), config, {**options, **RESUMED})[0]
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed = ranks.run(2, train, str(tmp_path / "b"), config, {**options, **RESUMED}, checkpoint)[0]
    assert_same_run(resumed, unbroken)


def test_one_rank(ranks: RankPools, tmp_path: Path) -> None:
    results = [
        ranks.run(1, train, str(tmp_path), ds_config(fp8), {"max_steps": 10})[0] for fp8 in (FP8, None)
    ]
    assert_like_bf16(*results, last=5)
