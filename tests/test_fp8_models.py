"""Hugging Face's models with every product in FP8, without an engine."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_weights import EMULATED, WAYS, fp8_parameters, make_fp8
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ds_fp8.zero_fp8.products.ways import Way

VOCABULARY = 64


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).bfloat16()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    return GPT2LMHeadModel(config).bfloat16().train()


Build = Callable[[], PreTrainedModel]
MODELS = (llama, gpt2)
FP8_WEIGHTS = {llama: 14, gpt2: 8}


def batch(rows: int = 2) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(1))


def train_step(model: nn.Module, tokens: Tensor) -> float:
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return float(loss.detach())


def gradients(model: nn.Module) -> list[Tensor]:
    return [each.grad.clone() for each in model.parameters() if each.grad is not None]


def decoded(model: nn.Module) -> nn.Module:
    """A plain copy with the values that the codes have."""
    return copy.deepcopy(model)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("build", MODELS)
def test_training_reads_no_weight_and_fires_every_hook(build: Build, way: Way) -> None:
    model, fired = build(), []
    for each in model.parameters():
        each.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.dtype))
    matrices = make_fp8(model, way)
    assert len(matrices) == FP8_WEIGHTS[build]
    plain = decoded(model)
    counts = [each.decodes for each in matrices.values()]
    loss, wanted = train_step(model, batch()), train_step(plain, batch())
    assert [each.decodes for each in matrices.values()] == counts
    assert fired == [torch.bfloat16] * len(list(model.parameters()))
    assert loss == pytest.approx(wanted, rel=2e-3)
    for got, exact in zip(gradients(model), gradients(plain), strict=True):
        assert float((got.float() - exact.float()).norm()) < 0.12 * float(exact.float().norm())


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(build: Build, reentrant: bool) -> None:
    model = build()
    make_fp8(model)
    loss = train_step(model, batch())
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert train_step(model, batch()) == loss
    assert all(torch.equal(*each) for each in zip(gradients(model), wanted, strict=True))


@pytest.mark.parametrize("build", MODELS)
def test_generation_is_that_of_the_decoded_model(build: Build) -> None:
    """One token at a time through BF16 products of decoded weights, so that no rounding differs."""
    model = build().eval()
    make_fp8(model, WAYS[1])
    plain = decoded(model)
    written = [each.generate(batch(), max_new_tokens=6, do_sample=False) for each in (model, plain)]
    assert torch.equal(*written)


def test_generation_with_fp8_products() -> None:
    model = llama().eval()
    make_fp8(model)
    written = model.generate(batch(), max_new_tokens=6, do_sample=False)
    assert written.shape == (2, 30)


@pytest.mark.parametrize("build", MODELS)
def test_saved_and_loaded_are_the_same_bits(build: Build, tmp_path: Path) -> None:
    model = build()
    make_fp8(model)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    assert {type(each) for each in model.state_dict().values()} == {Tensor}
    assert all(bool(each.isfinite().all()) for each in state.values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.state_dict().keys() == state.keys()
    for name, each in loaded.state_dict().items():
        assert torch.equal(each, state[name]), name
    assert len(list(fp8_parameters(model))) == FP8_WEIGHTS[build]


def test_a_model_answers_as_before() -> None:
    model = llama()
    count, footprint = model.num_parameters(), model.get_memory_footprint()
    make_fp8(model)
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert (model.num_parameters(), model.get_memory_footprint()) == (count, footprint)
    assert model.to("cpu", torch.bfloat16) is model
    assert len(list(fp8_parameters(model))) == FP8_WEIGHTS[llama]
    assert {each.dtype for each in model.float().parameters()} == {torch.float32}
    assert not list(fp8_parameters(model))


def lora(model: PreTrainedModel) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def test_lora_over_a_frozen_fp8_base() -> None:
    model = lora(llama())
    make_fp8(model)
    plain = decoded(model)
    loss, wanted = train_step(model, batch()), train_step(plain, batch())
    assert loss == pytest.approx(wanted, rel=2e-3)
    named = dict(model.named_parameters())
    assert {name for name, each in named.items() if each.grad is not None} == {
        name for name in named if "lora" in name
    }
    for got, exact in zip(gradients(model), gradients(plain), strict=True):
        assert float((got.float() - exact.float()).norm()) < 0.12 * float(exact.float().norm())


def test_an_adapter_is_merged_safely_or_not_at_all() -> None:
    """Merged, a weight is plain and has what the decoded model has after the same merge."""
    model = lora(llama())
    make_fp8(model)
    plain = decoded(model)
    matrix = next(fp8_parameters(model)).matrix
    codes = matrix.codes.view(torch.uint8).clone()
    with pytest.raises(RuntimeError, match=r"q_proj.*safe_merge=True"):
        model.merge_adapter()
    assert torch.equal(matrix.codes.view(torch.uint8), codes)
    merged, wanted = model.merge_and_unload(safe_merge=True), plain.merge_and_unload(safe_merge=True)
    for (name, got), each in zip(merged.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(got, each), name
    assert len(list(fp8_parameters(merged))) == FP8_WEIGHTS[llama] - 4


def test_a_compiled_llama_gives_the_bits_of_eager() -> None:
    torch._dynamo.reset()
    model = llama()
    make_fp8(model, EMULATED)
    loss = train_step(model, batch())
    wanted = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert train_step(compiled, batch()) == loss
    assert all(torch.equal(*each) for each in zip(gradients(model), wanted, strict=True))
    torch._dynamo.reset()
