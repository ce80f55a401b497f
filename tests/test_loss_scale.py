"""FP16 weights with static and dynamic loss scale, the handler driven without an engine.

DeepSpeed refuses fp16 on a CPU, so these tests do what its engine does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import SMALL, assert_same_bits, state_bits
from ranks import RankPools
from torch import Tensor, nn
from train_lm import Corpus, read_corpus

from ds_fp8.compat import CreateLossScaler, NoopTimer
from ds_fp8.config.section import FP8Config
from ds_fp8.zero_fp8.checkpoint import writer
from ds_fp8.zero_fp8.checkpoint.manifest import FORMAT_VERSION, File, Manifest, Place, parse, render
from ds_fp8.zero_fp8.checkpoint.reader import Checkpoint
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.handlers.stage12 import Stage12Optimizer
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.recipe import ZeroSettings, recipe_of

DYNAMIC = {
    "init_scale": 2.0**20,
    "scale_window": 5,
    "min_scale": 1.0,
    "delayed_shift": 1,
    "consecutive_hysteresis": False,
}


class Bytes(nn.Module):
    """A small model of bytes whose loss FP16 can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, 64)
        self.up, self.head = nn.Linear(64, 64), nn.Linear(64, 256)

    def forward(self, text: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.tokens(text[:, :-1])))
        logits = self.head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].reshape(-1))


def make(static: float | None, stage: int, level: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Bytes().to(dtype)
    scaler = CreateLossScaler(
        dtype, static_loss_scale=static or 1.0, dynamic_scaling=static is None, dynamic_loss_args=DYNAMIC
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = ZeroSettings(
        stage=stage,
        bucket_elements=10_000,
        overlap=stage == 2,
        gradient_clipping=1.0,
        average=True,
        max_consecutive_skips=50,
        save_fp32_master=True,
        stats_interval=0,
    )
    recipe = recipe_of(FP8Config(enabled=True, opt_level=level), accumulating=False)
    optimizer = FP8AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    ranks = Ranks(dist.get_world_group())
    return model, Stage12Optimizer(optimizer, names, recipe, settings, ranks, NoopTimer(), scaler)


def step(model: nn.Module, handler: Stage12Optimizer, batch: Tensor) -> float:
    """What the engine does in a step without accumulation."""
    handler.clear_backward_seen_flag()
    loss: Tensor = model(batch)
    handler.backward_prologue()
    handler.enter_backward()
    handler.scale_if_loss(loss).backward()
    if handler.settings.stage == 2:
        handler.overlapping_partition_gradients_reduce_epilogue()
    else:
        handler.reduce_gradients()
    handler.exit_backward()
    handler.step()
    handler.zero_grad()
    return loss.item()


def train(
    static: float | None, stage: int, level: str, dtype: torch.dtype, left_out: tuple[int, ...] = ()
) -> dict[str, Any]:
    """60 steps, of which some are left out; each loss, norm and scale, and which were skipped."""
    model, handler = make(static, stage, level, dtype)
    corpus = Corpus(read_corpus("topics"), SMALL.context).batches(4, dist.get_rank())
    found: dict[str, Any] = {"losses": [], "norms": [], "scales": [], "skipped": []}
    for number in range(60):
        batch = next(corpus)
        if number in left_out:
            continue
        found["losses"].append(step(model, handler, batch))
        found["norms"].append(handler._global_grad_norm)
        found["scales"].append(handler.loss_scale)
        if handler.overflow:
            found["skipped"].append(number)
    handler.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("static", [1024.0, None], ids=["static", "dynamic"])
def test_training(ranks: RankPools, static: float | None, level: str, stage: int) -> None:
    scaled = ranks.run(2, train, static, stage, level, torch.float16)[0]
    skipped = tuple(scaled["skipped"])
    exact = ranks.run(2, train, 1.0, stage, level, torch.float32, skipped)[0]
    taken = [number for number in range(60) if number not in skipped]
    pairs = [(scaled["losses"][n], loss) for n, loss in zip(taken, exact["losses"], strict=True)]
    assert abs(sum(ours - theirs for ours, theirs in pairs[-10:]) / 10) < 0.01
    for number, expected in zip(taken[:10], exact["norms"][:10], strict=True):
        assert abs(scaled["norms"][number] / expected - 1) < 0.02
    if static is not None:
        assert not skipped
        assert set(scaled["scales"]) == {static}
    else:
        assert len(skipped) > 1
        lowest = scaled["scales"].index(min(scaled["scales"]))
        assert min(scaled["scales"]) < DYNAMIC["init_scale"] / 2
        assert max(scaled["scales"][lowest:]) > min(scaled["scales"]), "it never grows again"


def saved(handler: Stage12Optimizer, folder: Path) -> Checkpoint:
    """A checkpoint as an engine writes it, without the engine."""
    name = f"zero_pp_rank_{dist.get_rank()}_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": handler.state_dict()}, folder / name)
    names = [name.replace(f"rank_{dist.get_rank()}_", f"rank_{rank}_", 1) for rank in range(2)]
    parameters = handler.saved.described_parameters()
    place = Place(model_file="", optimizer_files=names, parameters=parameters, module={}, frozen=None)
    written = Manifest(
        format_version=FORMAT_VERSION,
        ds_fp8_version="",
        deepspeed_version="",
        zero_stage=2,
        world_size=2,
        global_steps=0,
        recipe=writer.describe_recipe(handler.recipe),
        steps=handler.optimizer.steps,
        clamp_squares=writer.describe_clamp(handler.optimizer),
        loss_scaler=writer.describe_loss_scaler(handler.loss_scaler),
        scheduler=False,
        fp32_master=True,
        places=[place],
        files={each: File(size=0, sha256="") for each in names},
    )
    return Checkpoint(folder, parse(render(written), folder))


def save_and_resume(folder: str) -> None:
    """The scale and its counters are part of a checkpoint."""
    model, handler = make(None, 2, "O2", torch.float16)
    corpus = Corpus(read_corpus("topics"), SMALL.context).batches(4, dist.get_rank())
    for _ in range(20):
        step(model, handler, next(corpus))
    kept = saved(handler, Path(folder))
    dist.barrier()
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}

    again_model, again = make(None, 2, "O2", torch.float16)
    again.restore(kept)
    assert vars(again.loss_scaler) == vars(handler.loss_scaler)
    for name, each in again_model.named_parameters():
        assert torch.equal(each, weights[name])
    for _ in range(10):
        batch = next(corpus)
        assert step(model, handler, batch) == step(again_model, again, batch)
        assert handler.loss_scale == again.loss_scale
    assert_same_bits(state_bits(handler), state_bits(again))


def test_the_scale_is_saved(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save_and_resume, str(tmp_path))
