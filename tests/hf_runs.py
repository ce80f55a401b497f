"""Trainings with the Hugging Face Trainer; everything here runs on a rank."""

import statistics
from dataclasses import replace
from typing import Any

from accelerate.state import AcceleratorState
from engines import assert_same_bits, weight_bits
from hf_trainer import Arguments, ModelArguments, build_model, split_corpus
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer

import ds_fp8

# At half this width E4M3 first moments cost Llama 0.02 nats between steps 30 and 60, of which 150 keep 0.007.
GPT2 = ModelArguments(shape="gpt2", layers=2, width=128, heads=4, context=64)
LLAMA = replace(GPT2, shape="llama")
FP8 = {"enabled": True, "opt_level": "O2"}
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")
LOSS_BOUND = 0.01
NORM_BOUND = 0.02
EVERYTHING = {  # of the Trainer at once
    "max_steps": 12,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
    "max_grad_norm": 0.5,
    "gradient_checkpointing": True,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
}


def ds_config(
    fp8: dict[str, Any] | None, *, stage: int = 2, optimizer: bool = False, **other: Any
) -> dict[str, Any]:
    """A ds_config as users of the Trainer write it; without `fp8`, stock DeepSpeed."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
        **other,
    }
    if optimizer:
        params: dict[str, Any] = dict.fromkeys(HYPERPARAMETERS, "auto")
        config["optimizer"] = {"type": "AdamW", "params": params | ({} if fp8 else {"torch_adam": True})}
    if fp8 is not None:
        config["fp8"] = fp8
    return config


def forget_accelerate() -> None:
    """Before another trainer, accelerator or set of arguments in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def quiet(folder: str, **options: Any) -> dict[str, Any]:
    """Options of TrainingArguments for a CPU, without output."""
    defaults = {"per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "log_level": "error"}
    return {"output_dir": folder, **defaults, **options}


def trainer_of(
    folder: str,
    config: dict[str, Any] | None,
    *,
    shape: ModelArguments = GPT2,
    model: nn.Module | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of the example's model and text. trainer: its own options; options: of TrainingArguments."""
    forget_accelerate()
    args = Arguments(**quiet(folder, deepspeed=config, **options))
    training, evaluation = split_corpus(shape.context)
    return Trainer(
        model=model or build_model(shape, args.seed),
        args=args,
        train_dataset=training,
        eval_dataset=Subset(evaluation, range(16)),
        **(trainer or {}),
    )


def result_of(trainer: Trainer) -> dict[str, Any]:
    """What a training has come to, detached from it."""

    def told(key: str) -> list[float]:
        return [each[key] for each in trainer.state.log_history if key in each]

    return {
        "losses": told("loss"),
        "norms": told("grad_norm"),
        "rates": told("learning_rate"),
        "evaluations": told("eval_loss"),
        "weights": weight_bits(trainer.model_wrapped),
        "active": ds_fp8.is_active(trainer.model_wrapped),
    }


def train(
    folder: str, config: dict[str, Any] | None, options: dict[str, Any], resume: str | None = None
) -> dict[str, Any]:
    """A whole training. options: of `trainer_of`."""
    trainer = trainer_of(folder, config, **options)
    trainer.train(resume_from_checkpoint=resume)
    result = result_of(trainer)
    trainer.model_wrapped.destroy()
    return result


def assert_like_bf16(ours: dict[str, Any], stock: dict[str, Any], last: int) -> None:
    """The mean of the last losses, and the gradient norms of the first 10 steps."""
    assert ours["active"]
    assert not stock["active"]
    losses = [statistics.fmean(run["losses"][-last:]) for run in (ours, stock)]
    assert abs(losses[0] - losses[1]) < LOSS_BOUND, f"losses {losses[0]:.4f} and {losses[1]:.4f}"
    for step, (norm, expected) in enumerate(zip(ours["norms"][:10], stock["norms"][:10], strict=True)):
        assert abs(norm / expected - 1) < NORM_BOUND, f"step {step}: norm {norm:.4f} and {expected:.4f}"
    assert ours["rates"] == stock["rates"]


def assert_same_run(resumed: dict[str, Any], unbroken: dict[str, Any]) -> None:
    """The log, which a resumed run carries on, and the bits of the weights."""
    for key in ("losses", "norms", "rates"):
        assert resumed[key] == unbroken[key], key
    assert_same_bits(resumed["weights"], unbroken["weights"])
