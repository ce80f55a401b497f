"""data_types.grad_accum_dtype: fp32 under ZeRO 1, where micro-steps add up in `.grad`."""

from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import assert_same_bits, build, ds_config, packed, whole_states
from ranks import RankPools
from torch import Tensor, nn

FACTORS = (256.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # BF16 keeps 8 bits: 256 + 1 is 256
ASKED = {"data_types": {"grad_accum_dtype": "fp32"}}


class Row(nn.Module):
    """The gradient of its weight is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, factor: float) -> Tensor:
        return (self.weight * torch.full((64,), factor, dtype=self.weight.dtype)).float().sum()


def sums(micro_steps: int, asked: bool, by_hand: bool) -> dict[str, Any]:
    """What `.grad` is after each backward but the last; by_hand: the caller says which is the last."""
    config = ds_config({}, stage=1, micro_steps=1 if by_hand else micro_steps) | (ASKED if asked else {})
    engine = build(config, Row())
    weight, found = engine.module.weight, []
    for _ in range(2):
        for number, factor in enumerate(FACTORS[:micro_steps]):
            if by_hand:
                engine.set_gradient_accumulation_boundary(number == micro_steps - 1)
            engine.backward(engine(factor), scale_wrt_gas=False)
            found.append(None if weight.grad is None else (weight.grad.dtype, weight.grad[0].item()))
            engine.step()
    norm = float(engine.get_global_grad_norm())
    states = packed(engine.optimizer)
    dtypes = [weight.grad_dtype]
    engine.destroy()
    return {"found": found, "norm": norm, "states": states, "dtypes": [*dtypes, weight.grad_dtype]}


@pytest.mark.parametrize("by_hand", [False, True])
def test_micro_steps_add_up_in_fp32(ranks: RankPools, by_hand: bool) -> None:
    for result in ranks.run(2, sums, len(FACTORS), True, by_hand):
        expected = [sum(FACTORS[: number + 1]) for number in range(len(FACTORS) - 1)]
        assert result["found"] == [*((torch.float32, value) for value in expected), None] * 2
        assert result["norm"] == pytest.approx(sum(FACTORS) * 64**0.5, rel=0.03)  # E4M3
        assert result["dtypes"] == [torch.float32, torch.bfloat16]


def test_they_add_up_as_the_model_otherwise(ranks: RankPools) -> None:
    for result in ranks.run(2, sums, len(FACTORS), False, False):
        assert result["found"][-2] == (torch.bfloat16, 256.0)
        assert result["dtypes"] == [torch.bfloat16] * 2


def test_one_micro_step_needs_no_wider_gradient(ranks: RankPools) -> None:
    """`.grad` stays BF16, and every bit of state what it is without the key."""
    asked, left_out = (ranks.run(2, sums, 1, value, False) for value in (True, False))
    assert asked[0]["dtypes"] == [torch.bfloat16] * 2
    states = (whole_states([each["states"] for each in run]) for run in (asked, left_out))
    assert_same_bits(*states)


def gradients_of_users(micro_steps: int) -> tuple[float, float]:
    """A gradient read through DeepSpeed, and after one was set by hand."""
    from deepspeed.utils import safe_get_full_grad

    engine = build(ds_config({}, stage=1, micro_steps=micro_steps) | ASKED, Row())
    weight = engine.module.weight
    for factor in FACTORS[: micro_steps - 1]:
        engine.backward(engine(factor), scale_wrt_gas=False)
        engine.step()
    weight.grad = weight.grad * 2
    engine.backward(engine(FACTORS[micro_steps - 1]), scale_wrt_gas=False)
    read = safe_get_full_grad(weight)[0].item()
    engine.step()
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return read, norm / 64**0.5


def test_a_gradient_edited_between_micro_steps_counts(ranks: RankPools) -> None:
    expected = 2 * 257.0 + 1.0
    for read, norm in ranks.run(2, gradients_of_users, 3):
        assert read == pytest.approx(expected, rel=0.05)
        assert norm == pytest.approx(expected, rel=0.05)


def two_dtypes() -> list[torch.dtype]:
    """Parameters that are FP32 already stay as they are."""
    model = nn.ModuleDict({"narrow": Row(), "wide": Row()})
    model["narrow"].to(torch.bfloat16)
    engine = build(ds_config({}, stage=1, micro_steps=2, bf16=False) | ASKED, model)
    loss = engine.module["narrow"](1.0) + engine.module["wide"](1.0)
    loss.backward()
    dist.barrier()
    grads = [each.grad.dtype for each in model.parameters()]
    engine.destroy()
    return [*grads, *(each.grad_dtype for each in model.parameters())]


def test_mixed_parameters(ranks: RankPools) -> None:
    for dtypes in ranks.run(2, two_dtypes):
        assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
