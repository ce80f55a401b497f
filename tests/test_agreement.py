"""Ranks that disagree get an error that shows the difference, and do not wait for each other."""

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from engines import SMALL, ds_config, refusal
from ranks import RankPools
from torch import nn
from train_lm import ByteGPT

from ds_fp8.config.refusals import where_they_differ


def disagree(what: str) -> str:
    """Build an engine that differs on rank 1."""
    odd = dist.get_rank() == 1
    config: dict[str, Any] = ds_config({"block_size": 64 if odd and what == "block size" else 128})
    torch.manual_seed(0)
    model: nn.Module = ByteGPT(SMALL)
    if odd and what == "fp8 off":
        config["fp8"]["enabled"] = False
        config["optimizer"]["params"]["torch_adam"] = True
    if odd and what == "stage":
        config["zero_optimization"]["stage"] = 1
    if odd and what == "clipping":
        config["gradient_clipping"] = 2.0
    if odd and what == "one more layer":
        model.extra = nn.Linear(3, 3)
    if odd and what == "shape":
        model.head = nn.Linear(SMALL.width, 255, bias=False)
    if odd and what == "frozen":
        model.head.weight.requires_grad_(False)
    parameters = list(model.parameters())
    if odd and what == "not optimised":
        parameters = parameters[1:]
    return refusal(lambda: deepspeed.initialize(model=model, model_parameters=parameters, config=config))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("block size", ('"block_size": 128', '"block_size": 64')),
        ("fp8 off", ("fp8 off", "ds_config")),
        ("stage", ('"stage": 2', '"stage": 1')),
        ("clipping", ("gradient_clipping", "1.0", "2.0")),
        ("one more layer", ("nothing more", "extra.weight: [3, 3]")),
        ("shape", ("head.weight: [256, 32]", "head.weight: [255, 32]")),
        ("frozen", ("head.weight", "trained", "frozen")),
        ("not optimised", ("what is trained", "ParameterSpec")),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_disagreement_is_told(ranks: RankPools, world_size: int, what: str, words: tuple[str, ...]) -> None:
    for message in ranks.run(world_size, disagree, what):
        assert "ranks disagree about" in message
        assert "rank 0 has" in message
        assert "rank 1 has" in message
        assert all(word in message for word in words), message


def test_long_facts_are_cut_around_their_first_difference() -> None:
    same = "x" * 10**6
    assert where_they_differ("a: 1", "a: 2") == ("a: 1", "a: 2")
    mine, other = where_they_differ(f'ds_config "fp8": {same}[1]{same}', f'ds_config "fp8": {same}[2]{same}')
    assert mine.startswith('ds_config "fp8": ...x')
    assert "[1]" in mine
    assert "[2]" in other
    assert len(mine) < 300
    mine, other = where_they_differ(same, f"{same} more")
    assert "more" in other
    assert len(mine) < 500
