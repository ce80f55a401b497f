"""Which weights become FP8, and what is said of the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ds_fp8.zero_fp8.products.choice import eligible

SIDE = 64


class Own(nn.Linear):
    """A subclass may do anything."""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, SIDE, SIDE))
        self.matrix = nn.Parameter(torch.zeros(SIDE, SIDE))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SIDE, SIDE)
        self.good, self.frozen, self.excluded = (nn.Linear(SIDE, SIDE) for _ in range(3))
        self.own, self.thin, self.odd = Own(SIDE, SIDE), nn.Linear(1024, 16), nn.Linear(1000, SIDE)
        self.small = nn.Linear(32, 32)
        self.one, self.other = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)
        self.other.weight = self.one.weight
        self.tied = nn.Linear(SIDE, SIDE)
        self.tied.weight = self.embed.weight
        self.low_rank = parametrizations.weight_norm(nn.Linear(SIDE, SIDE))
        self.pruned = prune.identity(nn.Linear(SIDE, SIDE), "weight")
        self.attention = nn.MultiheadAttention(SIDE, 2)
        self.experts = Experts()
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(SIDE, SIDE)


def choose(model: nn.Module, **options: Any) -> tuple[list[str], dict[str, str]]:
    options = {"min_elements": SIDE * SIDE, "exclude": [], **options}
    found, reasons = eligible(model, **options)
    parameters = dict(model.named_parameters())
    assert all(each.parameter is parameters[each.name] for each in found)
    names = [each.name for each in found]
    matrices = {name for name, each in parameters.items() if each.dim() == 2}
    assert matrices == {*names, *reasons}  # every matrix is one or the other
    assert len(names) + len(reasons) == len(matrices)
    return names, reasons


def test_every_matrix_is_fp8_or_has_a_reason() -> None:
    names, reasons = choose(Model().bfloat16(), exclude=["excl*.weight"])
    assert names == ["good.weight"]
    assert reasons == {
        "embed.weight": "shared with weight of Embedding",
        "frozen.weight": "frozen",
        "excluded.weight": "excluded by excl*.weight",
        "own.weight": "weight of Own",
        "thin.weight": "16 x 1024: too small to gain",
        "odd.weight": "64 x 1000: not multiples of 16",
        "small.weight": "32 x 32: too small to gain",
        "one.weight": "tied: one and other have it",
        "low_rank.parametrizations.weight.original0": "original0 of ParametrizationList",
        "low_rank.parametrizations.weight.original1": "original1 of ParametrizationList",
        "pruned.weight_orig": "weight_orig of Linear",
        "attention.in_proj_weight": "in_proj_weight of MultiheadAttention",
        "attention.out_proj.weight": "weight of NonDynamicallyQuantizableLinear",
        "experts.matrix": "matrix of Experts",
        "head.weight": "the output embedding",
    }


def test_what_options_let_in() -> None:
    model = Model().bfloat16()
    names, _ = choose(model, frozen=True, output_embeddings=True)
    assert names == ["good.weight", "frozen.weight", "excluded.weight", "head.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_bf16(dtype: torch.dtype) -> None:
    names, reasons = choose(nn.Sequential(nn.Linear(SIDE, SIDE)).to(dtype))
    assert (names, reasons) == ([], {"0.weight": f"of {dtype}"})


@pytest.mark.parametrize(
    ("rows", "columns", "large"),
    [(1024, 2048, True), (2048, 1024, True), (1024, 2032, False), (1008, 8192, False), (1024, 1024, False)],
)
def test_the_default_size(rows: int, columns: int, large: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(columns, rows, dtype=torch.bfloat16))
    names, _ = choose(model, min_elements=2**21)
    assert bool(names) is large


def test_a_parameter_of_another_class_stays() -> None:
    model = nn.Sequential(nn.Linear(SIDE, SIDE)).bfloat16()
    model[0].weight.__class__ = type("Sharded", (nn.Parameter,), {})
    assert choose(model) == ([], {"0.weight": "a Sharded"})


def llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIDE,
            hidden_size=SIDE,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            **options,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=SIDE, n_embd=SIDE, n_layer=1, n_head=2, n_positions=SIDE))


@pytest.mark.parametrize(
    ("build", "count", "kinds"),
    [(llama, 7, {"Linear"}), (lambda: llama(tie_word_embeddings=True), 7, {"Linear"}), (gpt2, 4, {"Conv1D"})],
)
def test_hugging_faces_models(build: Callable[[], nn.Module], count: int, kinds: set[str]) -> None:
    model = build().bfloat16()
    found, reasons = eligible(model, min_elements=SIDE * SIDE, exclude=[])
    assert (len(found), {each.kind for each in found}) == (count, kinds)
    assert not any("lm_head" in each.name or "wte" in each.name for each in found)
    assert all("embedding" in each.lower() for each in reasons.values())


def test_a_head_within_a_wrapper_is_found() -> None:
    """Where a later Linear, as TRL's value head, is not the output embedding."""
    model = nn.Module()
    model.inner, model.value = llama().bfloat16(), nn.Linear(SIDE, SIDE, dtype=torch.bfloat16)
    names, reasons = choose(model)
    assert reasons["inner.lm_head.weight"] == "the output embedding"
    assert "value.weight" in names


@pytest.mark.parametrize("name", ["lm_head", "head", "output", "embed_out"])
def test_a_linear_with_the_name_of_a_head_stays(name: str) -> None:
    """Also one that is made before the layers, whose own outputs are none."""
    model = nn.Module()
    setattr(model, name, nn.Linear(SIDE, SIDE))
    model.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(SIDE, SIDE)}) for _ in range(2))
    setattr(model, f"last_{name}", nn.Linear(SIDE, SIDE))
    names = [f"layers.0.{name}.weight", f"layers.1.{name}.weight", f"last_{name}.weight"]
    assert choose(model.bfloat16()) == (names, {f"{name}.weight": "the output embedding"})


def test_the_head_of_a_list_of_stages_comes_last() -> None:
    stages = nn.ModuleList(nn.ModuleDict({"head": nn.Linear(SIDE, SIDE)}) for _ in range(2)).bfloat16()
    assert choose(stages) == (["0.head.weight"], {"1.head.weight": "the output embedding"})


def test_torchaos_float8_is_refused_by_name() -> None:
    from torchao.float8.float8_linear import Float8Linear

    model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)).bfloat16()
    model[1] = Float8Linear.from_float(model[1])
    with pytest.raises(
        ValueError, match=r"received 1, a torchao\.float8\.float8_linear\.Float8Linear.*allowed"
    ):
        choose(model)


def test_transformer_engine_is_refused_by_name() -> None:
    """Also a subclass of it."""
    kind = type("Linear", (nn.Module,), {"__module__": "transformer_engine.pytorch.module.linear"})
    model = nn.Sequential(type("Mine", (kind,), {})())
    with pytest.raises(ValueError, match=r"received 0, .*Mine"):
        choose(model)
