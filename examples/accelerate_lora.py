"""Adapt a language model to Python source with LoRA (PEFT), in a plain accelerate loop.

    accelerate launch --use_deepspeed --deepspeed_config_file examples/hf_o2.json --num_processes 2 \\
        -m ds_fp8 examples/accelerate_lora.py --base hf_trainer

BASE is what `hf_trainer.py` has saved, or any causal model of bytes; without it the base has random weights.
Without a GPU add `--use_cpu`, and no `--cpu` to accelerate launch. OUT holds the adapter.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from hf_trainer import ModelArguments, build_model, split_corpus
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from train_lm import leave_ranks
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed

import ds_fp8

BATCH = 8  # a rank
EVALUATED = 128  # windows


def adapted(base: nn.Module) -> Any:
    """The base, frozen, with LoRA adapters at all its linear layers."""
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, batches: Iterable[Any]
) -> list[float]:
    """A step a batch; the mean losses over ranks."""
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(mean(accelerator, loss))
    return losses


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, batches: Iterable[Any]) -> float:
    model.eval()
    losses = [model(**batch).loss for batch in batches]
    model.train()
    return mean(accelerator, torch.stack(losses).mean())


def mean(accelerator: Accelerator, value: Tensor) -> float:
    return float(accelerator.reduce(value.detach().float(), "mean"))


def main() -> None:
    arguments = parse_arguments()
    if arguments.use_cpu:
        PartialState(cpu=True)
    accelerator = Accelerator(mixed_precision="bf16")
    set_seed(arguments.seed)
    base = (
        AutoModelForCausalLM.from_pretrained(arguments.base)
        if arguments.base
        else build_model(ModelArguments(), arguments.seed)
    )
    model = adapted(base)
    training, evaluation = split_corpus(base.config.max_position_embeddings, "stdlib")
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=arguments.lr
    )
    ranks = accelerator.num_processes
    scheduler = get_cosine_schedule_with_warmup(optimizer, 10 * ranks, arguments.steps * ranks)
    model, optimizer, scheduler, batches, held_out = accelerator.prepare(
        model,
        optimizer,
        scheduler,
        DataLoader(Subset(training, range(arguments.steps * BATCH * ranks)), BATCH, shuffle=True),
        DataLoader(Subset(evaluation, range(EVALUATED)), BATCH),
    )
    before = evaluate(accelerator, model, held_out)
    losses = train(accelerator, model, optimizer, scheduler, batches)
    after = evaluate(accelerator, model, held_out)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(arguments.out)
        print(f"FP8: {'on' if ds_fp8.is_active(model) else 'off'}; {len(losses)} steps")
        print(f"evaluation loss: {before:.4f} before, {after:.4f} after; the adapter is in {arguments.out}")
    leave_ranks()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="folder of a causal model of bytes")
    parser.add_argument("--out", default="accelerate_lora", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--use_cpu", action="store_true", help="train without a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
