"""LoRA over a base whose matrices are FP8 codes: `fp8.weights.frozen` e4m3."""

import logging
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed import comm as dist
from engines import Lines, build, ds_config
from fp8_weights import EMULATED, fp8_parameters
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import RankPools
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.kernels import REFERENCE
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.weights.frozen import FrozenWeights

MATRICES = 10  # keys and values have 72 rows
FROZEN = {"opt_level": "O2", "weights": {"frozen": "e4m3", "min_elements": 4096}}
AT_O3 = {**FROZEN, "opt_level": "O3", "checkpoint": {"weights": "masters"}}  # none trains, none has a master
BF16 = {"opt_level": "O2"}


def lora() -> Any:
    """A Llama with adapters that are too small to be FP8."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 144, "intermediate_size": 272, "num_hidden_layers": 2, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).bfloat16()
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    return get_peft_model(model, adapters)


def engine_of(fp8: dict[str, Any], stage: int = 2, model: Any = None) -> Any:
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        return build(ds_config(fp8, stage=stage, lr=1e-2), lora() if model is None else model)


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    """Mean losses over the ranks, of rows that count on from a random byte."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        tokens = (torch.randint(256, (4, 1), generator=generator) + torch.arange(17)) % 256
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def codes_of_base(engine: Any) -> dict[str, Tensor]:
    """Codes and exponents, as bytes."""
    matrices = [each.matrix for each in fp8_parameters(engine.module)]
    codes = {f"{each.name} codes": each.codes.view(torch.uint8).clone() for each in matrices}
    return codes | {f"{each.name} exponents": each.exponents.clone() for each in matrices}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(fp8: dict[str, Any], stage: int) -> tuple[list[float], dict[str, Tensor], bool]:
    """Losses, the base's codes, and whether training has left base and gradients as they are to be."""
    engine = engine_of(fp8, stage)
    before = codes_of_base(engine)
    found = train(engine, 20)
    as_before = same(before, codes_of_base(engine))
    base = [each for name, each in engine.module.named_parameters() if "lora" not in name]
    untouched = as_before and all(each.grad is None and not each.requires_grad for each in base)
    engine.destroy()
    return found, before, untouched


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_are_those_of_a_bf16_base(ranks: RankPools, stage: int) -> None:
    told = ranks.run(2, losses, FROZEN, stage)
    stock = ranks.run(2, losses, BF16, stage)[0][0]
    assert same(told[0][1], told[1][1])
    assert len(told[0][1]) == 2 * MATRICES
    assert all(untouched for _, _, untouched in told)
    assert max(abs(a - b) for a, b in zip(told[0][0], stock, strict=True)) < 0.02
    assert stock[-1] < stock[0] - 0.3


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_decoded_values_have_these_codes(seed: int, scale: float) -> None:
    """Also if the largest value of a tile was rounded down to half of what the tile's scale reaches."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(144, 272, generator=generator) * scale
    values[:128, :128].clamp_(-225 * scale, 225 * scale)[0, 0] = 225 * scale
    parameter = nn.Parameter(values.bfloat16(), requires_grad=False)
    plain = parameter.detach().clone()
    matrices = FrozenWeights()
    matrices.take_over(Choice([], [parameter], {}, REFERENCE, EMULATED, None), {parameter: "weight"})
    (matrix,) = matrices.matrices()
    once = Matrix("", *(torch.empty_like(each) for each in (matrix.codes, matrix.exponents)), REFERENCE)
    once.store(plain)
    assert torch.equal(once.values(), matrix.values())
    again = Matrix("", *(torch.empty_like(each) for each in (matrix.codes, matrix.exponents)), REFERENCE)
    again.store(matrix.values())
    assert torch.equal(again.codes.view(torch.uint8), matrix.codes.view(torch.uint8))
    assert torch.equal(again.exponents, matrix.exponents)


def model_values(engine: Any) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in engine.module.state_dict().items()}


def shifted() -> Any:
    """A base of other values."""
    model = lora()
    for each in model.parameters():
        each.data.mul_(1.3)
    return model


def save_and_load(folder: str, stage: int, fp8: dict[str, Any], into: dict[str, Any]) -> list[bool]:
    """Whether an engine of another base has the first one's bits after it has loaded, and goes on alike."""
    engine, frozen = engine_of(fp8, stage), into == fp8
    train(engine, 3)
    engine.save_checkpoint(folder)
    codes, values, saved = codes_of_base(engine), model_values(engine), engine.module_state_dict()
    after = train(engine, 2, first=3)
    engine.destroy()
    other = engine_of(into, stage, shifted())
    other.load_checkpoint(folder)
    checks = [type(each) in (Tensor, nn.Parameter) for each in saved.values()]
    checks.append(same(values, model_values(other)))
    if frozen:
        checks += [same(codes, codes_of_base(other)), train(other, 2, first=3) == after]
    checks.append(len(list(fp8_parameters(other.module))) == (MATRICES if frozen else 0))
    other.destroy()
    return checks


@pytest.mark.parametrize(
    ("stage", "fp8", "into"), [(1, FROZEN, FROZEN), (2, AT_O3, AT_O3), (2, FROZEN, BF16)]
)
def test_a_checkpoint_has_the_codes(
    ranks: RankPools, tmp_path: Path, stage: int, fp8: dict[str, Any], into: dict[str, Any]
) -> None:
    """DeepSpeed's model file has their values, for a BF16 base, too."""
    for checks in ranks.run(2, save_and_load, str(tmp_path), stage, fp8, into):
        assert all(checks)


def load_slices(folder: str, options: dict[str, Any]) -> bool:
    """Whether codes are those of the base in a checkpoint of ZeRO 3, which has it in slices."""
    engine = engine_of(BF16, 3)
    train(engine, 1)
    engine.save_checkpoint(folder)
    engine.destroy()
    wanted = codes_of_base(engine_of(FROZEN))
    engine = engine_of(FROZEN, 2, shifted())
    engine.load_checkpoint(folder, **options)
    found = codes_of_base(engine)
    engine.destroy()
    return len(wanted) == 2 * MATRICES and same(wanted, found)


@pytest.mark.parametrize("options", [{}, {"load_module_only": True}])
def test_a_checkpoint_of_zero_3(ranks: RankPools, tmp_path: Path, options: dict[str, Any]) -> None:
    assert ranks.run(2, load_slices, str(tmp_path), options) == [True, True]


def merge() -> list[Any]:
    """What PEFT's merges do, and what becomes of them."""
    engine = engine_of(FROZEN)
    train(engine, 1)
    codes = codes_of_base(engine)
    with pytest.raises(RuntimeError, match=r"q_proj.*safe_merge=True"):
        engine.module.merge_adapter()
    kept = same(codes, codes_of_base(engine))
    weight = engine.module.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    plain = weight.detach().clone() * 1.01
    weight.data = plain
    saved = engine.module_state_dict()
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    as_replaced = not dist.get_rank() or torch.equal(saved[name], plain.cpu())
    lines = Lines()
    logging.getLogger("ds_fp8").addHandler(lines)
    train(engine, 1)
    logging.getLogger("ds_fp8").removeHandler(lines)
    told = [line for line in lines.lines if "rounded to FP8 again: " + name in line]
    home = type(weight) is FP8Parameter and float((weight - plain).abs().max()) < 0.07 * float(
        plain.abs().max()
    )
    tokens = torch.arange(32).view(2, 16)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    weight.data = plain.float()
    with pytest.raises(ValueError, match=r"q_proj.*float32 .* after deepspeed.initialize, allowed"):
        engine.step()
    engine.destroy()
    return [kept, as_replaced, len(told), home]


def test_a_base_is_merged_safely_and_encoded_again(ranks: RankPools) -> None:
    for checks in ranks.run(2, merge):
        assert checks == [True, True, 1, True]


class OverBase(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.head = base, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x)).float().square().mean()


def share_base() -> list[bool]:
    """Actor and critic over one base: whether each engine steps, and what that does to the base."""
    torch.manual_seed(0)
    base, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(4, 64).bfloat16()
    engines = [engine_of(FROZEN, model=OverBase(base)) for _ in range(2)]
    values, found = base.weight.detach().clone(), []
    for engine in (*reversed(engines), *engines):
        before = engine.module.head.weight.detach().clone()
        engine.backward(engine(x))
        engine.step()
        found.append(not torch.equal(engine.module.head.weight, before))
    for engine in engines:
        found.append(torch.equal(base.weight, values))
        engine.destroy()
    return [*found, torch.equal(base.weight, values)]


def test_two_engines_over_one_base(ranks: RankPools) -> None:
    assert ranks.run(1, share_base)[0] == [True] * 7


def save_adapter(folder: str) -> tuple[int, bool]:
    """How many weights PEFT's save has decoded if it is given the adapter's, and whether it has the rest."""
    engine = engine_of(FROZEN)
    train(engine, 1)
    matrices = [each.matrix for each in fp8_parameters(engine.module)]
    before = sum(each.decodes for each in matrices)
    adapter = engine.module_state_dict(exclude_frozen_parameters=True)
    engine.module.save_pretrained(folder, state_dict=adapter)
    decodes = sum(each.decodes for each in matrices) - before
    other = PeftModel.from_pretrained(lora().unload(), folder)
    loaded = {name: each for name, each in other.named_parameters() if "lora" in name}
    trained = {name: each for name, each in engine.module.named_parameters() if "lora" in name}
    kept = same({name: each.bfloat16() for name, each in loaded.items()}, trained)
    engine.destroy()
    return decodes, kept


def test_an_adapter_is_saved_without_its_base(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks.run(1, save_adapter, str(tmp_path)) == [(0, True)]
