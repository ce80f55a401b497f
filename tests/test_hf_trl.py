"""TRL's SFTTrainer and DPOTrainer, whose reference model is an engine without an optimizer."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from engines import weight_bits
from hf_runs import (
    FP8,
    GPT2,
    LLAMA,
    assert_like_bf16,
    assert_same_run,
    ds_config,
    forget_accelerate,
    quiet,
    result_of,
)
from hf_trainer import ModelArguments, build_model
from ranks import RankPools
from train_lm import read_corpus
from transformers import ByT5Tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import ds_fp8

LENGTH = 64
slow = pytest.mark.slow


def model_of(shape: ModelArguments, seed: int = 0) -> Any:
    """The example's model with the vocabulary of a tokenizer of bytes, which needs no files."""
    model = build_model(shape, seed)
    model.resize_token_embeddings(len(ByT5Tokenizer()), mean_resizing=False)
    return model


def sentences(count: int) -> list[str]:
    text = bytes(read_corpus("topics").tolist()).decode()
    return [text[start : start + LENGTH // 2] for start in range(0, count * LENGTH, LENGTH)]


def sft(folder: str, config: dict[str, Any], shape: ModelArguments, options: dict[str, Any]) -> SFTTrainer:
    args = SFTConfig(
        **quiet(folder, deepspeed=config, bf16=True, logging_steps=1, max_length=LENGTH, **options)
    )
    return SFTTrainer(
        model=model_of(shape),
        args=args,
        train_dataset=Dataset.from_dict({"text": sentences(512)}),
        processing_class=ByT5Tokenizer(),
    )


def dpo(folder: str, config: dict[str, Any], shape: ModelArguments, options: dict[str, Any]) -> DPOTrainer:
    """Prefers prose to its reverse."""
    args = DPOConfig(
        **quiet(folder, deepspeed=config, bf16=True, logging_steps=1, max_length=LENGTH, **options)
    )
    texts = sentences(512)
    pairs = {
        "prompt": [each[:8] for each in texts],
        "chosen": [each[8:] for each in texts],
        "rejected": [each[:7:-1] for each in texts],
    }
    return DPOTrainer(
        model=model_of(shape),
        ref_model=model_of(shape),
        args=args,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=ByT5Tokenizer(),
    )


def train(
    make: Any,
    folder: str,
    config: dict[str, Any],
    shape: ModelArguments,
    options: dict[str, Any],
    resume: str | None = None,
) -> dict[str, Any]:
    forget_accelerate()
    trainer = make(folder, config, shape, options)
    reference = getattr(trainer, "ref_model", None)
    start = weight_bits(reference) if reference is not None else {}
    trainer.train(resume_from_checkpoint=resume)
    result = result_of(trainer)
    if reference is not None:
        end = weight_bits(reference)
        result["reference"] = {
            "engine": type(reference).__name__,
            "active": ds_fp8.is_active(reference),
            "moved": [name for name in start if not start[name].equal(end[name])],
        }
        reference.destroy()
    trainer.model_wrapped.destroy()
    return result


CASES = [
    pytest.param(sft, GPT2, 1e-3, {}, id="sft", marks=slow),
    pytest.param(dpo, GPT2, 1e-3, {}, id="dpo"),
    pytest.param(sft, LLAMA, 2e-3, {"stage": 1, "optimizer": True}, id="sft-optimizer", marks=slow),
    pytest.param(dpo, LLAMA, 1e-3, {"stage": 1, "optimizer": True}, id="dpo-optimizer", marks=slow),
]


@pytest.mark.parametrize(("make", "shape", "rate", "config"), CASES)
def test_equals_bf16_and_resumes(
    ranks: RankPools, tmp_path: Path, make: Any, shape: ModelArguments, rate: float, config: dict[str, Any]
) -> None:
    options = {"max_steps": 30, "learning_rate": rate, "save_strategy": "steps", "save_steps": 20}
    ours, stock = (
        ranks.run(2, train, make, str(tmp_path / name), ds_config(fp8, **config), shape, options)[0]
        for name, fp8 in (("fp8", FP8), ("bf16", None))
    )
    assert_like_bf16(ours, stock, last=10)
    assert ours["losses"][-1] < ours["losses"][0] - 0.3, "it does not learn"
    checkpoint = str(tmp_path / "fp8" / "checkpoint-20")
    resumed = ranks.run(
        2, train, make, str(tmp_path / "resumed"), ds_config(FP8, **config), shape, options, checkpoint
    )[0]
    assert_same_run(resumed, ours)
    if make is dpo:
        assert ours["reference"] == {"engine": "DeepSpeedEngine", "active": False, "moved": []}
