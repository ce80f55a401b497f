"""Training with FP8 equals stock DeepSpeed BF16, and the checks can tell when it does not."""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from engines import (
    SMALL,
    assert_same_bits,
    batches,
    build_gpt,
    ds_config,
    train_losses,
    train_run,
    weight_bits,
)
from grids import grid
from ranks import RankPools
from torch import Tensor, nn
from train_lm import ByteGPT, Shape

from ds_fp8.ops import adam
from ds_fp8.ops.backend import REFERENCE, VARIABLE
from ds_fp8.ops.blocks import Blocks, decode
from ds_fp8.zero_fp8.gradients.reduced import ReducedGradient
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer

EXAMPLE = Shape()
WIDE = Shape(layers=1, width=256, heads=4, context=32)  # two blocks and more, so that errors average
QUICK = replace(EXAMPLE, layers=2, context=48)  # a third of its time; 100 steps tell the faults
LOSS_BOUND = 0.01  # nats, mean of the last 50 losses and validation loss
NORM_BOUND = 0.02
GRADIENT_BOUND = 0.05


# Faults, planted to see that the checks below notice them.


def _without_scale_of_m(values: adam.Update, rows: adam.Sweep, noise: adam.Noise) -> None:
    _store(values, rows, noise)
    assert rows.state.exp_avg.scales is not None
    rows.state.exp_avg.scales.fill_(127)


_store = adam.store
_receive = ReducedGradient.receive


def _without_last_rank(reduced: ReducedGradient, pieces: list[Blocks]) -> None:
    _receive(reduced, pieces[:-1])


def fault(name: str | None) -> AbstractContextManager[Any]:
    faults: dict[str | None, AbstractContextManager[Any]] = {
        None: nullcontext(),
        "no 1/accumulation": nullcontext(),  # planted in the loss: the division is DeepSpeed's
        "no 1/N": patch.object(FP8ZeROOptimizer, "_gradient_scale", lambda _: 1.0),
        "one rank dropped": patch.object(ReducedGradient, "receive", _without_last_rank),
        "scale of m dropped": _in_reference("store", _without_scale_of_m),
        "v not squared": _in_reference("decode_second_moment", decode),
    }
    return faults[name]


@contextmanager
def _in_reference(function: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """A fault of `ops.adam`, whose functions only the reference calls."""
    with patch.object(adam, function, replacement), patch.dict(os.environ, {VARIABLE: REFERENCE.name}):
        yield


# Losses


def run_with_fault(
    config: dict[str, Any], shape: Shape, seed: int, steps: int, planted: str | None
) -> dict[str, Any]:
    with fault(planted):
        return train_run(config, shape, seed, steps)


def assert_parity(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    last = [statistics.fmean(run["losses"][-50:]) for run in (ours, stock)]
    assert abs(last[0] - last[1]) < LOSS_BOUND, f"last 50 losses: {last[0]:.4f}, stock {last[1]:.4f}"
    validation = [run["validation"] for run in (ours, stock)]
    assert abs(validation[0] - validation[1]) < LOSS_BOUND, (
        f"validation: {validation[0]:.4f}, stock {validation[1]:.4f}"
    )


RECIPES: dict[str, dict[str, Any]] = {
    **{level: {"opt_level": level} for level in ("O1", "O2", "O2+")},
    "tensor": {"scaling": "tensor"},
    "tensor, FP8 sum": {"scaling": "tensor", "gradients": {"reduction": "fp8"}},
}


class Runs:
    """Runs of the example at 2 ranks, each made once."""

    def __init__(self, ranks: RankPools) -> None:
        self._run = cache(
            lambda recipe, stage, *others: ranks.run(
                2,
                run_with_fault,
                ds_config(RECIPES[recipe] if recipe else None, stage=stage, micro_batch=8),
                *others,
            )[0]
        )

    def __call__(
        self,
        recipe: str | None,
        *,
        stage: int = 2,
        shape: Shape = QUICK,
        seed: int = 0,
        steps: int = 100,
        planted: str | None = None,
    ) -> dict[str, Any]:
        run: dict[str, Any] = self._run(recipe, stage, shape, seed, steps, planted)
        return run


@pytest.fixture(scope="session")
def runs(ranks: RankPools) -> Runs:
    return Runs(ranks)


@pytest.mark.parametrize("level", ["O1", "O2", "O2+"])
def test_losses_equal_stock_bf16(runs: Runs, level: str) -> None:
    assert_parity(runs(level), runs(None))


@pytest.mark.parametrize("recipe", ["tensor", "tensor, FP8 sum"])
def test_losses_of_fp8_lm_as_published_equal_stock_bf16(runs: Runs, recipe: str) -> None:
    assert_parity(runs(recipe), runs(None))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_equal_stock_bf16_over_more_steps(runs: Runs, recipe: str, seed: int) -> None:
    """Under ZeRO 2: ZeRO 1 has the same bits."""
    options: dict[str, Any] = {"shape": EXAMPLE, "seed": seed, "steps": 300}
    assert_parity(runs(recipe, **options), runs(None, **options))


@pytest.mark.parametrize("planted", ["scale of m dropped", "v not squared"])
def test_loss_check_notices(runs: Runs, planted: str) -> None:
    with pytest.raises(AssertionError):
        assert_parity(runs("O2", planted=planted), runs(None))


@pytest.mark.parametrize("recipe", RECIPES)
def test_stages_equal_bit_for_bit_without_accumulation(ranks: RankPools, recipe: str) -> None:
    one, two = (
        ranks.run(2, train_run, ds_config(RECIPES[recipe], stage=stage), SMALL, 0, 30)[0] for stage in (1, 2)
    )
    assert one["losses"] == two["losses"]
    assert_same_bits(one["weights"], two["weights"])


# Gradients


def measure_gradients(
    stage: int,
    micro_steps: int,
    clipping: float,
    planted: str | None,
    fp8: dict[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """Ten steps of FP8 and stock side by side: norms, and each gradient's error to the FP32 mean."""
    options: dict[str, Any] = {"stage": stage, "micro_steps": micro_steps, "clipping": clipping}
    ours = build_gpt(ds_config({"opt_level": "O2", **(fp8 or {})}, **options), WIDE)
    stock = build_gpt(ds_config(**options), WIDE)
    reference = ByteGPT(WIDE).bfloat16()
    found: dict[str, list[Any]] = {"norms": [], "stock_norms": [], "errors": []}
    with fault(planted):
        source = batches(ours, shape=WIDE)
        for _ in range(10):
            micro_batches = [next(source) for _ in range(micro_steps)]
            reference.load_state_dict(ours.module.state_dict())
            exact = mean_gradients(reference, micro_batches)
            factor = micro_steps if planted == "no 1/accumulation" else 1
            found["errors"].append(backward(ours, micro_batches, exact, factor=factor))
            backward(stock, micro_batches)
            found["norms"].append(ours.get_global_grad_norm())
            found["stock_norms"].append(float(stock.get_global_grad_norm()))
    ours.destroy()
    stock.destroy()
    return found


def mean_gradients(model: nn.Module, micro_batches: list[Tensor]) -> dict[str, Tensor]:
    """FP32 mean over ranks and micro-steps of the gradients that BF16 backward gives."""
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for batch in micro_batches:
        (model(batch) / len(micro_batches)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad.float()
            parameter.grad = None
    for gradient in total.values():
        dist.all_reduce(gradient)
    return {name: gradient / dist.get_world_size() for name, gradient in total.items()}


def backward(
    engine: Any, micro_batches: list[Tensor], exact: dict[str, Tensor] | None = None, *, factor: float = 1
) -> dict[str, float]:
    """One step; with `exact`, each parameter's relative error just before the update."""
    errors: dict[str, float] = {}
    for number, batch in enumerate(micro_batches):
        engine.backward(engine(batch) * factor)
        if exact is not None and number == len(micro_batches) - 1:
            errors = gradient_errors(engine.optimizer, exact)
        engine.step()
    return errors


def gradient_errors(handler: FP8ZeROOptimizer, exact: dict[str, Tensor]) -> dict[str, float]:
    """|reduced - exact| / |exact| of each parameter, over all ranks' pieces."""
    squares = {name: torch.zeros((), dtype=torch.float64) for name in exact}
    for _, reduced, shard, _ in handler.parts.by_bucket():
        for piece in shard.pieces:
            name = handler.parameter_names[piece.slot.parameter]
            values = decode(reduced.blocks[piece.rows]).view(-1)[: piece.numel]
            mean = values * handler._gradient_scale()
            squares[name] += (mean - exact[name].view(-1)[piece.elements]).double().square().sum()
    for total in squares.values():
        dist.all_reduce(total)
    return {name: (total.sqrt() / exact[name].double().norm()).item() for name, total in squares.items()}


def assert_gradients(found: dict[str, list[Any]]) -> None:
    for step, (norm, stock) in enumerate(zip(found["norms"], found["stock_norms"], strict=True)):
        assert abs(norm / stock - 1) < NORM_BOUND, f"step {step}: norm {norm:.5f}, stock {stock:.5f}"
    for step, errors in enumerate(found["errors"]):
        name, worst = max(errors.items(), key=lambda item: item[1])
        assert worst < GRADIENT_BOUND, f"step {step}: gradient of {name} is off by {worst:.4f}"


@grid(world_size=[1, 2, 3], stage=[1, 2], micro_steps=[1, 3], clipping=[0.0, 0.5])
def test_gradients(ranks: RankPools, world_size: int, stage: int, micro_steps: int, clipping: float) -> None:
    assert_gradients(ranks.run(world_size, measure_gradients, stage, micro_steps, clipping, None)[0])


@pytest.mark.parametrize(
    ("planted", "micro_steps"), [("no 1/N", 1), ("no 1/accumulation", 3), ("one rank dropped", 1)]
)
def test_gradient_check_notices(ranks: RankPools, planted: str, micro_steps: int) -> None:
    found = ranks.run(2, measure_gradients, 2, micro_steps, 0.0, planted)[0]
    with pytest.raises(AssertionError):
        assert_gradients(found)
    assert max(max(errors.values()) for errors in found["errors"]) > GRADIENT_BOUND


SPLIT_OR_WHOLE = {"exp_avg_dtype": "e4m3", "exp_avg_sq_dtype": "ue4m4"}


def masters_and_weights(master: str, steps: int) -> dict[str, Any]:
    engine = build_gpt(ds_config({"optimizer": {"master_dtype": master, **SPLIT_OR_WHOLE}}))
    train_losses(engine, batches(engine), steps)
    masters = {name: safe_get_full_fp32_param(each) for name, each in engine.module.named_parameters()}
    weights = weight_bits(engine)
    engine.destroy()
    return {"masters": masters, "weights": weights}


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_split16_is_an_fp32_master_bit_for_bit(ranks: RankPools, steps: int) -> None:
    whole, split = (ranks.run(2, masters_and_weights, name, steps)[0] for name in ("fp32", "split16"))
    assert_same_bits(split["masters"], whole["masters"])
    assert_same_bits(split["weights"], whole["weights"])
