"""Train a small GPT-2 or Llama, from random weights, with the Hugging Face Trainer.

    deepspeed --num_gpus 2 --module ds_fp8 examples/hf_trainer.py --deepspeed examples/hf_o2.json
    deepspeed --num_gpus 2 examples/hf_trainer.py --deepspeed examples/hf_bf16.json

The text is the documentation that every Python carries. Without a GPU add `--use_cpu`. The script knows
nothing of FP8 but the callback that logs its health. `--float8_linear True` adds torchao's FP8 matrix
products. At the end rank 0 prints the mean of the last 50 losses; OUTPUT_DIR holds the model, for
`from_pretrained`.
"""

import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset
from train_lm import VOCABULARY, leave_ranks, read_corpus
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ds_fp8.hf import FP8StatsCallback


@dataclass(frozen=True)
class ModelArguments:
    """The model, from a config."""

    shape: str = field(default="gpt2", metadata={"choices": ["gpt2", "llama"]})
    layers: int = 3
    width: int = 128
    heads: int = 4
    context: int = 96
    float8_linear: bool = field(default=False, metadata={"help": "torchao's FP8 linear layers (llama)"})


@dataclass
class Arguments(TrainingArguments):
    """The Trainer's own, with defaults for this model."""

    output_dir: str = "hf_trainer"
    learning_rate: float = 1e-3
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    max_steps: int = 300
    logging_steps: float = 1
    bf16: bool = True
    save_strategy: str = "no"
    report_to: str = "none"


def build_model(arguments: ModelArguments, seed: int = 0) -> PreTrainedModel:
    set_seed(seed)
    model = model_of(arguments)
    return with_float8_linear(model) if arguments.float8_linear else model


def model_of(arguments: ModelArguments) -> PreTrainedModel:
    if arguments.shape == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_layer=arguments.layers,
                n_embd=arguments.width,
                n_head=arguments.heads,
                n_positions=arguments.context,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=arguments.layers,
            hidden_size=arguments.width,
            intermediate_size=3 * arguments.width,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.heads // 2,
            max_position_embeddings=arguments.context,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def with_float8_linear(model: PreTrainedModel) -> PreTrainedModel:
    """FP8 matrix products beside FP8 states; computed in higher precision on hardware without them."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    emulated = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=emulated),
        module_filter_fn=lambda _, name: not name.endswith("lm_head"),
    )
    return model


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a text, its bytes as tokens."""

    def __init__(self, text: Tensor, context: int) -> None:
        self._windows = text[: len(text) // context * context].view(-1, context).long()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self._windows[index]
        return {"input_ids": window, "labels": window}


def split_corpus(context: int, name: str = "topics") -> tuple[Windows, Windows]:
    """For training, and the last tenth for evaluation."""
    text = read_corpus(name)
    cut = len(text) * 9 // 10
    return Windows(text[:cut], context), Windows(text[cut:], context)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, Arguments))  # type: ignore[arg-type]
    model_arguments, arguments = parser.parse_args_into_dataclasses()
    training, evaluation = split_corpus(model_arguments.context)
    trainer = Trainer(
        model=build_model(model_arguments, arguments.seed),
        args=arguments,
        train_dataset=training,
        eval_dataset=evaluation,
    )
    if arguments.deepspeed_plugin.hf_ds_config.get_value("fp8.stats.interval"):
        trainer.add_callback(FP8StatsCallback(trainer))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    evaluated = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        print(f"loss, mean of the last 50 steps: {statistics.fmean(losses[-50:]):.4f}")
        print(f"evaluation loss: {evaluated['eval_loss']:.4f}; the model is in {arguments.output_dir}")
    leave_ranks()


if __name__ == "__main__":
    main()
