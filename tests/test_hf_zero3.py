"""Hugging Face's tools with ZeRO 3, whose models are made under zero.Init: beside stock ZeRO 3."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from accelerate_lora import adapted, train
from datasets import Dataset
from deepspeed import comm as dist
from engines import assert_same_bits, weight_bits
from hf_runs import (
    EVERYTHING,
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
from hf_trainer import Arguments, ModelArguments, model_of, split_corpus
from peft import PeftModel
from ranks import RankPools
from test_hf_trl import LENGTH, sentences
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, ByT5Tokenizer, Trainer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.models.utils import unwrap_model_for_generation

import ds_fp8

PROMPT = torch.tensor([list(b"The ")])
AUTO = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
ZERO = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
    **dict.fromkeys(AUTO, "auto"),
}
slow = pytest.mark.slow


def config_of(fp8: dict[str, Any] | None, *, optimizer: bool = False) -> dict[str, Any]:
    """As Hugging Face's documentation has it for ZeRO 3."""
    return {**ds_config(fp8, optimizer=optimizer), "zero_optimization": dict(ZERO)}


def made(shape: ModelArguments, tokens: int | None = None) -> Any:
    """The example's model as AutoModel makes it, under zero.Init if there are arguments for ZeRO 3."""
    config = model_of(shape).config
    set_seed(0)
    config.vocab_size = tokens or config.vocab_size
    return AutoModelForCausalLM.from_config(config)


def trainer_of(
    folder: str, config: dict[str, Any], shape: ModelArguments, wrap: Callable[[Any], Any], **options: Any
) -> Trainer:
    forget_accelerate()
    arguments = Arguments(**quiet(folder, deepspeed=config, **options))
    model = wrap(made(shape))
    assert all(hasattr(each, "ds_id") for name, each in model.named_parameters() if "lora" not in name)
    training, evaluation = split_corpus(shape.context)
    return Trainer(model, arguments, train_dataset=training, eval_dataset=Subset(evaluation, range(16)))


def itself(model: Any) -> Any:
    return model


def generate(trainer: Trainer) -> list[int]:
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped).eval()
    written = model.generate(PROMPT, max_new_tokens=8, do_sample=False, synced_gpus=True)[0].tolist()
    model.train()
    return list(written)


class Generating(TrainerCallback):
    """Generates after each evaluation."""

    def __init__(self) -> None:
        self.written: list[list[int]] = []
        self.trainer: Trainer | None = None

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        self.written.append(generate(self.trainer))


# Everything at once

WHOLE = {**EVERYTHING, "save_steps": 6}


def train_whole(
    folder: str, fp8: dict[str, Any] | None, shape: ModelArguments, resume: str | None = None
) -> dict[str, Any]:
    generating = Generating()
    trainer = trainer_of(folder, config_of(fp8, optimizer=shape is LLAMA), shape, itself, **WHOLE)
    generating.trainer = trainer
    trainer.add_callback(generating)
    trainer.train(resume_from_checkpoint=resume)
    result = result_of(trainer) | {"written": generating.written}
    trainer.save_model(f"{folder}/final")
    trainer.model_wrapped.destroy()
    return result


# accelerate: makes the model before it fills in what is "auto"


def accelerated_losses(fp8: dict[str, Any] | None, sections: bool) -> list[float]:
    """sections: optimizer and scheduler are the config's, "auto" where accelerate fills in."""
    forget_accelerate()
    PartialState(cpu=True)
    config = config_of(fp8)
    if sections:
        params = {"lr": "auto", "weight_decay": "auto", "betas": [0.9, 0.95], "eps": 1e-8}
        config["optimizer"] = {"type": "AdamW", "params": params | ({} if fp8 else {"torch_adam": True})}
        rates = {"warmup_min_lr": 0.0, "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
        config["scheduler"] = {"type": "WarmupDecayLR", "params": {**rates, "total_num_steps": "auto"}}
    accelerator = Accelerator(mixed_precision="bf16", deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = made(LLAMA)
    assert all(hasattr(each, "ds_id") for each in model.parameters())
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer)
    if sections:
        optimizer = DummyOptim(model.parameters(), lr=1e-3, weight_decay=0.01)
        scheduler = DummyScheduler(optimizer, total_num_steps=8, warmup_num_steps=2)
    batches = DataLoader(Subset(split_corpus(LLAMA.context)[0], range(4 * 16)), 8)
    engine, optimizer, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, batches)
    losses = train(accelerator, engine, optimizer, scheduler, batches)
    assert ds_fp8.is_active(engine) is bool(fp8)
    engine.destroy()
    return losses


@pytest.mark.parametrize("sections", [False, True], ids=["client", "sections"])
def test_accelerate_fills_in_after_the_model_is_made(ranks: RankPools, sections: bool) -> None:
    ours, stock = (ranks.run(2, accelerated_losses, fp8, sections)[0] for fp8 in (FP8, None))
    assert len(ours) == 4
    for loss, expected in zip(ours, stock, strict=True):
        assert abs(loss - expected) < 0.01


def refusal_of_auto() -> str:
    """What an engine says to a key that nothing has filled in; zero.Init took it."""
    config = {**config_of(FP8), "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    config["gradient_accumulation_steps"] = 1
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="gradient_clipping") as refused:
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return str(refused.value)


def test_an_engine_refuses_what_is_not_filled_in(ranks: RankPools) -> None:
    assert (
        ranks.run(2, refusal_of_auto)
        == ['gradient_clipping: received "auto", allowed: a number, 0 or more'] * 2
    )


O3 = {"enabled": True, "opt_level": "O3", "weights": {"min_elements": 4096}}


@pytest.mark.parametrize(
    ("shape", "section"),
    [(LLAMA, FP8), pytest.param(GPT2, FP8, marks=slow), pytest.param(LLAMA, O3, marks=slow)],
    ids=["llama", "gpt2", "llama-o3"],
)
def test_trainer(ranks: RankPools, tmp_path: Path, shape: ModelArguments, section: dict[str, Any]) -> None:
    """Trains, evaluates, generates, saves what plain transformers loads, and resumes to the bit."""
    ours, stock = (
        ranks.run(2, train_whole, str(tmp_path / name), fp8, shape)[0]
        for name, fp8 in (("fp8", section), ("bf16", None))
    )
    assert_like_bf16(ours, stock, last=4)
    for mine, theirs in zip(ours["evaluations"], stock["evaluations"], strict=True):
        assert abs(mine - theirs) < 0.01
    assert [len(each) for each in ours["written"]] == [12, 12, 12]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8" / "final", dtype="auto")
    bits = {name: each.detach().view(torch.int16) for name, each in saved.named_parameters()}
    assert_same_bits(bits, ours["weights"])
    checkpoint = str(tmp_path / "fp8" / "checkpoint-6")
    resumed = ranks.run(2, train_whole, str(tmp_path / "again"), section, shape, checkpoint)[0]
    assert_same_run(resumed, ours)


def train_adapter(folder: str, fp8: dict[str, Any] | None) -> dict[str, Any]:
    trainer = trainer_of(folder, config_of(fp8), LLAMA, adapted, max_steps=12, learning_rate=5e-3)
    trainer.train()
    result = result_of(trainer)
    trainer.save_model(f"{folder}/final")
    trainer.model_wrapped.destroy()
    return result


def load_adapter(folder: str) -> dict[str, torch.Tensor]:
    forget_accelerate()
    Arguments(**quiet(folder, deepspeed=config_of(FP8)))
    return weight_bits_of(PeftModel.from_pretrained(made(LLAMA), folder, autocast_adapter_dtype=False))


def weight_bits_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: bits for name, bits in weight_bits(Holder(model)).items() if "lora" in name}


class Holder:
    """What has a module, as an engine has."""

    def __init__(self, module: Any) -> None:
        self.module = module


@pytest.mark.slow
def test_lora(ranks: RankPools, tmp_path: Path) -> None:
    """Adapters that are made after zero.Init."""
    ours, stock = (
        ranks.run(2, train_adapter, str(tmp_path / name), fp8)[0]
        for name, fp8 in (("fp8", FP8), ("bf16", None))
    )
    assert_like_bf16(ours, stock, last=6)
    loaded = ranks.run(2, load_adapter, str(tmp_path / "fp8" / "final"))[0]
    assert_same_bits(loaded, {name: ours["weights"][name] for name in loaded})
    assert loaded


# TRL


def sft(folder: str, config: dict[str, Any], options: dict[str, Any]) -> SFTTrainer:
    args = SFTConfig(**quiet(folder, deepspeed=config, bf16=True, max_length=LENGTH, **options))
    return SFTTrainer(
        model=made(LLAMA, len(ByT5Tokenizer())),
        args=args,
        train_dataset=Dataset.from_dict({"text": sentences(256)}),
        processing_class=ByT5Tokenizer(),
    )


def dpo(folder: str, config: dict[str, Any], options: dict[str, Any]) -> DPOTrainer:
    """Its reference model is an engine of ZeRO 3 without an optimizer."""
    args = DPOConfig(**quiet(folder, deepspeed=config, bf16=True, max_length=LENGTH, **options))
    texts = sentences(256)
    pairs = {
        "prompt": [each[:8] for each in texts],
        "chosen": [each[8:] for each in texts],
        "rejected": [each[:7:-1] for each in texts],
    }
    return DPOTrainer(
        model=made(LLAMA, len(ByT5Tokenizer())),
        ref_model=made(LLAMA, len(ByT5Tokenizer())),
        args=args,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=ByT5Tokenizer(),
    )


def train_trl(make: Any, folder: str, fp8: dict[str, Any] | None) -> dict[str, Any]:
    """Generate before some steps, as TRL does: without DeepSpeed's hooks, which come back."""
    forget_accelerate()
    options = {"max_steps": 12, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    trainer = make(folder, config_of(fp8), {**options, "report_to": "none"})
    reference = getattr(trainer, "ref_model", None)
    start = weight_bits(reference) if reference is not None else {}
    step, written = trainer.training_step, []

    def with_generation(*arguments: Any, **others: Any) -> Any:
        if trainer.state.global_step in (3, 4, 7):
            with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
                written.append(model.generate(PROMPT, max_new_tokens=6, do_sample=False)[0].tolist())
        return step(*arguments, **others)

    trainer.training_step = with_generation
    trainer.train()
    result = result_of(trainer) | {"written": len(written)}
    if reference is not None:
        end = weight_bits(reference)
        moved = [name for name in start if not start[name].equal(end[name])]
        result["reference"] = {"active": ds_fp8.is_active(reference), "moved": moved}
        reference.destroy()
    trainer.model_wrapped.destroy()
    assert dist.get_world_size() == 2
    return result


@pytest.mark.slow
@pytest.mark.parametrize("make", [sft, dpo])
def test_trl(ranks: RankPools, tmp_path: Path, make: Any) -> None:
    ours, stock = (
        ranks.run(2, train_trl, make, str(tmp_path / name), fp8)[0]
        for name, fp8 in (("fp8", FP8), ("bf16", None))
    )
    assert_like_bf16(ours, stock, last=4)
    assert ours["written"] == 3
    if make is dpo:
        assert ours["reference"] == {"active": False, "moved": []}
