"""Nothing is left of a gradient that was dropped, replaced, rolled back or cut off by an error."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import assert_same_bits, batches, build, build_gpt, ds_config, state_bits, weight_bits, zero3
from ranks import RankPools
from torch import Tensor, nn

JUNK = 1000.0


def backward(engine: Any, batch: Tensor, factor: float = 1.0) -> None:
    engine.backward(engine(batch) * factor)


def zero_grad(engine: Any, batch: Tensor, folder: str) -> None:
    backward(engine, batch, JUNK)
    engine.optimizer.zero_grad()


def engine_zero_grad(engine: Any, batch: Tensor, folder: str) -> None:
    backward(engine, batch, JUNK)
    engine.zero_grad()


def not_a_number(engine: Any, batch: Tensor, folder: str) -> None:
    backward(engine, batch, math.nan)
    engine.zero_grad()


def rolled_back(engine: Any, batch: Tensor, folder: str) -> None:
    engine.save_checkpoint(folder)
    backward(engine, batch, JUNK)
    engine.load_checkpoint(folder)


def cut_off(engine: Any, batch: Tensor, folder: str) -> None:
    """An error in the middle of backward, on every rank, after some buckets have left."""

    def fail(_: Tensor) -> Tensor:
        raise ArithmeticError("planted")

    handle = engine.module.blocks[0].up.weight.register_hook(fail)
    with pytest.raises(ArithmeticError, match="planted"):
        backward(engine, batch, JUNK)
    handle.remove()
    engine.zero_grad()


def too_many_skips(engine: Any, batch: Tensor, folder: str) -> None:
    for _ in range(2):
        backward(engine, batch, math.nan)
        engine.step()
    backward(engine, batch, math.nan)
    with pytest.raises(RuntimeError, match="max_consecutive_skips"):
        engine.step()


LEFTOVERS: list[Callable[[Any, Tensor, str], None]] = [
    zero_grad,
    engine_zero_grad,
    not_a_number,
    rolled_back,
    cut_off,
    too_many_skips,
]


def train(
    leave: Callable[[Any, Tensor, str], None] | None, zero: dict[str, Any], node: int, folder: str
) -> list[Any]:
    """Three clean steps, after `leave` has tried to leave something."""
    fp8 = {"max_consecutive_skips": 3, "gradients": {"intra_node_size": node}}
    engine = build_gpt(ds_config(fp8, zero=zero, bucket=4000))
    source: Iterator[Tensor] = batches(engine)
    if leave is not None:
        leave(engine, next(source), folder)
        source = batches(engine)
    norms = []
    for _ in range(3):
        backward(engine, next(source))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    result = [norms, engine.optimizer.overflow, weight_bits(engine)]
    engine.destroy()
    return result


@pytest.mark.parametrize(
    "zero", [{"stage": 1}, {"stage": 2}, {"stage": 2, "overlap_comm": True}], ids=["1", "2", "overlap"]
)
@pytest.mark.parametrize("leave", LEFTOVERS, ids=lambda each: each.__name__)
def test_nothing_is_left(ranks: RankPools, tmp_path: Any, leave: Any, zero: dict[str, Any]) -> None:
    assert_nothing_is_left(ranks, 2, leave, zero, 1, str(tmp_path))


@pytest.mark.parametrize("leave", [cut_off, engine_zero_grad, not_a_number], ids=lambda each: each.__name__)
def test_nothing_is_left_between_two_hops(ranks: RankPools, tmp_path: Any, leave: Any) -> None:
    assert_nothing_is_left(ranks, 4, leave, {"overlap_comm": True}, 2, str(tmp_path))


@pytest.mark.parametrize("leave", [cut_off, engine_zero_grad, too_many_skips], ids=lambda each: each.__name__)
def test_nothing_is_left_under_zero_3(ranks: RankPools, tmp_path: Any, leave: Any) -> None:
    """Ranks whose buckets have left at different speeds, too."""
    zero = {"stage": 3, "overlap_comm": True, **zero3(reuse=0)}
    assert_nothing_is_left(ranks, 2, leave, zero, 1, str(tmp_path))
    if leave is cut_off:
        assert_nothing_is_left(ranks, 4, leave, zero, 2, str(tmp_path))


def assert_nothing_is_left(
    ranks: RankPools, world_size: int, leave: Any, zero: dict[str, Any], node: int, folder: str
) -> None:
    clean = ranks.run(world_size, train, None, zero, node, folder, seconds=60)
    after = ranks.run(world_size, train, leave, zero, node, folder, seconds=60)
    for (norms, overflow, weights), (norms2, overflow2, weights2) in zip(clean, after, strict=True):
        assert norms == norms2
        assert overflow is overflow2 is False
        assert_same_bits(weights, weights2)


def replaced_parameters(stage: int) -> str:
    engine = build_gpt(ds_config({}, stage=stage))
    engine.module.load_state_dict(engine.module.state_dict(), assign=True)
    for parameter in engine.module.parameters():
        parameter.requires_grad_()
    source = batches(engine)
    backward(engine, next(source))
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_that_came_loose_is_told(ranks: RankPools, stage: int) -> None:
    for message in ranks.run(2, replaced_parameters, stage):
        assert "load_state_dict(assign=True)" in message


def refuse(what: str) -> str:
    config = ds_config({"opt_level": "O2"}, stage=1 if what == "fp16 accumulation" else 2)
    model: nn.Module = nn.Linear(8, 8)
    if what == "infinite weight":
        model.weight.data[0, 3] = -math.inf
    if what == "fp16 accumulation":
        config["data_types"] = {"grad_accum_dtype": "fp16"}
    if what == "fp32 accumulation, in FP8":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["fp8"]["gradients"] = {"accum_dtype": "e4m3"}
    try:
        build(config, model)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("infinite weight", ("weight of weight", "not finite", "master_dtype")),
        (
            "fp16 accumulation",
            ("data_types.grad_accum_dtype", "torch.float16", "torch.bfloat16, torch.float32"),
        ),
        (
            "fp32 accumulation, in FP8",
            ("data_types.grad_accum_dtype", "torch.float32", "fp8.gradients.accum"),
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(ranks: RankPools, what: str, words: tuple[str, ...]) -> None:
    for message in ranks.run(2, refuse, what):
        assert all(word in message for word in words), message


def load_partly_refused(folder: str) -> tuple[str, bool]:
    """A checkpoint of which one rank's file is of another run."""
    engine = build_gpt(ds_config({}))
    source = batches(engine)
    backward(engine, next(source))
    engine.step()
    engine.save_checkpoint(folder, tag="whole")
    if torch.distributed.get_rank() == 1:
        path = f"{folder}/whole/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
        saved = torch.load(path, weights_only=False)
        saved["optimizer_state_dict"]["base_optimizer_state"]["fp8"]["seed"] = 9
        torch.save(saved, path)
    torch.distributed.barrier()
    backward(engine, next(source))
    engine.step()
    states, weights, message = state_bits(engine.optimizer), weight_bits(engine), ""
    try:
        engine.load_checkpoint(folder, tag="whole")
    except ValueError as error:
        message = str(error)
    assert_same_bits(state_bits(engine.optimizer), states)
    assert_same_bits(weight_bits(engine), weights)
    engine.destroy()
    return message, True


def test_all_ranks_refuse_what_one_refuses(ranks: RankPools, tmp_path: Any) -> None:
    for message, _ in ranks.run(2, load_partly_refused, str(tmp_path)):
        assert "rank 1: " in message
        assert "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt: " in message


def regrouped(folder: str, save: bool) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[1].parameters(), "lr": 1e-4}]
    config = ds_config({})
    del config["optimizer"]
    optimizer = torch.optim.AdamW(groups if save else groups[::-1])
    engine = build(config, model, optimizer=optimizer)
    try:
        engine.save_checkpoint(folder) if save else engine.load_checkpoint(folder)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_other_param_groups_are_refused(ranks: RankPools, tmp_path: Any) -> None:
    ranks.run(2, regrouped, str(tmp_path), True)
    for message in ranks.run(2, regrouped, str(tmp_path), False):
        assert "group of 0.weight: received 0, expected 1" in message


def kinds_of_adam() -> list[list[bool]]:
    """adam_w_mode of each group, however the optimizer was given."""
    found = []
    for kind in ("AdamW", "Adam", "FP8AdamW"):
        config = ds_config({}, adam_w_mode=False)
        config["optimizer"]["type"] = kind
        engine = build(config, nn.Linear(4, 4))
        found.append([group["adam_w_mode"] for group in engine.optimizer.param_groups])
        engine.destroy()
    model, config = nn.Linear(4, 4), ds_config({})
    del config["optimizer"]
    groups = [
        {"params": [model.weight], "decoupled_weight_decay": False},
        {"params": [model.bias], "decoupled_weight_decay": True},
    ]
    engine = build(config, model, optimizer=torch.optim.Adam(groups))
    found.append([group["adam_w_mode"] for group in engine.optimizer.param_groups])
    engine.destroy()
    return found


def test_decay_is_decoupled_where_it_was_asked_for(ranks: RankPools) -> None:
    assert ranks.run(1, kinds_of_adam)[0] == [[True], [False], [False], [False, True]]
