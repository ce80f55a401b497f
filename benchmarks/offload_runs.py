"""Engines with states on the GPU and in host memory, and a check that they produce the same bytes."""

import argparse
from typing import Any
from unittest.mock import patch

import torch
from llama import batches, model_of, options
from torch import Tensor

from ds_fp8.zero_fp8.checkpoint import writer
from ds_fp8.zero_fp8.states import visits

WAYS = ("stock", "stock_torch", "resident", "stream", "host", "auto")
OFFLOADED = ("stream", "host")
CHUNK = 1 << 14  # elements: a small model has several chunks, whose ends lie within parameters


def config_of(arguments: argparse.Namespace, where: str) -> dict[str, Any]:
    """Return the ds_config of a way to train."""
    params: dict[str, Any] = {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}
    zero: dict[str, Any] = {
        "stage": arguments.stage,
        "overlap_comm": True,
        "reduce_bucket_size": arguments.bucket,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.micro_steps,
        "gradient_clipping": arguments.clipping,
        "optimizer": {"type": "AdamW", "params": params},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }
    if where != "resident":
        zero["offload_optimizer"] = {"device": "cpu"}
    if where == "stock_torch":
        params["torch_adam"] = True
        config["zero_force_ds_cpu_optimizer"] = False
    if not where.startswith("stock"):
        config["fp8"] = {"enabled": True, "opt_level": arguments.level}
    if where in (*OFFLOADED, "auto"):
        config["fp8"]["offload"] = {"executor": where, "ratio": arguments.ratio}
    return config


def engine_of(arguments: argparse.Namespace, where: str, device: torch.device) -> Any:
    import deepspeed

    model = model_of(arguments, device)
    config = config_of(arguments, where)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def bytes_of(engine: Any) -> dict[str, Tensor]:
    """Return weights and states, on the host."""
    packed = writer.pack(engine.optimizer.parts.shards, engine.optimizer.parameter_names)
    states = {
        f"{name} {key}": each.cpu().clone()
        for name, entry in packed.items()
        for key, each in entry.items()
        if isinstance(each, Tensor)
    }
    named = engine.module.named_parameters()
    return states | {name: each.detach().cpu().view(torch.int16) for name, each in named}


def small_run(where: str, level: str, micro_steps: int, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a small model after steps with an active clip."""
    zero = {"stage": 2, "bucket": 100_000, "clipping": 0.1, "ratio": 1.0}
    arguments = options(size="tiny", context=64, micro_batch=4, level=level, micro_steps=micro_steps, **zero)
    with patch.object(visits, "CHUNK", CHUNK):
        engine = engine_of(arguments, where, device)
    source = batches(arguments, device)
    for _ in range(3 * micro_steps):
        engine.backward(engine(**next(source)).loss)
        engine.step()
    assert engine.get_global_grad_norm() > arguments.clipping, "the clip is not active"
    found = bytes_of(engine)
    engine.destroy()
    return found


def check_bits(device: torch.device) -> list[str]:
    """Return the list of comparisons. Raises SystemExit if a byte differs."""
    told = []
    for level, micro_steps in (("O2", 1), ("O2+", 3)):
        expected = small_run("resident", level, micro_steps, device)
        for where in OFFLOADED:
            found = small_run(where, level, micro_steps, device)
            wrong = [key for key, each in expected.items() if not torch.equal(each, found[key])]
            if wrong or found.keys() != expected.keys():
                names = f"{wrong[:3]} differ from those of resident states"
                raise SystemExit(f"not measured: {where}, {level}: {names}")
            told.append(f"{level}, {micro_steps} micro-steps, {where}: {len(found)} tensors, the same bytes")
    return told
