"""Sequence parallelism as DeepSpeed's ALST has it: every rank has a part of each sequence and all weights."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from deepspeed import comm as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils import groups
from engines import assert_same_bits, build, ds_config, packed, state_bits, weight_bits, whole_states, zero3
from hf_runs import FP8, LLAMA, assert_like_bf16, result_of, trainer_of
from hf_runs import ds_config as hf_config
from hf_trainer import model_of
from packaging.version import Version
from ranks import RankPools
from torch import Tensor
from train_lm import mean_over_ranks
from transformers import Trainer, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ds_fp8

CORE = "sdpa"
LENGTH = 32  # tokens of a sequence
MICRO_BATCH = 2
STEPS = 20
SECONDS = 120.0
slow = pytest.mark.slow


@contextmanager
def sequences_forgotten() -> Iterator[None]:
    """Put back what DeepSpeed changes in the process for sequence parallelism."""
    try:
        yield
    finally:
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None
        groups.mpu = None
        if CORE in ALL_ATTENTION_FUNCTIONS._local_mapping:
            del ALL_ATTENTION_FUNCTIONS[CORE]


def model_and_mpu(size: int) -> tuple[Any, Any]:
    """The example's Llama, and how its sequences are split over `size` ranks."""
    torch.manual_seed(0)
    model = model_of(LLAMA)
    assert model.config._attn_implementation == CORE
    return model, UlyssesSPAttentionHF.register_with_transformers(model, CORE, size, MICRO_BATCH)


def config_of(fp8: dict[str, Any] | None, stage: int, **options: Any) -> dict[str, Any]:
    zero = zero3() if stage == 3 else {}
    return ds_config(fp8, stage=stage, micro_batch=MICRO_BATCH, bucket=50_000, zero=zero, **options)


def part_of(step: int, size: int) -> dict[str, Tensor]:
    """This rank's part of a batch: ranks of one sequence are neighbours."""
    group, place = divmod(dist.get_rank(), size)
    draw = torch.Generator().manual_seed(100 * step + group)
    pattern = torch.randint(0, 16, (MICRO_BATCH, 4), generator=draw)
    tokens = pattern.repeat(1, LENGTH // 4 + 1)[:, : LENGTH + 1]
    mine = slice(place * LENGTH // size, (place + 1) * LENGTH // size)
    return {
        "input_ids": tokens[:, :-1][:, mine].contiguous(),
        "position_ids": torch.arange(LENGTH)[mine].repeat(MICRO_BATCH, 1),
        "labels": tokens[:, 1:][:, mine].contiguous(),
    }


def local_loss(engine: Any, part: dict[str, Tensor]) -> Tensor:
    """The mean over this rank's tokens."""
    labels = part.pop("labels")
    logits = engine(**part, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gathered_loss(engine: Any, part: dict[str, Tensor]) -> Tensor:
    """The mean over all tokens of a sequence, as DeepSpeed's tutorial computes it."""
    loss = local_loss(engine, part)
    group = parallel_state_sp.get_sequence_parallel_group()
    losses = torch.distributed.nn.functional.all_gather(loss, group=group)
    return torch.stack(losses).mean()


def shared_loss(engine: Any, part: dict[str, Tensor]) -> Tensor:
    """This rank's share of the mean over all tokens of a sequence."""
    return local_loss(engine, part) / engine.sequence_parallel_size


LOSSES = {"local": local_loss, "gathered": gathered_loss, "shared": shared_loss}


def engine_of(config: dict[str, Any], size: int) -> Any:
    if size == 1:
        torch.manual_seed(0)
        return build(config, model_of(LLAMA))
    model, mpu = model_and_mpu(size)
    return build(config, model, mpu=mpu)


def train(config: dict[str, Any], size: int, kind: str, steps: int = STEPS, save: str = "") -> dict[str, Any]:
    """A run: mean losses over ranks, norms, this rank's states, weights."""
    with sequences_forgotten():
        engine = engine_of(config, size)
        result: dict[str, Any] = {"losses": [], "norms": [], "active": ds_fp8.is_active(engine), "rates": []}
        for step in range(steps):
            for micro_step in range(engine.gradient_accumulation_steps()):
                part = part_of(2 * step + micro_step, size)
                loss = LOSSES[kind](engine, part)
                engine.backward(loss)
                engine.step()
            result["losses"].append(mean_over_ranks(loss.detach().clone()))
            result["norms"].append(float(engine.get_global_grad_norm()))
        if save:
            engine.save_checkpoint(save, "tag")
        if result["active"]:
            result |= {"about": ds_fp8.describe(engine), "states": packed(engine.optimizer)}
        result["weights"] = weight_bits(engine)
        engine.destroy()
        return result


CASES = [
    pytest.param(ranks, stage, kind, id=f"{ranks}-{stage}-{kind}", marks=[] if quick else [slow])
    for ranks, stage, kind, quick in (
        *((2, 1, "local", False), (2, 2, "gathered", True), (2, 3, "gathered", True)),
        *((4, 1, "local", False), (4, 2, "local", False), (4, 3, "local", False)),
    )
]


@pytest.mark.parametrize(("number", "stage", "kind"), CASES)
def test_equals_stock(ranks: RankPools, number: int, stage: int, kind: str) -> None:
    """Losses and norms of stock ZeRO, for two ranks per sequence, alone and beside data parallelism."""
    configs = (config_of({}, stage), config_of(None, stage))
    ours, stock = (ranks.run(number, train, each, 2, kind, seconds=SECONDS)[0] for each in configs)
    assert_like_bf16(ours, stock, last=10)
    for step, (loss, expected) in enumerate(zip(ours["losses"], stock["losses"], strict=True)):
        assert abs(loss - expected) < 0.02, f"step {step}: loss {loss:.4f} and {expected:.4f}"
    assert statistics.fmean(ours["losses"][-5:]) < ours["losses"][0] - 0.3, "it does not learn"


@pytest.mark.parametrize(("number", "size"), [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize(("stage", "kind"), [(2, "shared"), (3, "local")])
def test_is_data_parallelism_over_whole_sequences(
    ranks: RankPools, number: int, size: int, stage: int, kind: str
) -> None:
    """Ranks of a sequence add up, groups of ranks are averaged: the norms are those of whole sequences."""
    config = config_of({"gradients": {"dtype": "bf16"}}, stage)
    split = ranks.run(number, train, config, size, kind, 3, seconds=SECONDS)[0]
    whole = ranks.run(number // size, train, config, 1, "local", 3, seconds=SECONDS)[0]
    for norm, expected in zip(split["norms"], whole["norms"], strict=True):
        assert abs(norm / expected - 1) < 0.01, (split["norms"], whole["norms"])


def test_zero3_is_zero2(ranks: RankPools) -> None:
    """But for the mean, which is over ranks under ZeRO 3 and over sequences under ZeRO 2, as in stock."""
    runs = [
        ranks.run(2, train, config_of({}, stage, micro_steps=2), 2, kind, 4, seconds=SECONDS)
        for stage, kind in ((2, "shared"), (3, "local"))
    ]
    states = [whole_states([each["states"] for each in run]) for run in runs]
    assert_same_bits(*states)
    assert_same_bits(runs[0][0]["weights"], runs[1][0]["weights"])
    assert runs[0][0]["norms"] == pytest.approx(runs[1][0]["norms"], rel=1e-12)


def load(folder: str, config: dict[str, Any], size: int) -> dict[str, Any]:
    with sequences_forgotten():
        engine = engine_of(config, size)
        engine.load_checkpoint(folder, "tag")
        result = {"states": packed(engine.optimizer), "weights": weight_bits(engine)}
        engine.destroy()
        return result


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    """Exact at other numbers of ranks, with and without sequence parallelism."""
    config, folder = config_of({}, stage), str(tmp_path)
    saved = ranks.run(4, train, config, 2, "local", 3, folder, seconds=SECONDS)
    states = whole_states([each["states"] for each in saved])
    for number, size in ((2, 2), (1, 1)):
        loaded = ranks.run(number, load, folder, config, size, seconds=SECONDS)
        assert_same_bits(whole_states([each["states"] for each in loaded]), states)
        assert_same_bits(loaded[0]["weights"], saved[0]["weights"])


def test_is_said(ranks: RankPools) -> None:
    about = ranks.run(2, train, {**config_of({}, 2), "sequence_parallel_size": 2}, 2, "local", 1)[0]["about"]
    assert (about["world_size"], about["sequence_parallel_size"]) == (2, 2)


def refusal_of(config: dict[str, Any], size: int, mesh: tuple[int, int] | None) -> str:
    with sequences_forgotten():
        options: dict[str, Any] = {"mesh_param": mesh} if mesh else {}
        model, mpu = model_and_mpu(size) if size > 1 else (model_of(LLAMA), None)
        try:
            build(config, model, mpu=mpu, **options)
        except ValueError as error:
            return str(error)
        finally:
            groups.mesh_device = None
    return "nothing was refused"


@pytest.mark.parametrize(
    ("keys", "size", "mesh", "words"),
    [
        (
            {"sequence_parallel_size": 2},
            1,
            None,
            "sequence_parallel_size: received 2, allowed: 1, the size of the mpu",
        ),
        (
            {"sequence_parallel_size": 1},
            2,
            None,
            "sequence_parallel_size: received 1, allowed: 2, the size of the mpu",
        ),
        ({}, 1, (1, 2), "mesh_device: received"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 1}, 1, None, "data_parallel_size: received 1"),
    ],
)
def test_refused(
    ranks: RankPools, keys: dict[str, Any], size: int, mesh: tuple[int, int] | None, words: str
) -> None:
    message = ranks.run(2, refusal_of, {**config_of({}, 2), **keys}, size, mesh, seconds=SECONDS)[0]
    assert message.startswith(words)
    assert "UlyssesSPAttentionHF" in message


# The Trainer, whose accelerate makes the mpu


def train_by_trainer(
    folder: str, fp8: dict[str, Any] | None, stage: int, steps: int, resume: str | None = None
) -> dict[str, Any]:
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation=CORE)
    parallel = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler)
    with sequences_forgotten():
        trainer = trainer_of(
            folder,
            hf_config(fp8, stage=stage),
            shape=LLAMA,
            max_steps=steps,
            save_strategy="steps",
            save_steps=12,
            logging_steps=1,
            bf16=True,
            per_device_train_batch_size=4,
            ignore_data_skip=True,  # accelerate cannot skip batches of sequence parallelism
            parallelism_config=parallel,
        )
        trainer.data_collator = with_positions
        snapshots = Snapshots(trainer)
        trainer.add_callback(snapshots)
        trainer.train(resume_from_checkpoint=resume)
        result = result_of(trainer) | {"begun": snapshots.begun, "saved": snapshots.saved}
        trainer.model_wrapped.destroy()
        return result


class Snapshots(TrainerCallback):
    """This rank's states when a training begins, and when it saves."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.begun: dict[str, Tensor] = {}
        self.saved: dict[str, Tensor] = {}

    def states(self) -> dict[str, Tensor]:
        engine = self.trainer.model_wrapped
        return state_bits(engine.optimizer) if ds_fp8.is_active(engine) else {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = self.states()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved = self.states()


def with_positions(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    tokens = torch.stack([torch.as_tensor(each["input_ids"]) for each in rows])
    return {
        "input_ids": tokens,
        "labels": tokens.clone(),
        "position_ids": torch.arange(tokens.shape[1]).repeat(len(rows), 1),
    }


@pytest.mark.skipif(
    Version(version("deepspeed")) < Version("0.19.8"),
    reason="DeepSpeed's data loader of sequences cannot gather over gloo before 0.19.8",
)
@pytest.mark.parametrize("stage", [pytest.param(2, marks=slow), 3])
def test_trainer(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    """Beside stock; a resumed training begins with what was saved, to the bit."""
    ours, stock = (
        ranks.run(2, train_by_trainer, str(tmp_path / name), fp8, stage, 12, seconds=SECONDS)[0]
        for name, fp8 in (("ours", FP8), ("stock", None))
    )
    assert_like_bf16(ours, stock, last=6)
    checkpoint = str(tmp_path / "ours" / "checkpoint-12")
    again = (str(tmp_path / "again"), FP8, stage, 18, checkpoint)
    resumed = ranks.run(2, train_by_trainer, *again, seconds=SECONDS)[0]
    assert_same_bits(resumed["begun"], ours["saved"])
    assert resumed["losses"][:12] == ours["losses"]
    assert len(resumed["losses"]) == 18
    assert statistics.fmean(resumed["losses"][12:]) < ours["losses"][-1] + 0.1
