"""O3 in an engine: which matrices it takes, what it says of them, and what it refuses."""

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from engines import SMALL, Lines, build, ds_config, refusal
from ranks import RankPools
from torch import nn
from train_lm import ByteGPT

import ds_fp8
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.weights.code_views import CodeViews

O3 = {"opt_level": "O3", "weights": {"min_elements": 256, "exclude": ["blocks.1.*"]}}


class OwnLinear(nn.Linear):
    """A subclass may do anything with its weight."""


def told(products: str | None, fp8: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """What describe and the log say, and the names of parameters that are FP8."""
    lines = Lines()
    logging.getLogger("ds_fp8").addHandler(lines)
    environment = {} if products is None else {"DS_FP8_PRODUCTS": products}
    torch.manual_seed(0)
    with patch.dict(os.environ, environment):
        engine = build(ds_config(fp8), ByteGPT(SMALL))
    logging.getLogger("ds_fp8").removeHandler(lines)
    coded = [name for name, each in engine.module.named_parameters() if isinstance(each, FP8Parameter)]
    about = ds_fp8.describe(engine)
    engine.destroy()
    return about, lines.lines, coded


def test_describe_and_the_banner(ranks: RankPools) -> None:
    about, lines, coded = ranks.run(2, told, "emulated", O3)[0]
    assert about["fp8_weights"] == coded != []
    assert all(name.startswith("blocks.0.") for name in coded)
    assert about["bf16_matrices"]["head.weight"] == "the output embedding"
    assert about["bf16_matrices"]["tokens.weight"] == "weight of Embedding"
    assert about["bf16_matrices"]["blocks.1.up.weight"] == "excluded by blocks.1.*"
    assert (about["products"], about["products_instead"]) == ("emulated", None)
    (banner,) = [line for line in lines if ": ON, O3" in line]
    assert "\n" not in banner
    assert about["fp8_share"] == about["fp8_elements"] / sum(x.numel() for x in ByteGPT(SMALL).parameters())
    assert "products emulated, kernels" in banner


def test_why_products_are_not_fp8_is_told(ranks: RankPools) -> None:
    about, lines, _ = ranks.run(1, told, None, O3)[0]
    assert about["products"] == "decoded"
    assert about["products_instead"]
    assert any(f"products decoded: {about['products_instead']}" in line for line in lines)
    about, lines, _ = ranks.run(1, told, None, {**O3, "products": {"dtype": "bf16"}})[0]
    assert (about["products"], about["products_instead"]) == ("decoded", None)


def with_frozen_matrices() -> nn.Module:
    model = ByteGPT(SMALL)
    for each in model.parameters():
        each.requires_grad_(each.dim() != 2)
    return model


def with_a_linear_of_its_own() -> nn.Module:
    model = ByteGPT(SMALL)
    model.blocks[0].up = OwnLinear(SMALL.width, 4 * SMALL.width)
    return model


@dataclass(frozen=True)
class Odd:
    """An engine that differs from others of O3."""

    fp8: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = lambda: ByteGPT(SMALL)
    products: str | None = None
    bf16: bool = True
    largest: float = math.inf  # dimensions of what the optimizer is given


ALL = {"opt_level": "O3", "weights": {"min_elements": 256}}
ODD = {
    "": Odd(),
    "small": Odd(fp8={"opt_level": "O2", "weights": {"dtype": "e4m3"}}),
    "frozen": Odd(model=with_frozen_matrices),
    "none frozen": Odd(fp8={"weights": {"min_elements": 256, "frozen": "e4m3"}}),
    "none at O2": Odd(fp8={"opt_level": "O2", "weights": {"min_elements": 256, "frozen": "e4m3"}}),
    "FP32": Odd(bf16=False),
    "no matrix": Odd(model=lambda: nn.Sequential(nn.LayerNorm(8))),
    "products": Odd(products="emulated"),
    "a way": Odd(products="cublas"),
    "e4m3": Odd(fp8={"products": {"dtype": "e4m3"}}),
    "pattern": Odd(fp8={"weights": {"min_elements": 256, "exclude": ["blocks.0.*", "layers.1.*"]}}),
    "class": Odd(model=with_a_linear_of_its_own),
    "optimizer": Odd(largest=1),
}


def refused(what: str, rank: int | None = None) -> str:
    """The error of an engine that is odd, on one rank or on all."""
    odd = ODD[what if rank in (None, dist.get_rank()) else ""]
    model = odd.model()
    parameters = [each for each in model.parameters() if each.dim() <= odd.largest]
    config = ds_config(ALL | odd.fp8, bf16=odd.bf16)
    with patch.dict(os.environ, {"DS_FP8_PRODUCTS": odd.products} if odd.products else {}):
        return refusal(lambda: deepspeed.initialize(model=model, model_parameters=parameters, config=config))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "small",
            'fp8.weights.dtype: received "e4m3", allowed: the key left out for this model: FP8 weights',
        ),
        ("small", "too small to gain and 8 more; fp8.weights.min_elements is 2,097,152"),
        (
            "frozen",
            'fp8.opt_level: received "O3", allowed: "O1", "O2", "O2+" for this model: O3 would do nothing',
        ),
        ("frozen", 'fp8.weights.frozen "e4m3" is for those that are frozen, as a LoRA base'),
        ("none frozen", 'fp8.weights.frozen: received "e4m3", allowed: bf16, or the key left out, for this'),
        (
            "none at O2",
            'fp8.weights.frozen: received "e4m3", allowed: the key left out for this model: FP8 weights',
        ),
        ("FP32", "of torch.float32"),
        ("no matrix", "O3 would do nothing (it has no matrix"),
        ("a way", "DS_FP8_PRODUCTS: received 'cublas', which cannot run on cpu"),
        ("pattern", 'fp8.weights.exclude: received "layers.1.*", allowed: patterns that match a name of the'),
        ("e4m3", 'fp8.products.dtype: received "e4m3", allowed: bf16, or the key left out, on cpu'),
        ("optimizer", "optimizer: received no FP8 weight to train, allowed: at least one of blocks.0."),
    ],
)
def test_an_engine_that_cannot_have_them(ranks: RankPools, what: str, words: str) -> None:
    assert words in ranks.run(1, refused, what)[0]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "class",
            "ranks disagree about what is trained: rank 0 has FP8 weight: blocks.0.up.weight, rank 1 has ",
        ),
        ("products", "rank 0 has products: decoded, rank 1 has products: emulated"),
        ("a way", "rank 1: DS_FP8_PRODUCTS: received 'cublas'"),
    ],
)
def test_ranks_that_would_choose_otherwise(ranks: RankPools, what: str, words: str) -> None:
    for message in ranks.run(2, refused, what, 1):
        assert words in message


def test_an_optimizer_of_its_own_has_no_fp8_weights() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    for fp8, key in (({"opt_level": "O3"}, "opt_level"), ({"weights": {"dtype": "e4m3"}}, "weights.dtype")):
        with pytest.raises(ValueError, match=re.escape(f"fp8.{key}: received ")):
            ds_fp8.FP8AdamW([parameter], fp8=fp8)


def bytes_at_gathers() -> tuple[list[int], list[int]]:
    """Of a model's matrices at each of the first gathers, BF16 and codes; and of each bucket's codes."""
    stores: list[CodeViews] = []
    found, codes = [], []
    make, gather = CodeViews.__init__, CodeViews.gather

    def made(self: CodeViews, *given: Any) -> None:
        make(self, *given)
        stores.append(self)

    def counted(self: CodeViews, nodes: Any) -> Any:
        matrices = [each._parameters[slot.parameter] for each in stores for slot in each._bucket.slots]
        plain = sum(each.nbytes for each in matrices if not isinstance(each, FP8Parameter))
        found.append(plain + sum(each.memory.bytes.untyped_storage().nbytes() for each in stores))
        codes.append(self.memory.bytes.nbytes)
        return gather(self, nodes)

    with patch.object(CodeViews, "__init__", made), patch.object(CodeViews, "gather", counted):
        build(ds_config(O3, bucket=1000), ByteGPT(SMALL)).destroy()
    return found, codes


def test_beside_bf16_weights_there_is_one_bucket_of_codes_at_first(ranks: RankPools) -> None:
    ((found, codes),) = ranks.run(1, bytes_at_gathers)
    assert len(found) > 2
    assert found == [2 * sum(codes[number:]) + sum(codes[: number + 1]) for number in range(len(codes))]
