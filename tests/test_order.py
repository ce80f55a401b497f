"""Buckets that fill in any order, parameters that fire again or on some ranks only: no deadlock."""

import random
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from engines import ds_config
from ranks import RankPools
from test_parity import gradient_errors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 256
LAYERS = 6


class Shuffled(nn.Module):
    """Layers in an order, and with repetitions, that each rank draws for itself.

    Some layers are used by some ranks only, one is tied and recomputed, so that it fires several times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.plan: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer, recompute in self.plan:
            x = x + torch.tanh(self._apply_layer(self.layers[layer], x, recompute))
            x = x + torch.tanh(self._apply_layer(self.tied, x, recompute))
        return x.float().square().mean()

    @staticmethod
    def _apply_layer(layer: nn.Module, x: Tensor, recompute: bool) -> Tensor:
        out: Tensor = checkpoint(layer, x, use_reentrant=True) if recompute else layer(x)
        return out


def draw_plan(seed: int, step: int) -> list[tuple[int, bool]]:
    """This rank's layers of a step: any order, some missing, some twice, some recomputed."""
    choice = random.Random(f"{seed} {step} {dist.get_rank()}")
    plan = [choice.randrange(LAYERS) for _ in range(choice.randint(2, LAYERS + 2))]
    return [(layer, choice.random() < 0.5) for layer in plan]


def run(seed: int) -> list[float]:
    """Five steps; the worst error of a gradient in each."""
    torch.manual_seed(seed)
    model, reference = Shuffled(), Shuffled().bfloat16()
    bucket = random.Random(seed).choice([500, 66_000, 140_000, 10**6])
    overlap = {"overlap_comm": seed % 4 >= 2}
    config = ds_config({}, bucket=bucket, clipping=0.0, zero=overlap)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    worst = []
    for step in range(5):
        plan = draw_plan(seed, step)
        generator = torch.Generator().manual_seed(1000 * seed + 10 * step + dist.get_rank())
        x = torch.randn(8, WIDTH, generator=generator).bfloat16().requires_grad_()
        exact = mean_gradients(reference, engine, plan, x)
        engine.module.plan = plan
        engine.backward(engine(x))
        engine.step()  # brings the late ones
        worst.append(worst_error(engine.optimizer, exact))
    engine.destroy()
    return worst


def mean_gradients(reference: nn.Module, engine: Any, plan: Any, x: Tensor) -> dict[str, Tensor]:
    """FP32 mean over ranks of what BF16 backward gives; zeros where a rank does not use a layer."""
    reference.load_state_dict(engine.module.state_dict())
    reference.plan = plan
    reference(x).backward()
    exact = {}
    for name, parameter in reference.named_parameters():
        total = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad.float()
        dist.all_reduce(total)
        exact[name] = total / dist.get_world_size()
        parameter.grad = None
    return exact


def worst_error(handler: Any, exact: dict[str, Tensor]) -> float:
    """Largest relative error; parameters that no rank used must be zero."""
    used = {name: each for name, each in exact.items() if each.abs().max() > 0}
    errors = gradient_errors(handler, {name: each + (name not in used) for name, each in exact.items()})
    for name in exact.keys() - used.keys():
        assert errors[name] == pytest.approx(1.0), f"{name}: nobody used it"
    return max(errors[name] for name in used)


@pytest.mark.parametrize("seed", range(20))
def test_any_order(ranks: RankPools, seed: int) -> None:
    for worst in ranks.run(2 + seed % 2, run, seed, seconds=60):
        assert max(worst) < 0.05
