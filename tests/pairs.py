"""The table of features that a run combines, and five steps of such a run on a rank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from engines import build, ds_config, weight_bits, zero3
from hf_runs import LLAMA
from hf_trainer import model_of
from peft import LoraConfig, get_peft_model
from split_models import splits_forgotten
from test_offload import small_chunks
from test_sequence_parallel import sequences_forgotten
from torch import Tensor, nn
from train_lm import mean_over_ranks

import ds_fp8

# One value of each axis makes a run; the first is what a run has if nothing else is asked for.
AXES: Mapping[str, tuple[str, ...]] = {
    "stage": ("2", "1", "3"),
    "level": ("O2", "O1", "O2+", "O3"),
    "offload": ("none", "stream", "host"),
    "model": ("plain", "LoRA", "ALST", "AutoTP"),
    "gradients": ("block", "two hops", "tensor", "FP8 sum"),
    "torch": ("eager", "compile", "checkpointing", "autocast"),
}
Values = Mapping[str, str]
Pair = frozenset[tuple[str, str]]


def pair(first: str, second: str) -> Pair:
    """Of two values, as they stand in AXES."""
    return frozenset(
        (axis, value) for axis, values in AXES.items() for value in values if value in (first, second)
    )


# Pairs that are refused, with words of the message. A pair that is not here works.
REFUSED: dict[Pair, str] = {
    pair("3", "AutoTP"): "tensor_parallel: received",
    pair("3", "autocast"): "torch_autocast",
    pair("O3", "AutoTP"): 'fp8.opt_level: received "O3"',
    pair("two hops", "AutoTP"): "fp8.gradients.intra_node_size: received 2",
    pair("O2+", "tensor"): 'fp8.optimizer.exp_avg_sq_dtype: received "ue4m4"',
    pair("O2+", "FP8 sum"): 'fp8.optimizer.exp_avg_sq_dtype: received "ue4m4"',
    **{
        pair(beside, value): words
        for beside in ("3", "O3", "AutoTP", "stream", "host")
        for value, words in (
            ("tensor", 'fp8.scaling: received "tensor"'),
            ("FP8 sum", 'fp8.scaling: received "tensor"'),
        )
    },
}

# More than two features at once, as users have asked for them; left out as long as a pair of them is refused.
ASKED = ({"stage": "3", "level": "O3", "offload": "stream", "model": "LoRA"},)

STEPS = 5
LR = 1e-2
LENGTH = 32  # tokens of a sequence
MICRO_BATCH = 2
SMALL_LLAMA = replace(LLAMA, width=64, layers=1)
FP8: dict[str, dict[str, Any]] = {
    "block": {},
    "two hops": {"gradients": {"intra_node_size": 2}},
    "tensor": {"scaling": "tensor"},
    "FP8 sum": {"scaling": "tensor", "gradients": {"reduction": "fp8"}},
}


def every_pair() -> list[Pair]:
    return [
        frozenset([(a, x), (b, y)]) for a, b in combinations(AXES, 2) for x, y in product(AXES[a], AXES[b])
    ]


def complete(given: Pair | Values) -> dict[str, str]:
    """A run with these values and the first of all other axes."""
    return {axis: values[0] for axis, values in AXES.items()} | dict(given)


def pairs_of(values: Values) -> set[Pair]:
    return {frozenset(each) for each in combinations(values.items(), 2)}


def cover() -> list[dict[str, str]]:
    """Few runs without a refused pair that have every other pair; greedy."""
    left = [each for each in every_pair() if each not in REFUSED]
    runs = []
    while left:
        run = dict(left[0])
        for axis in AXES:
            if axis not in run:
                allowed = [
                    value for value in AXES[axis] if not pairs_of({**run, axis: value}) & REFUSED.keys()
                ]
                run[axis] = max(allowed, key=lambda value: len(pairs_of({**run, axis: value}) & {*left}))
        runs.append({axis: run[axis] for axis in AXES})
        left = [each for each in left if each not in pairs_of(run)]
    return runs + [run for run in map(complete, ASKED) if not pairs_of(run) & REFUSED.keys()]


def ranks_of(values: Values) -> int:
    return 4 if values["gradients"] == "two hops" else 2


def stock_of(values: Values) -> dict[str, str]:
    """What of a run stock DeepSpeed BF16 has, too."""
    return {axis: values[axis] if axis in ("stage", "model") else AXES[axis][0] for axis in AXES}


def plain_of(values: Values) -> dict[str, str]:
    """A run that has the same bits: states on the device, activations kept."""
    if values["torch"] == "compile":  # rounds otherwise than eager PyTorch, and takes seconds
        return {**values}
    same = {"torch": "eager"} if values["torch"] == "checkpointing" else {}
    return {**values, "offload": "none", **same}


def config_of(values: Values, *, fp8: bool = True) -> dict[str, Any]:
    stage, level = int(values["stage"]), values["level"]
    zero = zero3() if stage == 3 else {}
    section: dict[str, Any] = {"opt_level": level, **FP8[values["gradients"]]}
    if level == "O3":
        section["weights"] = {"min_elements": 256}
        if values["model"] == "LoRA":
            section["weights"]["frozen"] = "e4m3"
    if values["offload"] != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
        section["offload"] = {"executor": values["offload"]}
    config = ds_config(
        section if fp8 else None,
        stage=stage,
        micro_batch=MICRO_BATCH,
        clipping=0.0,
        bucket=20_000,
        zero=zero,
        lr=LR,
    )
    if values["model"] == "AutoTP":
        config["tensor_parallel"] = {"autotp_size": 2}
    if values["torch"] == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def engine_of(values: Values, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model: Any = model_of(SMALL_LLAMA)
    options: dict[str, Any] = {}
    if values["model"] == "LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"]))
        for name, each in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(each, std=0.02)
    if values["model"] == "ALST":
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        options["mpu"] = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", 2, MICRO_BATCH)
    if values["torch"] == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    engine = build(config, model, **options)
    if values["torch"] == "compile":
        engine.compile(backend="aot_eager")
    return engine


def batch_of(step: int, values: Values) -> dict[str, Tensor]:
    """Ranks that share a sequence or have parts of one replica see the same text."""
    sharing = 2 if values["model"] in ("ALST", "AutoTP") else 1
    group, place = divmod(dist.get_rank(), sharing)
    draw = torch.Generator().manual_seed(100 * step + group)
    tokens = torch.randint(0, 16, (MICRO_BATCH, 4), generator=draw)
    tokens = tokens.repeat(1, LENGTH // 4 + 1)[:, : LENGTH + 1]
    mine = slice(None)
    if values["model"] == "ALST":
        mine = slice(place * LENGTH // sharing, (place + 1) * LENGTH // sharing)
    return {
        "input_ids": tokens[:, :-1][:, mine].contiguous(),
        "position_ids": torch.arange(LENGTH)[mine].repeat(MICRO_BATCH, 1),
        "labels": tokens[:, 1:][:, mine].contiguous(),
    }


def train(values: Values, fp8: bool) -> dict[str, Any]:
    """Five steps: mean losses over ranks, norms, weights; with FP8 also what `describe` says."""
    with splits_forgotten(), sequences_forgotten(), small_chunks():
        try:
            engine = engine_of(values, config_of(values, fp8=fp8))
            found = steps_of(engine, values)
            found["about"] = ds_fp8.describe(engine) if fp8 else None
            found["weights"] = weight_bits(engine)
            engine.destroy()
        finally:
            torch._dynamo.reset()
    return found


def resume(stays: Sequence[Values], folder: str, steps: int = 2) -> list[float]:
    """Mean losses of a training that goes on in one run after the other, by way of checkpoints."""
    losses: list[float] = []
    for number, values in enumerate(stays):
        config = config_of(values)
        config["fp8"]["checkpoint"] = {"allow_conversion": True}
        with small_chunks():
            engine = engine_of(values, config)
            if number:
                engine.load_checkpoint(folder, str(number - 1))
            losses += steps_of(engine, values, range(len(losses), len(losses) + steps))["losses"]
            engine.save_checkpoint(folder, str(number))
            engine.destroy()
    return losses


def steps_of(engine: Any, values: Values, steps: Sequence[int] = range(STEPS)) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in steps:
        batch = batch_of(step, values)
        labels = batch.pop("labels")
        logits = engine(**batch, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        found["losses"].append(mean_over_ranks(loss.detach().clone()))
        found["norms"].append(float(engine.get_global_grad_norm()))
    return found


def refusal_of(values: Values) -> str:
    """The message of the ValueError; "" if the engine is built."""
    with splits_forgotten(), sequences_forgotten():
        try:
            engine_of(values, config_of(values)).destroy()
        except ValueError as error:
            return str(error)
    return ""
