"""LoRA adapters of PEFT, with the Trainer and in a plain accelerate loop with its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from accelerate_lora import adapted, evaluate, train
from engines import assert_same_bits, weight_bits
from hf_runs import (
    FP8,
    GPT2,
    LLAMA,
    assert_like_bf16,
    assert_same_run,
    ds_config,
    forget_accelerate,
    result_of,
    trainer_of,
)
from hf_trainer import ModelArguments, build_model, split_corpus
from peft import PeftModel
from ranks import RankPools
from torch.utils.data import DataLoader, Subset

import ds_fp8

STEPS = 30
slow = pytest.mark.slow


class Loop:
    """The example's training of an adapter, on less text."""

    def __init__(self, fp8: dict[str, Any] | None, stage: int, shape: ModelArguments) -> None:
        forget_accelerate()
        PartialState(cpu=True)
        plugin = DeepSpeedPlugin(hf_ds_config=ds_config(fp8, stage=stage))
        self.accelerator = Accelerator(mixed_precision="bf16", deepspeed_plugin=plugin)
        model = adapted(build_model(shape))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=20)
        training, evaluation = split_corpus(shape.context)
        self.model, self.optimizer, self.scheduler, self.batches, self.held_out = self.accelerator.prepare(
            model,
            optimizer,
            scheduler,
            DataLoader(Subset(training, range(STEPS * 16)), 8, shuffle=True),
            DataLoader(Subset(evaluation, range(16)), 8),
        )

    def train(self, batches: list[Any]) -> list[float]:
        return train(self.accelerator, self.model, self.optimizer, self.scheduler, batches)


def train_adapter(
    folder: str, fp8: dict[str, Any] | None, stage: int, shape: ModelArguments
) -> dict[str, Any]:
    """Train; at half time save, and after the end go on from there once more."""
    loop = Loop(fp8, stage, shape)
    batches = list(loop.batches)
    before = weight_bits(loop.model)
    evaluated = [evaluate(loop.accelerator, loop.model, loop.held_out)]
    losses = loop.train(batches[: STEPS // 2])
    loop.accelerator.save_state(f"{folder}/state")
    losses += loop.train(batches[STEPS // 2 :])
    evaluated.append(evaluate(loop.accelerator, loop.model, loop.held_out))
    weights = weight_bits(loop.model)
    if loop.accelerator.is_main_process:
        loop.accelerator.unwrap_model(loop.model).save_pretrained(f"{folder}/adapter")
    active = ds_fp8.is_active(loop.model)
    loop.model.destroy()
    resumed = Loop(fp8, stage, shape)
    resumed.accelerator.load_state(f"{folder}/state")
    again = {"losses": resumed.train(batches[STEPS // 2 :]), "weights": weight_bits(resumed.model)}
    resumed.model.destroy()
    return {
        "losses": losses,
        "evaluated": evaluated,
        "before": before,
        "weights": weights,
        "active": active,
        "resumed": again,
    }


@pytest.fixture(
    scope="module",
    params=[(2, GPT2), pytest.param((1, LLAMA), marks=slow)],
    ids=lambda given: f"{given[1].shape}-zero{given[0]}",
)
def adapters(
    request: pytest.FixtureRequest, ranks: RankPools, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("fp8", "bf16")]
    ours, stock = (
        ranks.run(2, train_adapter, folder, fp8, *request.param)[0]
        for folder, fp8 in zip(folders, (FP8, None), strict=True)
    )
    return {"ours": ours, "stock": stock, "folder": Path(folders[0]), "shape": request.param[1]}


class TestAccelerateLoRA:
    def test_equals_bf16(self, adapters: dict[str, Any]) -> None:
        ours, stock = adapters["ours"], adapters["stock"]
        assert (ours["active"], stock["active"]) == (True, False)
        for loss, expected in zip(ours["losses"], stock["losses"], strict=True):
            assert abs(loss - expected) < 0.03
        assert abs(sum(ours["losses"][-10:]) - sum(stock["losses"][-10:])) < 0.01 * 10
        assert abs(ours["evaluated"][1] - stock["evaluated"][1]) < 0.01
        assert ours["evaluated"][1] < ours["evaluated"][0] - 0.1, "it does not learn"

    def test_only_the_adapter_moves(self, adapters: dict[str, Any]) -> None:
        before, after = adapters["ours"]["before"], adapters["ours"]["weights"]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if "lora_" in name}

    def test_saves_and_loads(self, adapters: dict[str, Any]) -> None:
        base = build_model(adapters["shape"]).to(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, adapters["folder"] / "adapter", autocast_adapter_dtype=False)
        bits = {name: each.detach().view(torch.int16) for name, each in loaded.named_parameters()}
        assert_same_bits(bits, adapters["ours"]["weights"])

    def test_load_state_is_the_unbroken_run(self, adapters: dict[str, Any]) -> None:
        ours = adapters["ours"]
        assert ours["resumed"]["losses"] == ours["losses"][STEPS // 2 :]
        assert_same_bits(ours["resumed"]["weights"], ours["weights"])


def train_with_trainer(folder: str, config: dict[str, Any], resume: str | None) -> dict[str, Any]:
    model = adapted(build_model(LLAMA))
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "learning_rate": 5e-3}
    trainer = trainer_of(folder, config, model=model, **options)
    trainer.train(resume_from_checkpoint=resume)
    result = result_of(trainer)
    trainer.save_model(f"{folder}/final")
    trainer.model_wrapped.destroy()
    return result


def test_trainer(ranks: RankPools, tmp_path: Path) -> None:
    """Trains as BF16 does, resumes to the bit, and saves an adapter that loads."""
    folder = tmp_path / "fp8"
    ours = ranks.run(2, train_with_trainer, str(folder), ds_config(FP8, optimizer=True), None)[0]
    stock = ranks.run(2, train_with_trainer, str(tmp_path / "bf16"), ds_config(None, optimizer=True), None)[0]
    assert_like_bf16(ours, stock, last=6)
    checkpoint = str(folder / "checkpoint-6")
    resumed = ranks.run(
        2, train_with_trainer, str(tmp_path / "resumed"), ds_config(FP8, optimizer=True), checkpoint
    )[0]
    assert_same_run(resumed, ours)
    base = build_model(LLAMA).to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, folder / "final", autocast_adapter_dtype=False)
    bits = {name: each.detach().view(torch.int16) for name, each in loaded.named_parameters()}
    assert_same_bits(bits, ours["weights"])
