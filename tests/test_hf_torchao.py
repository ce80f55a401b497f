"""FP8 matrix products of torchao beside FP8 states and communication."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import AORecipeKwargs, DeepSpeedPlugin
from engines import assert_same_bits
from hf_runs import FP8, LLAMA, assert_like_bf16, ds_config, forget_accelerate, result_of, train, trainer_of
from hf_trainer import build_model, split_corpus
from ranks import RankPools
from torch.utils.data import DataLoader, Subset
from torchao.float8 import Float8LinearConfig
from transformers import AutoModelForCausalLM

import ds_fp8

FLOAT8 = replace(LLAMA, float8_linear=True)
OPTIONS = {"shape": FLOAT8, "max_steps": 30}


def train_and_save(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    trainer = trainer_of(folder, config, **OPTIONS)
    trainer.train()
    trainer.save_model(f"{folder}/final")
    result = result_of(trainer)
    result["layers"] = [type(each).__name__ for each in trainer.model_wrapped.module.modules()]
    trainer.model_wrapped.destroy()
    return result


@pytest.mark.parametrize("level", ["O2", pytest.param("O2+", marks=pytest.mark.slow)])
def test_equals_torchao_with_bf16_states(ranks: RankPools, tmp_path: Path, level: str) -> None:
    ours = ranks.run(2, train_and_save, str(tmp_path), ds_config({"enabled": True, "opt_level": level}))[0]
    assert ours["layers"].count("Float8Linear") == 7 * LLAMA.layers
    stock = ranks.run(2, train, str(tmp_path), ds_config(None), OPTIONS)[0]
    assert_like_bf16(ours, stock, last=10)
    assert ours["losses"][-1] < ours["losses"][0] - 1, "it does not learn"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    bits = {name: each.detach().view(torch.int16) for name, each in model.named_parameters()}
    assert_same_bits(bits, ours["weights"])
    without = ranks.run(
        2, train, str(tmp_path), ds_config(None), {**OPTIONS, "shape": LLAMA, "max_steps": 1}
    )[0]
    assert without["losses"][0] != stock["losses"][0], "torchao computes nothing in FP8"


def train_with_accelerate() -> dict[str, Any]:
    """accelerate's own way: mixed_precision fp8 converts the model while it is prepared."""
    forget_accelerate()
    PartialState(cpu=True)
    accelerator = Accelerator(
        mixed_precision="fp8",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config(FP8)),
        kwargs_handlers=[AORecipeKwargs(config=Float8LinearConfig(emulate=True))],
    )
    model = build_model(LLAMA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = DataLoader(Subset(split_corpus(LLAMA.context)[0], range(10 * 16)), 8)
    engine, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for batch in batches:
        loss = engine(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    layers = [type(each).__name__ for each in engine.module.modules()]
    dtypes = {each.dtype for each in engine.module.parameters()}
    active = ds_fp8.is_active(engine)
    engine.destroy()
    return {"losses": losses, "layers": layers, "dtypes": dtypes, "active": active}


def test_accelerate_mixed_precision_fp8(ranks: RankPools) -> None:
    found = ranks.run(2, train_with_accelerate)[0]
    assert found["active"]
    assert "Float8Linear" in found["layers"]
    assert found["dtypes"] == {torch.bfloat16}
    assert found["losses"][-1] < found["losses"][0] - 0.3
