"""A Hugging Face Llama with random weights in an engine, and its steps on real text, whole or in shares."""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from fsdp2 import Fsdp2
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_fp8.estimate import dry_run

SIZES = {  # hidden size, layers, heads, intermediate size
    "tiny": (64, 2, 4, 172),
    "350M": (1024, 24, 16, 2736),
    "1.3B": (2048, 24, 16, 5504),
    "3B": (3200, 26, 32, 8640),
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "20B": (6144, 44, 48, 16384),
}
VOCABULARY = 32_000
SPLIT = "tensor_model_parallel"  # DeepSpeed's mark of a parameter that is split over ranks
COLLECTIVES = ("all_reduce", "all_to_all_single", "all_gather_into_tensor")
KERNELS = [SDPBackend.FLASH_ATTENTION]  # a CPU has it, too
LAYERS = {"layers": None, "graphs": "reduce-overhead"}  # how each is compiled: torch's mode
Batch = dict[str, Tensor]
PLAIN = {  # defaults of options that a training here reads
    "checkpointing": False,
    "compile": None,
    "float8": False,
    "fsdp2": False,
    "kept_layers": 0,
    "lr": None,
    "micro_steps": 1,
    "sequence_parallel": 1,
    "tensor_parallel": 1,
    "warmup_steps": 0,
    "zero_init": False,
}


def options(**given: Any) -> argparse.Namespace:
    """Return options for the functions of this module: those given, and defaults."""
    return argparse.Namespace(**{**PLAIN, **given})


def recorded(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the options as a result has them."""
    return {key: str(value) for key, value in vars(arguments).items() if key != "out"}


def model_of(
    arguments: argparse.Namespace, device: torch.device, config: dict[str, Any] | None = None
) -> torch.nn.Module:
    """Build the model. config: DeepSpeed's, if each rank is to make only slices (zero.Init)."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, between = SIZES[arguments.size]
    llama = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=between,
        vocab_size=VOCABULARY,
        max_position_embeddings=arguments.context,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if arguments.fsdp2 else torch.bfloat16)  # FSDP2 shards masters
    sliced = config is not None and arguments.zero_init
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16) if sliced else device:
        model: torch.nn.Module = LlamaForCausalLM(llama)
    torch.set_default_dtype(torch.float32)
    if arguments.checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
        for each in layers_of(model)[: arguments.kept_layers]:
            each.gradient_checkpointing = False  # type: ignore[assignment]
    if arguments.float8:
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=lambda _, name: "lm_head" not in name)
    if arguments.compile in LAYERS:
        for each in layers_of(model):
            each.compile(mode=LAYERS[arguments.compile])
        model.loss_function = torch.compile(model.loss_function)
    return model


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return list(model.model.layers)  # type: ignore[union-attr,arg-type]


def engine_of(arguments: argparse.Namespace, device: torch.device) -> Any:
    import deepspeed

    if arguments.fsdp2:
        model = model_of(arguments, device)
        return Fsdp2(model, layers_of(model), arguments.micro_steps)
    config = dict(dry_run.read(str(arguments.deepspeed_config)))
    config["train_micro_batch_size_per_gpu"] = arguments.micro_batch
    config["gradient_accumulation_steps"] = arguments.micro_steps
    if arguments.lr:
        config["optimizer"]["params"]["lr"] = arguments.lr
    if arguments.warmup_steps:
        warm_up = {"warmup_max_lr": config["optimizer"]["params"]["lr"], "warmup_type": "linear"}
        warm_up["warmup_num_steps"] = arguments.warmup_steps
        config["scheduler"] = {"type": "WarmupLR", "params": warm_up}
    model, mpu = model_of(arguments, device, config), None
    if arguments.sequence_parallel > 1:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import (  # noqa: TID251  # as DeepSpeed documents
            UlyssesSPAttentionHF,
        )

        size = config["sequence_parallel_size"] = arguments.sequence_parallel
        shares = (model, "sdpa", size, arguments.micro_batch)
        mpu = UlyssesSPAttentionHF.register_with_transformers(*shares)
    if arguments.tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": arguments.tensor_parallel, "tp_overlap_comm": True}
    parameters = model.parameters()
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config, mpu=mpu)[0]
    if arguments.compile == "model":
        engine.compile()
    return engine


def batches(arguments: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    from gpt_pretrain import read_sources
    from train_lm import Corpus

    corpus, ranks = Corpus(read_sources(), arguments.context - 1), arguments.sequence_parallel
    group, place = divmod(torch.distributed.get_rank(), ranks)
    group //= arguments.tensor_parallel  # these ranks see the same text
    for batch in corpus.batches(arguments.micro_batch, group):  # a row has one token more
        tokens = batch.to(device, torch.long)
        whole = {"input_ids": tokens, "labels": tokens}
        yield whole if ranks == 1 else part_of(tokens, place, ranks)


def part_of(tokens: Tensor, place: int, ranks: int) -> Batch:
    """Return a rank's part of sequences; ranks that share one are neighbours."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    whole = {"input_ids": tokens, "labels": labels, "position_ids": positions}
    return {key: each.chunk(ranks, dim=1)[place].contiguous() for key, each in whole.items()}


def step(engine: Any, source: Iterator[Batch]) -> Tensor:
    """Take an optimizer step; return the mean loss of its micro-steps."""
    losses = [micro_step(engine, next(source)) for _ in range(engine.gradient_accumulation_steps())]
    return torch.stack(losses).mean()


def micro_step(engine: Any, batch: Batch) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    with sdpa_kernel(KERNELS) if engine.sequence_parallel_size > 1 else nullcontext():
        loss = shared_loss(engine, batch) if engine.sequence_parallel_size > 1 else engine(**batch).loss
        engine.backward(loss)
    engine.step()
    return loss.detach()


def shared_loss(engine: Any, batch: Batch) -> Tensor:
    """Return the mean over the tokens of the ranks that share a sequence."""
    labels = batch.pop("labels").flatten()
    logits = engine(**batch).logits.float().flatten(0, 1)
    mine = F.cross_entropy(logits, labels, ignore_index=-100)
    return all_reduce(mine, group=engine.get_sequence_parallel_group()) / engine.sequence_parallel_size


@contextmanager
def sleepy_collectives(draw: random.Random, most: float) -> Iterator[None]:
    """Sleep before one in 20 of the collectives that go through DeepSpeed, up to `most` milliseconds."""
    from deepspeed import comm

    originals = {name: getattr(comm, name) for name in COLLECTIVES} if most else {}

    def sleepy(original: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            if draw.random() < 0.05:
                time.sleep(draw.uniform(0, most) / 1000)
            return original(*arguments, **options)

        return act

    for name, original in originals.items():
        setattr(comm, name, sleepy(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(comm, name, original)


def same_everywhere(engine: Any) -> bool:
    """Whether all ranks have the same gathered weights; parts of split ones are left out."""
    import deepspeed

    sums = []
    for each in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([each]):  # one by one: the model may be larger than a GPU
            if not getattr(each, SPLIT, False):
                sums.append(each.detach().view(torch.int16).long().sum())
    mine = torch.stack(sums)
    theirs = mine.clone()
    torch.distributed.broadcast(theirs, 0)
    differ = (mine != theirs).sum()
    torch.distributed.all_reduce(differ)
    return int(differ) == 0
