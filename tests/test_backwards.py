"""What counts as a backward: what PyTorch counts, each divided as `engine.backward` divides."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import Lines, assert_same_bits, build, build_gpt, ds_config, weight_bits
from ranks import RankPools
from torch import Tensor, nn

BF16_WIRE = {"opt_level": "O1", "gradients": {"dtype": "bf16"}}


def small(stage: int, micro_steps: int = 1, **options: Any) -> Any:
    """An engine of a model in FP32 whose gradients travel in BF16 and whose steps move nothing."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    config = ds_config(
        options.pop("fp8", BF16_WIRE),
        stage=stage,
        micro_steps=micro_steps,
        clipping=0.0,
        bf16=False,
        lr=0.0,
        weight_decay=0.0,
    )
    config.update(options)
    del config["optimizer"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    return build(config, model, optimizer=optimizer)


def data(number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    return torch.randn(6, 8, generator=generator)


def loss_of(engine: Any, number: int = 0) -> Tensor:
    loss: Tensor = engine(data(number)).square().mean()
    return loss


def norm_after_step(engine: Any) -> float:
    for _ in range(engine.gradient_accumulation_steps()):
        engine.step()
    return float(engine.get_global_grad_norm())


# Line 4: each program, and one with one plain backward that must give the same gradient.


def two_losses_of_one_forward(engine: Any) -> None:
    output = engine(data())
    engine.backward(output[:, 0].square().mean(), retain_graph=True)
    engine.backward(output[:, 1:].square().mean())


def the_same_in_torch_style(engine: Any) -> None:
    output = engine(data())
    output[:, 0].square().mean().backward(retain_graph=True)
    output[:, 1:].square().mean().backward()


def their_sum(engine: Any) -> None:
    output = engine(data())
    engine.backward(output[:, 0].square().mean() + output[:, 1:].square().mean())


def two_forwards_in_torch_style(engine: Any) -> None:
    (loss_of(engine, 0) + loss_of(engine, 1)).backward()


def two_forwards_before_two_backwards(engine: Any) -> None:
    losses = loss_of(engine, 0), loss_of(engine, 1)
    for loss in losses:
        loss.backward()


def two_whole_backwards(engine: Any) -> None:
    engine.backward(loss_of(engine, 0))
    engine.backward(loss_of(engine, 1))


def sum_of_two_forwards(engine: Any) -> None:
    engine.backward(loss_of(engine, 0) + loss_of(engine, 1))


def penalty(engine: Any) -> Tensor:
    return loss_of(engine) + engine.module[0].weight.square().sum()


def a_term_beside_the_output(engine: Any) -> None:
    penalty(engine).backward()


def the_same_term(engine: Any) -> None:
    engine.backward(penalty(engine))


def autograd_grad_on_one_rank(engine: Any) -> None:
    """Saliency on rank 0, between backwards; rank 0 does not wait for rank 1."""
    if dist.get_rank() == 0:
        x = data(5).requires_grad_()
        torch.autograd.grad(engine(x).sum(), x)
        torch.autograd.grad(engine(data(6)).sum(), engine.module[0].weight)
        output = engine(data(7))
        torch.autograd.grad(output.sum(), output)
    engine.backward(loss_of(engine))


def after_autograd_grad_of_its_graph(engine: Any) -> None:
    loss = loss_of(engine)
    torch.autograd.grad(loss, engine.module[0].weight, retain_graph=True)
    loss.backward()


def nothing_between(engine: Any) -> None:
    engine.backward(loss_of(engine))


def not_through_the_engine(engine: Any) -> None:
    engine.module(data()).square().mean().backward()


def towards_a_few(engine: Any) -> None:
    loss = loss_of(engine)
    first, *rest = engine.module.parameters()
    loss.backward(inputs=[first], retain_graph=True)
    loss.backward(inputs=rest)


def after_zero_grad(engine: Any) -> None:
    engine.backward(1000 * loss_of(engine, 4))
    engine.zero_grad()
    engine.backward(loss_of(engine))


def after_the_clients_zero_grad(engine: Any) -> None:
    engine.backward(1000 * loss_of(engine, 4))
    engine.client_optimizer.zero_grad()
    engine.backward(loss_of(engine))


SAME: list[tuple[Callable[[Any], None], Callable[[Any], None]]] = [
    (two_losses_of_one_forward, their_sum),
    (the_same_in_torch_style, their_sum),
    (two_forwards_in_torch_style, sum_of_two_forwards),
    (two_forwards_before_two_backwards, sum_of_two_forwards),
    (two_whole_backwards, sum_of_two_forwards),
    (a_term_beside_the_output, the_same_term),
    (autograd_grad_on_one_rank, nothing_between),
    (after_autograd_grad_of_its_graph, nothing_between),
    (not_through_the_engine, nothing_between),
    (towards_a_few, nothing_between),
    (after_zero_grad, nothing_between),
    (after_the_clients_zero_grad, nothing_between),
]


def norms(stage: int, micro_steps: int) -> list[tuple[str, float, float]]:
    engine, found = small(stage, micro_steps), []
    for pair in SAME:
        both = []
        for program in pair:
            program(engine)
            both.append(norm_after_step(engine))
        found.append((pair[0].__name__, *both))
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_line_4_gradients_add_up_whatever_backward_they_come_from(
    ranks: RankPools, stage: int, micro_steps: int
) -> None:
    for found in ranks.run(2, norms, stage, micro_steps, seconds=60):
        for name, norm, expected in found:
            assert norm == pytest.approx(expected, rel=0.01), name


def read_after(program: Callable[[Any], None]) -> dict[str, Tensor]:
    """Whole gradients, before the step, as DeepSpeed's utility gives them."""
    engine = small(2)
    program(engine)
    found = {name: safe_get_full_grad(each).clone() for name, each in engine.module.named_parameters()}
    engine.destroy()
    return found


def test_line_4_a_retained_graph_leaves_nothing_beside_the_sum(ranks: RankPools) -> None:
    """safe_get_full_grad would give what is left in .grad instead."""
    (found, _), (expected, _) = (ranks.run(2, read_after, each) for each in SAME[1])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0.02, atol=1e-4, msg=name)


def slopes() -> tuple[float, float]:
    """The slope that a gradient penalty is made of: not divided by the micro-steps."""
    engine = small(2, micro_steps=3)
    x = data().requires_grad_()
    slope = torch.autograd.grad(engine(x).sum(), x)[0]
    expected = torch.autograd.grad(engine.module(x).sum(), x)[0]
    engine.destroy()
    return slope.norm().item(), expected.norm().item()


def test_line_4_autograd_grad_is_not_divided(ranks: RankPools) -> None:
    for slope, expected in ranks.run(2, slopes):
        assert slope == pytest.approx(expected)


def retained_with_timers() -> float:
    engine = small(2, wall_clock_breakdown=True)
    two_losses_of_one_forward(engine)
    two_forwards_in_torch_style(engine)
    return norm_after_step(engine)


def test_line_4_timers_run_with_several_backwards(ranks: RankPools) -> None:
    """DeepSpeed's timers refuse to start twice and to stop twice."""
    assert min(ranks.run(2, retained_with_timers)) > 0


def not_synchronised() -> tuple[float, float]:
    """What a backward without reduction has left is not lost in the step (ZeRO 1)."""
    engine = small(1)
    engine.backward(loss_of(engine, 0))
    with engine.no_sync():
        engine.backward(loss_of(engine, 1))
    found = norm_after_step(engine)
    engine.destroy()
    engine = small(1)
    sum_of_two_forwards(engine)
    return found, norm_after_step(engine)


def test_line_4_gradients_of_no_sync_count(ranks: RankPools) -> None:
    for found, expected in ranks.run(2, not_synchronised):
        assert found == pytest.approx(expected, rel=0.01)


def cut_off_and_stepped(stage: int) -> tuple[str, list[str], float, float]:
    """step() after a backward that raised half-way; then a forward after one, and a whole backward."""
    engine = small(stage)
    handler = Lines()
    said = handler.lines
    logging.getLogger("ds_fp8").addHandler(handler)

    def fail(_: Tensor) -> None:
        raise ArithmeticError("planted")

    def cut_off() -> None:
        hook = engine.module[0].weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            engine.backward(loss_of(engine))
        hook.remove()

    cut_off()
    with pytest.raises(RuntimeError) as caught:
        engine.step()
    engine.backward(loss_of(engine))
    clean = norm_after_step(engine)
    cut_off()
    engine.backward(loss_of(engine))
    after = norm_after_step(engine)
    logging.getLogger("ds_fp8").removeHandler(handler)
    engine.destroy()
    return str(caught.value), said, clean, after


@pytest.mark.parametrize("stage", [1, 2])
def test_line_4_a_backward_that_raised_is_named(ranks: RankPools, stage: int) -> None:
    for message, said, clean, after in ranks.run(2, cut_off_and_stepped, stage, seconds=60):
        assert "after a backward that did not finish: all gradients" in message
        assert sum("all gradients since the last step are dropped" in each for each in said) == 1
        assert after == clean


def unscaled(dynamic: bool) -> str:
    """A loss without the loss scale that the config asks for."""
    engine = small(2)
    engine.optimizer.loss_scaler = SimpleNamespace(loss_scale=1024.0, dynamic=dynamic)
    try:
        loss_of(engine).backward()
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize("dynamic", [False, True])
def test_line_4_an_unscaled_loss_is_refused(ranks: RankPools, dynamic: bool) -> None:
    for message in ranks.run(2, unscaled, dynamic):
        assert "engine.scale(loss).backward()" in message


# Line 3


def hooked(stage: int, how: str, overlap: bool) -> tuple[float, int]:
    """Norm with gradients clipped by value in a hook, and how often it saw none."""
    missed = []

    def clip(parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            missed.append(1)
        else:
            parameter.grad.clamp_(-0.01, 0.01)

    config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100, "overlap_comm": overlap}}
    engine = small(stage, **config)
    for parameter in engine.module.parameters():
        if how == "post-accumulate":
            parameter.register_post_accumulate_grad_hook(clip)
        else:
            parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    engine.backward(loss_of(engine))
    norm = norm_after_step(engine)
    engine.destroy()
    return norm, len(missed)


@pytest.mark.parametrize(("stage", "overlap"), [(1, False), (2, False), (2, True)])
def test_line_3_hooks_that_come_later_see_the_gradient_and_count(
    ranks: RankPools, stage: int, overlap: bool
) -> None:
    (found, missed), _ = ranks.run(2, hooked, stage, "post-accumulate", overlap)
    (expected, _), _ = ranks.run(2, hooked, stage, "register_hook", overlap)
    assert missed == 0
    assert found == expected


# Line 2


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def from_a_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, model.parameters())


def cast_and_back(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    model.double().to(dtype)


def swapped_and_restored(model: nn.Module) -> None:
    kept = [each.data.clone() for each in model.parameters()]
    for each in model.parameters():
        each.data.add_(0.01)
    for each, old in zip(model.parameters(), kept, strict=True):
        each.data = old


def transposed_twice(model: nn.Module) -> None:
    """The values again, in memory that is walked the other way."""
    for each in model.parameters():
        if each.dim() == 2:
            each.data = each.data.t().contiguous().t()


REBOUND = [channels_last, from_a_vector, cast_and_back, swapped_and_restored, transposed_twice]


def rebound(stage: int, level: str, rebind: Callable[[nn.Module], None] | None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 8))
    config = ds_config({"opt_level": level}, stage=stage, bf16=True, lr=1e-2, bucket=200)
    engine = build(config, model)
    for step in range(4):
        if step == 2 and rebind is not None:
            rebind(engine.module)
        generator = torch.Generator().manual_seed(step + 10 * dist.get_rank())
        x = torch.randn(4, 2, 4, 4, generator=generator).bfloat16()
        engine.backward(engine(x).float().square().mean())
        engine.step()
    weights = weight_bits(engine)
    engine.destroy()
    return weights


@pytest.mark.parametrize(("stage", "level"), [(1, "O1"), (2, "O2"), (2, "O2+")])
def test_line_2_rebound_weights_train_on(ranks: RankPools, stage: int, level: str) -> None:
    """The same values in other memory: not a bit of the training changes."""
    expected = ranks.run(2, rebound, stage, level, None)
    for rebind in REBOUND:
        for found, wanted in zip(ranks.run(2, rebound, stage, level, rebind), expected, strict=True):
            assert_same_bits(found, wanted)


def _export(folder: str) -> dict[str, Tensor]:
    """The weights that DeepSpeed's zero_to_fp32 gets from masters, with those of the model file."""
    model = torch.load(f"{folder}/edited/mp_rank_00_model_states.pt", weights_only=False)["module"]
    masters = get_fp32_state_dict_from_zero_checkpoint(folder, tag="edited")
    return {"file": model["head.weight"], "masters": masters["head.weight"]}


def edited(level: str, folder: str) -> tuple[float, float, list[str]]:
    """Weights doubled through .data: masters as saved, weights after a step of rate 0; what was said."""
    handler = Lines()
    said = handler.lines
    logging.getLogger("ds_fp8").addHandler(handler)
    engine = build_gpt(ds_config({"opt_level": level}, lr=0.0, weight_decay=0.0))
    parameter = engine.module.head.weight
    before = parameter.detach().float().norm()
    for _ in range(2):
        parameter.data = parameter.data * 2
        engine.save_checkpoint(folder, tag="edited")
        saved = _export(folder)
        text = torch.arange(33).view(1, 33)
        engine.backward(engine(text))
        engine.step()
    assert torch.equal(saved["file"].float().norm() / before, torch.tensor(2.0 if level != "O2+" else 4.0))
    factors = [float(each.float().norm() / before) for each in (saved["masters"], parameter.detach())]
    logging.getLogger("ds_fp8").removeHandler(handler)
    engine.destroy()
    return factors[0], factors[1], [each for each in said if "replaced through .data" in each]


@pytest.mark.parametrize(("level", "saved", "stepped"), [("O1", 1, 1), ("O2", 1, 1), ("O2+", 4, 4)])
def test_line_2_masters_do_not_follow_but_split_ones(
    ranks: RankPools, tmp_path: Any, level: str, saved: float, stepped: float
) -> None:
    results = ranks.run(2, edited, level, str(tmp_path))
    for found_saved, found_stepped, _ in results:
        assert found_saved == pytest.approx(saved, rel=0.01)
        assert found_stepped == pytest.approx(stepped, rel=0.01)
    lines = [line for *_, said in results for line in said]
    assert len(lines) == (0 if level == "O2+" else 1), "said once, by rank 0"
    assert all("head.weight" in line for line in lines)


def refused(change: str, on: int) -> tuple[str, bool]:
    engine = small(2, fp8={"opt_level": "O2"})
    states = weight_bits(engine)
    weight = engine.module[0].weight
    engine.backward(loss_of(engine))
    if dist.get_rank() == on:
        weight.data = weight.data.double() if change == "dtype" else torch.cat([weight.data, weight.data])
    kept = weight.data
    with pytest.raises(ValueError) as caught:  # noqa: PT011 its words are what the test returns
        engine.step()
    weight.data = kept.float()[:16].clone()
    unchanged = all(torch.equal(states[key], each) for key, each in weight_bits(engine).items())
    engine.backward(loss_of(engine))
    engine.step()
    engine.destroy()
    return str(caught.value), unchanged


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_line_2_another_shape_or_dtype_is_refused_on_every_rank(ranks: RankPools, change: str) -> None:
    for message, unchanged in ranks.run(2, refused, change, 1, seconds=60):
        assert "rank 1: 0.weight: received" in message
        assert "[16, 8] of torch.float32" in message
        assert unchanged


# Line 5


def frozen_since(folder: str, stage: int) -> bool:
    """A layer frozen since, and one unfrozen: saved whole, and loaded into another run."""

    def engine() -> Any:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        model[1].requires_grad_(False)
        return build(ds_config({"opt_level": "O1"}, bf16=False, stage=stage), model)

    first, second = engine(), engine()
    first.backward(first(data()).square().mean())
    first.step()
    first.module[0].requires_grad_(False)
    first.module[1].requires_grad_()
    first.save_checkpoint(folder, tag="frozen")
    assert [each.requires_grad for each in first.module.parameters()] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    second.module[2].requires_grad_(False)
    second.load_checkpoint(folder, tag="frozen")
    masters = get_fp32_state_dict_from_zero_checkpoint(folder, tag="frozen")
    whole = masters.keys() == dict(first.module.named_parameters()).keys() or stage == 1
    assert_same_bits(weight_bits(first), weight_bits(second))
    first.destroy()
    second.destroy()
    return whole


@pytest.mark.parametrize("stage", [1, 2])
def test_line_5_freezing_later_changes_no_checkpoint(ranks: RankPools, tmp_path: Any, stage: int) -> None:
    assert all(ranks.run(2, frozen_since, str(tmp_path), stage, seconds=60))


def strays(what: str) -> tuple[list[str], str]:
    handler = Lines()
    said = handler.lines
    logging.getLogger("ds_fp8").addHandler(handler)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].requires_grad_(False)
    engine, error = build(ds_config({}, bf16=False), model), ""
    for step in range(4):
        if step == 1 and what == "unfrozen":
            model[1].requires_grad_()
        if step == 1 and what == "exchanged":
            model[2] = nn.Linear(8, 4)
        if step == 1 and what == "all exchanged":
            model[0], model[2] = nn.Linear(8, 8), nn.Linear(8, 4)
        engine.backward(engine(data()).square().mean())
        try:
            engine.step()
        except RuntimeError as caught:
            error = str(caught)
            break
    logging.getLogger("ds_fp8").removeHandler(handler)
    engine.destroy()
    return [each for each in said if "no optimizer takes" in each or "no longer in the model" in each], error


def test_line_5_gradients_without_a_taker_are_named_once(ranks: RankPools) -> None:
    (said, _), (other, _) = ranks.run(2, strays, "unfrozen")
    assert other == []
    assert len(said) == 1
    assert "1.weight, 1.bias" in said[0]


def test_line_5_trained_parameters_that_left_are_named_once(ranks: RankPools) -> None:
    (said, _), _ = ranks.run(2, strays, "exchanged")
    assert len(said) == 2
    assert all("2.weight, 2.bias" in each for each in said)


def test_line_5_the_error_names_the_causes(ranks: RankPools) -> None:
    for _, error in ranks.run(2, strays, "all exchanged"):
        assert "step() without a gradient" in error
        assert "no longer in the model" in error
        assert "0.weight" in error


def test_line_5_nothing_is_said_where_nothing_is_wrong(ranks: RankPools) -> None:
    assert ranks.run(2, strays, "nothing") == [([], "")] * 2
