"""What a user of DeepSpeed sees: optimizers, param groups, schedulers, the banner, refusals."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from engines import (
    SMALL,
    Lines,
    assert_same_bits,
    batches,
    build_gpt,
    ds_config,
    train_losses,
    weight_bits,
    zero3,
)
from meters import live_tensors, storages
from ranks import RankPools
from torch import nn
from train_lm import ByteGPT

import ds_fp8
from ds_fp8.estimate import memory
from ds_fp8.seam import status
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def without_optimizer(**options: Any) -> dict[str, Any]:
    config = ds_config({"opt_level": "O1"}, **options)
    del config["optimizer"]
    return config


def losses_of(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None, config: dict[str, Any]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = ByteGPT(SMALL)
    parameters = list(model.parameters())
    options: dict[str, Any] = (
        {"optimizer": make(parameters)} if make else {"model_parameters": model.parameters()}
    )
    engine = deepspeed.initialize(model=model, config=config, **options)[0]
    losses = train_losses(engine, batches(engine), 5)
    bits = weight_bits(engine)
    engine.destroy()
    return losses, bits


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **HYPER)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, **HYPER)


def fp8_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return ds_fp8.FP8AdamW(parameters, **HYPER)


def named(kind: str, **params: Any) -> dict[str, Any]:
    config = ds_config({"opt_level": "O1"}, **params)
    config["optimizer"]["type"] = kind
    return config


def compare_ways_to_give_an_optimizer() -> None:
    decoupled = losses_of(None, named("AdamW"))
    for make, config in (
        (None, named("Adam")),
        (None, named("FP8AdamW")),
        (None, named("AdamW", torch_adam=True)),
        (adamw, without_optimizer()),
        (fp8_adamw, without_optimizer()),
    ):
        losses, bits = losses_of(make, config)
        assert losses == decoupled[0]
        assert_same_bits(bits, decoupled[1])

    coupled = losses_of(None, named("Adam", adam_w_mode=False))
    assert coupled[0] != decoupled[0]
    losses, bits = losses_of(adam, without_optimizer())
    assert losses == coupled[0]
    assert_same_bits(bits, coupled[1])


def test_every_way_to_give_an_optimizer_is_the_same(ranks: RankPools) -> None:
    ranks.run(2, compare_ways_to_give_an_optimizer)


def grouped(config: dict[str, Any]) -> tuple[list[float], list[list[float]]]:
    """Two groups, a scheduler made by the client before DeepSpeed replaces its optimizer."""
    torch.manual_seed(0)
    model = ByteGPT(SMALL)
    matrices = [each for each in model.parameters() if each.ndim > 1]
    vectors = [each for each in model.parameters() if each.ndim < 2]
    groups = [
        {"params": matrices, "lr": 1e-3, "weight_decay": 0.1},
        {"params": vectors, "lr": 3e-3, "weight_decay": 0.0},
    ]
    client = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(client, lambda step: min(1.0, (step + 1) / 5))
    engine = deepspeed.initialize(model=model, optimizer=client, lr_scheduler=scheduler, config=config)[0]
    source = batches(engine)
    losses, rates = [], []
    for _ in range(10):
        losses += train_losses(engine, source, 1)
        rates.append(engine.get_lr())
    engine.destroy()
    return losses, rates


def test_param_groups_and_a_client_scheduler(ranks: RankPools) -> None:
    stock_config = ds_config()
    del stock_config["optimizer"]
    ours, rates = ranks.run(2, grouped, without_optimizer())[0]
    stock, stock_rates = ranks.run(2, grouped, stock_config)[0]
    assert rates == stock_rates
    assert rates[0] != rates[5]
    assert max(abs(a - b) for a, b in zip(ours, stock, strict=True)) < 0.02


def with_scheduler(section: dict[str, Any], fp8: dict[str, Any] | None) -> tuple[list[float], list[Any]]:
    engine = build_gpt(ds_config(fp8, scheduler=section))
    source = batches(engine)
    rates, losses = [], []
    for _ in range(8):
        losses += train_losses(engine, source, 1)
        rates.append(engine.get_lr())
    engine.destroy()
    return losses, rates


def test_a_deepspeed_scheduler(ranks: RankPools) -> None:
    section = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 5}}
    ours, rates = ranks.run(2, with_scheduler, section, {"opt_level": "O1"})[0]
    stock, stock_rates = ranks.run(2, with_scheduler, section, None)[0]
    assert rates == stock_rates
    assert max(abs(a - b) for a, b in zip(ours, stock, strict=True)) < 0.02


def banner(config: dict[str, Any]) -> tuple[list[str], bool, Any]:
    lines, logger = Lines(), logging.getLogger("ds_fp8")
    logger.addHandler(lines)
    engine = build_gpt(config)
    logger.removeHandler(lines)
    active = ds_fp8.is_active(engine)
    try:
        facts = ds_fp8.describe(engine)
    except ValueError as error:
        facts = str(error)
    engine.destroy()
    return lines.lines, active, facts


def test_banner_and_description(ranks: RankPools) -> None:
    lines, active, facts = ranks.run(2, banner, ds_config({"opt_level": "O2"}))[0]
    assert active
    assert (facts["exp_avg"], facts["gradients"]) == ("int8", "e4m3")
    assert facts["state_bytes_per_parameter"] == 5 + 3 / 128
    assert facts["gradient_bytes_per_parameter"] == facts["wire_bytes_per_gradient_element"] == 1 + 1 / 128
    assert sum(": ON" in line for line in lines) == 1
    assert "6.03 bytes per parameter" in " ".join(lines)

    lines, active, facts = ranks.run(2, banner, ds_config({"opt_level": "O2"}, micro_steps=2))[0]
    assert "9.02 bytes per parameter" in " ".join(lines)

    lines, active, facts = ranks.run(2, banner, ds_config())[0]
    assert not active
    assert sum(": OFF" in line for line in lines) == 1
    assert "does not use ds_fp8" in facts


@pytest.mark.parametrize(
    "facts",
    [
        {"opt_level": "O3", "products": "cublas", "offload": "stream"},
        {"opt_level": "O3", "products": "decoded", "offload": "host"},
        {"opt_level": "O2+", "model_parallel_size": 8, "offload": "stream"},
    ],
    ids=str,
)
def test_the_banner_fits_a_terminal(facts: dict[str, Any]) -> None:
    about = {"version": ds_fp8.__version__, "zero_stage": 3, "world_size": 1024, "model_parallel_size": 1}
    held = {"state_bytes_per_parameter": 5.02, "gradient_bytes_per_parameter": 4.0, "kernels": "triton"}
    line = status.banner({**about, **held, **facts})
    assert len(f"[ds_fp8] {line}") <= 120
    assert "9.02 bytes per parameter, offload" in line


def test_keys_without_effect_are_named(ranks: RankPools) -> None:
    config = ds_config({})
    config["zero_optimization"]["contiguous_gradients"] = True
    lines = ranks.run(1, banner, config)[0][0]
    assert any("without effect" in line and "contiguous_gradients" in line for line in lines)


def micro_steps_beyond_the_config(accum_dtype: str | None) -> tuple[str, list[str]]:
    """Two micro-steps per step where the config says one, as Hugging Face does it."""
    section = {"gradients": {"accum_dtype": accum_dtype}} if accum_dtype else {}
    lines, logger = Lines(), logging.getLogger("ds_fp8")
    logger.addHandler(lines)
    engine = build_gpt(ds_config(section, bucket=10_000))
    source = batches(engine)
    for boundary in (False, True, False, True):
        engine.set_gradient_accumulation_boundary(boundary)
        engine.backward(engine(next(source)))
        engine.step()
    formats = {reduced.blocks.format.name for reduced in engine.optimizer.parts.reduced}
    engine.destroy()
    logger.removeHandler(lines)
    return "/".join(formats), [line for line in lines.lines if "second micro-step" in line]


@pytest.mark.parametrize(
    ("accum_dtype", "expected", "told"),
    [(None, "fp32", 1), ("e4m3", "e4m3", 0), ("bf16", "bf16", 0), ("fp32", "fp32", 0)],
)
def test_an_unannounced_micro_step_turns_the_gradient_fp32(
    ranks: RankPools, accum_dtype: str | None, expected: str, told: int
) -> None:
    formats, lines = ranks.run(2, micro_steps_beyond_the_config, accum_dtype)[0]
    assert formats == expected
    assert len(lines) == told


def refusal(make: Callable[..., Any] | None, config: dict[str, Any], model: nn.Module | None = None) -> str:
    torch.manual_seed(0)
    module = model or ByteGPT(SMALL)
    options = {"optimizer": make(list(module.parameters()))} if make else {}
    try:
        deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config, **options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def amsgrad(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, amsgrad=True)


def maximize(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, maximize=True)


def stranger(_: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (sgd, ("SGD", "torch.optim.AdamW")),
        (amsgrad, ("amsgrad", "True", "false")),
        (maximize, ("maximize", "True", "false")),
        (stranger, ("[3]", "not in the model")),
    ],
)
def test_client_optimizers_are_refused(
    ranks: RankPools, make: Callable[..., Any], words: tuple[str, ...]
) -> None:
    message = ranks.run(1, refusal, make, without_optimizer())[0]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"momentum": 0.9}, ("optimizer.params.momentum", "0.9", "betas")),
        ({"max_grad_norm": 1.0}, ("optimizer.params.max_grad_norm", "1.0")),
        ({"amsgrad": True}, ("optimizer.params.amsgrad", "true")),
        ({"betas": [0.9, 1.0]}, ("optimizer.params.betas.1", "1.0", "less than 1")),
        ({"eps": 1e-60}, ("optimizer.params.eps", "1e-60", "more than 0 in FP32")),
        ({"lr": "1e-3"}, ("optimizer.params.lr", '"1e-3"', "number")),
        ({"lr": True}, ("optimizer.params.lr", "true", "number")),
        ({"lr": None}, ("optimizer.params.lr", "null", "number")),
        ({"betas": 0.9}, ("optimizer.params.betas", "0.9", "list")),
        ({"adam_w_mode": "false"}, ("optimizer.params.adam_w_mode", '"false"', "true, false")),
        ({"eps": 0.0}, ("optimizer.params.eps", "0.0", "more than 0")),
        ({"lr": -1.0}, ("optimizer.params.lr", "-1.0", "0 or more")),
    ],
)
def test_optimizer_params_are_refused(
    ranks: RankPools, params: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = ranks.run(1, refusal, None, ds_config({}, **params))[0]
    assert all(word in message for word in words), message


def test_no_optimizer_is_refused(ranks: RankPools) -> None:
    assert "received none" in ranks.run(1, refusal, None, without_optimizer())[0]


def reference() -> dict[str, Any]:
    """An engine without ZeRO and without an optimizer beside a trained one of the same section."""
    engine, frozen = build_gpt(ds_config({})), build_gpt(without_optimizer(stage=0))
    batch = next(batches(engine))
    with torch.no_grad():
        losses = [each(batch).item() for each in (engine, frozen)]
    kinds = [ds_fp8.is_active(each) for each in (engine, frozen)]
    engine.destroy()
    return {"losses": losses, "active": kinds, "lines": banner(without_optimizer(stage=0))[0]}


def test_an_engine_without_zero_and_optimizer_has_nothing_to_do(ranks: RankPools) -> None:
    found = ranks.run(2, reference)[0]
    assert found["active"] == [True, False]
    assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-2)
    assert any(": IDLE" in line for line in found["lines"])


@pytest.mark.parametrize("make", [adamw, sgd])
def test_zero_0_with_an_optimizer_is_refused(ranks: RankPools, make: Callable[..., Any]) -> None:
    message = ranks.run(1, refusal, make, without_optimizer(stage=0))[0]
    assert message.startswith(
        "zero_optimization.stage: received 0, allowed: 1, 2, 3 with fp8 enabled (stage 1"
    )
    message = ranks.run(1, refusal, None, ds_config({}, stage=0))[0]
    assert message.startswith(
        "zero_optimization.stage: received 0, allowed: 1, 2, 3 with fp8 enabled (stage 1"
    )


def test_sparse_embedding_is_refused(ranks: RankPools) -> None:
    model = nn.Sequential(nn.Embedding(4, 4, sparse=True))
    assert "0.sparse" in ranks.run(1, refusal, None, ds_config({}), model)[0]


def test_a_split_master_without_bf16_weights_is_refused(ranks: RankPools) -> None:
    message = ranks.run(1, refusal, None, ds_config({"opt_level": "O2+"}, bf16=False))[0]
    assert message.startswith("dtype of tokens.weight: received")
    assert "torch.float32" in message
    assert message.endswith("allowed: torch.bfloat16 beside a master split16")


def test_config_is_refused_before_the_model_is_touched(ranks: RankPools) -> None:
    config = ds_config({"gradients": {"dtype": "fp4"}})
    assert "fp8.gradients.dtype" in ranks.run(1, refusal, None, config)[0]


def odd_parameters() -> list[float]:
    """Frozen, unused, empty and one-element parameters, one larger than a bucket, FP32 weights."""
    torch.manual_seed(0)
    model = ByteGPT(SMALL)
    model.blocks[0].requires_grad_(False)
    model.unused = nn.Linear(7, 5)
    model.empty = nn.Parameter(torch.zeros(0))
    model.one = nn.Parameter(torch.ones(1))
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config({}, bf16=False, bucket=4000)
    )[0]
    frozen = engine.module.blocks[0].up.weight.detach().clone()
    losses = train_losses(engine, batches(engine), 10)
    assert torch.equal(engine.module.blocks[0].up.weight, frozen)
    assert isinstance(engine.optimizer, FP8ZeROOptimizer)
    engine.destroy()
    return losses


def test_odd_parameters_train(ranks: RankPools) -> None:
    losses = ranks.run(3, odd_parameters)[0]
    assert losses[-1] < losses[0] - 0.3


def monitored(folder: str) -> None:
    config = ds_config({})
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "csv"}
    config["tensorboard"] = {"enabled": True, "output_path": folder, "job_name": "board"}
    engine = build_gpt(config)
    train_losses(engine, batches(engine), 3)
    engine.destroy()


def test_monitors(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, monitored, str(tmp_path))
    rates = (tmp_path / "csv" / "Train_Samples_lr.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in rates[1:]] == ["0.001"] * 3
    assert list((tmp_path / "board").glob("events*"))


def logged_traffic() -> dict[str, Any]:
    config = ds_config({})
    config["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True}
    engine = build_gpt(config)
    train_losses(engine, batches(engine), 1)
    sizes = dict(deepspeed.comm.comm.comms_logger.comms_dict)
    deepspeed.comm.comm.comms_logger.enabled = False
    handler = engine.optimizer
    expected = sum(sum(memory.hop_bytes(handler.recipe, each)) for each in handler.parts.buckets)
    engine.destroy()
    return {"exchanged": list(sizes["all_to_all_single"]), "expected": expected}


def test_comms_logger_sees_the_exchange(ranks: RankPools) -> None:
    for found in ranks.run(2, logged_traffic):
        assert found["exchanged"] == [found["expected"]]


def side_by_side() -> None:
    """Two FP8 engines and a stock one, stepped in turn, train as each would alone."""
    alone = []
    for seed in (0, 1):
        engine = build_gpt(ds_config({}), seed=seed)
        alone.append(train_losses(engine, batches(engine, seed), 5))
        engine.destroy()
    engines = [build_gpt(ds_config({}), seed=seed) for seed in (0, 1)]
    stock = build_gpt(ds_config())
    sources = [batches(engine, seed) for seed, engine in enumerate(engines)]
    together: list[list[float]] = [[], []]
    others = batches(stock)
    for _ in range(5):
        for number, engine in enumerate(engines):
            together[number] += train_losses(engine, sources[number], 1)
        train_losses(stock, others, 1)
    assert together == alone

    first, second = engines
    states, before = first.optimizer.nbytes, sum(storages(live_tensors()).values())
    first.destroy()
    assert not any(hasattr(each, "_hp_mapping") for each in first.module.parameters())
    assert not any(each._post_accumulate_grad_hooks for each in first.module.parameters())
    assert before - sum(storages(live_tensors()).values()) >= states > 0
    assert train_losses(second, sources[1], 1)
    second.destroy()
    stock.destroy()


def test_engines_side_by_side(ranks: RankPools) -> None:
    ranks.run(2, side_by_side)


def losses_compiled(stage: int, keys: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor], bool]:
    engine = build_gpt({**ds_config({}, stage=stage, zero=zero3() if stage == 3 else {}), **keys})
    engine.compile(backend="aot_eager")
    losses = train_losses(engine, batches(engine), 3)
    taken_over = engine.is_deepcompile_enabled() or engine.is_deepcompile_active()
    bits = weight_bits(engine)
    engine.destroy()
    return losses, bits, taken_over


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepcompile_is_torch_compile(ranks: RankPools, stage: int) -> None:
    """DeepCompile refuses this backend; with the key our engines train as without it, to the bit."""
    keys: tuple[dict[str, Any], ...] = ({}, {"compile": {"deepcompile": True, "passes": ["z3"]}})
    without, beside = (ranks.run(2, losses_compiled, stage, each)[0] for each in keys)
    assert not beside[2]
    assert beside[0] == without[0]
    assert_same_bits(beside[1], without[1])
