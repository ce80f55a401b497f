"""Engines, batches and states for tests; everything here runs on a rank."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from train_lm import ByteGPT, Corpus, Shape, read_corpus, train_step, validate

from ds_fp8.zero_fp8.checkpoint import writer
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer

SMALL = Shape(layers=2, width=32, heads=2, context=32)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def refusal(act: Callable[[], Any]) -> str:
    """The words of the ValueError; "" if there is none."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def ds_config(
    fp8: dict[str, Any] | None = None,
    *,
    stage: int = 2,
    micro_batch: int = 4,
    micro_steps: int = 1,
    clipping: float = 1.0,
    bucket: int = 500_000_000,
    bf16: bool = True,
    scheduler: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    **optimizer: Any,
) -> dict[str, Any]:
    """A ds_config; without `fp8`, stock DeepSpeed with torch's AdamW, which needs no C++ build."""
    params = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, **optimizer}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": clipping,
        "optimizer": {"type": "AdamW", "params": params},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, **(zero or {})},
        "steps_per_print": 10**9,
    }
    if scheduler:
        config["scheduler"] = scheduler
    if fp8 is None:
        params["torch_adam"] = True
    else:
        config["fp8"] = {"enabled": True, **fp8}
    return config


def build(config: dict[str, Any], model: nn.Module, **options: Any) -> Any:
    """The engine; options as `deepspeed.initialize` takes them."""
    parameters = model.parameters()
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config, **options)[0]


def build_gpt(config: dict[str, Any], shape: Shape = SMALL, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build(config, ByteGPT(shape))


def batches(engine: Any, seed: int = 0, shape: Shape = SMALL) -> Iterator[Tensor]:
    size = engine.train_micro_batch_size_per_gpu()
    return Corpus(read_corpus("topics"), shape.context).batches(size, seed * 1000 + dist.get_rank())


def train_losses(engine: Any, source: Iterator[Tensor], steps: int) -> list[float]:
    return [train_step(engine, source) for _ in range(steps)]


def train_run(config: dict[str, Any], shape: Shape, seed: int, steps: int) -> dict[str, Any]:
    """A whole run of the example: losses and validation loss."""
    engine = build_gpt(config, shape, seed)
    losses = train_losses(engine, batches(engine, seed, shape), steps)
    corpus = Corpus(read_corpus("topics"), shape.context)
    validation = validate(engine, corpus.validation_batches(engine.train_micro_batch_size_per_gpu(), 20))
    weights = weight_bits(engine)
    engine.destroy()
    return {"losses": losses, "validation": validation, "weights": weights}


def weight_bits(engine: Any) -> dict[str, Tensor]:
    """Every parameter's bits, detached from the engine; of a whole parameter, as ZeRO 3 gathers it."""
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {
            name: parameter.detach().clone().view(wide[parameter.element_size()])
            for name, parameter in engine.module.named_parameters()
        }


def zero3(*, persistence: int = 100, prefetch: int = 20_000, reuse: int = 100_000) -> dict[str, Any]:
    """Keys of zero_optimization under which small models have parameters of every kind.

    DeepSpeed's own `linear` multiplies and adds apart, and so rounds otherwise than torch's.
    """
    return {
        "memory_efficient_linear": False,
        "stage3_param_persistence_threshold": persistence,
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_reuse_distance": reuse,
    }


def packed(handler: FP8ZeROOptimizer) -> dict[str, Any]:
    """This rank's pieces as `checkpoint.pack` gives them, detached from the shards."""
    return {
        name: {key: each.clone() if isinstance(each, Tensor) else each for key, each in entry.items()}
        for name, entry in writer.pack(handler.parts.shards, handler.parameter_names).items()
    }


def state_bits(handler: FP8ZeROOptimizer) -> dict[str, Tensor]:
    """This rank's state bytes: "name/first block/key" -> bytes."""
    return {
        f"{name}/{entry['blocks'][0]}/{key}": value
        for name, entry in packed(handler).items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def whole_states(per_rank: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Packed states of all ranks joined by parameter: "name/key" -> bytes of all its blocks."""
    parts: dict[str, dict[int, Tensor]] = {}
    for packed in per_rank:
        for name, entry in packed.items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    parts.setdefault(f"{name}/{key}", {})[entry["blocks"][0]] = value
    return {key: torch.cat([found[first] for first in sorted(found)]) for key, found in parts.items()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal keys and bytes; names the first coordinate that differs and both values."""
    assert first.keys() == second.keys()
    for key, a in first.items():
        b = second[key]
        assert a.shape == b.shape, f"{key}: shapes {list(a.shape)} and {list(b.shape)}"
        different = (a != b).nonzero()
        if len(different):
            where = tuple(different[0].tolist())
            raise AssertionError(f"{key}{list(where)}: {a[where].item()} and {b[where].item()}")
