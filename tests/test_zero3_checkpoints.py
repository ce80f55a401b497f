"""Checkpoints of ZeRO 3: exact resume, any number of ranks, any stage, without a bit lost."""

from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from engines import (
    SMALL,
    assert_same_bits,
    batches,
    build,
    ds_config,
    packed,
    train_losses,
    weight_bits,
    whole_states,
    zero3,
)
from grids import some_of
from ranks import RankPools
from torch import Tensor, nn
from train_lm import ByteGPT

SECONDS = 100.0
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
LEVELS = {
    "O1": {"opt_level": "O1"},
    "O2": {"opt_level": "O2"},
    "O2+": {"opt_level": "O2+"},
    "split8": {"block_size": 32, "optimizer": {"master_dtype": "split8", "exp_avg_dtype": "e5m2"}},
}


class Everything(ByteGPT):
    """Parameters that are tied, frozen, of odd sizes, of another dtype; buffers and extra state."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.head.weight = self.tokens.weight
        self.blocks[0].requires_grad_(False)
        self.odd = nn.Parameter(torch.randn(7, 37))
        self.register_buffer("floats", torch.arange(5) / 3)
        self.register_buffer("large", torch.tensor(2**40 + 1))
        self.seen = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.seen += 1
        return super().forward(*arguments, **options) + 1e-3 * self.odd.float().square().sum()

    def get_extra_state(self) -> Tensor:
        return torch.full((self.seen + 1,), self.seen, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = int(state[0])


def config(level: str, stage: int, bucket: int = 10_000, **options: Any) -> dict[str, Any]:
    zero = zero3() if stage == 3 else {}
    return ds_config(LEVELS[level], stage=stage, bucket=bucket, zero=zero, scheduler=WARMUP, **options)


def make(config: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = Everything()
    if seed:
        model.floats.zero_()
        model.large.zero_()
    return build(config, model)


def facts(engine: Any) -> dict[str, Any]:
    """This rank's packed states, the weights, buffers, and what every rank has alike."""
    optimizer, module = engine.optimizer.optimizer, engine.module
    return {
        "packed": packed(engine.optimizer),
        "weights": weight_bits(engine),
        "buffers": {name: each.clone().view(-1) for name, each in module.named_buffers()},
        "counters": [
            optimizer.steps,
            list(optimizer.clamp_squares),
            [
                {key: each for key, each in group.items() if key != "params"}
                for group in optimizer.param_groups
            ],
            engine.global_steps,
            engine.skipped_steps,
            engine.lr_scheduler.state_dict(),
            module.seen,
        ],
        "whole": [name for name, each in module.named_parameters() if each.numel() == each_numel(each)],
    }


def each_numel(parameter: Any) -> int:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape)).numel()


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Whatever the stages and numbers of ranks of two runs."""
    assert repr(first[0]["counters"]) == repr(second[0]["counters"])
    assert_same_bits(*(whole_states([each["packed"] for each in run]) for run in (first, second)))
    for key in ("weights", "buffers"):
        for each in (*first, *second):
            assert_same_bits(each[key], first[0][key])


def train_and_save(folder: str, config: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """Save, train on; what there was, and what came of it."""
    engine = make(config)
    source = batches(engine)
    train_losses(engine, source, steps)
    saved = facts(engine)
    engine.save_checkpoint(folder, tag="start", client_state={"note": dist.get_rank()})
    kept = facts(engine)
    assert repr(kept["whole"]) == repr(saved["whole"])
    losses = train_losses(engine, source, 3)
    later = facts(engine)
    engine.destroy()
    return {"saved": kept, "losses": losses, "later": later}


def resume(folder: str, config: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    engine = make(config, seed=9)
    train_losses(engine, batches(engine, seed=5), 1)
    path, state = engine.load_checkpoint(folder)
    assert path is not None
    loaded, source = facts(engine), batches(engine)
    for _ in range(steps):
        next(source)
    losses = train_losses(engine, source, 3)
    later = facts(engine)
    engine.destroy()
    return {"saved": loaded, "losses": losses, "later": later, "note": state["note"]}


@some_of(["level", "stage"], [["O2+", 3], ["O2", 3], ["O1", 3], ["split8", 3], ["O2+", 2], ["O2", 1]], 2)
def test_resume_is_exact(ranks: RankPools, tmp_path: Path, level: str, stage: int) -> None:
    """Into ZeRO 3 from any stage, to the bit: also what comes after, but for other stages' forward order."""
    unbroken = ranks.run(2, train_and_save, str(tmp_path), config(level, stage), seconds=SECONDS)
    resumed = ranks.run(2, resume, str(tmp_path), config(level, 3), seconds=SECONDS)
    for when in ("saved", "later"):
        assert_same([each[when] for each in unbroken], [each[when] for each in resumed])
    for rank, (one, other) in enumerate(zip(unbroken, resumed, strict=True)):
        assert one["losses"] == other["losses"]
        assert other["note"] == (rank if stage == 3 else 0)


def move(source: str, target: str, config: dict[str, Any]) -> dict[str, Any]:
    """Load and save, without training between."""
    engine = make(config, seed=7)
    path, _ = engine.load_checkpoint(source)
    assert path is not None
    engine.save_checkpoint(target, tag="moved")
    found = facts(engine)
    engine.destroy()
    return found


WAYS = [
    (3, 3, 700),
    (1, 3, 10_000),
    (2, 2, 3000),
    (4, 3, 10**6),
    (2, 1, 500),
    (3, 3, 10_000),
    (1, 2, 800),
    (4, 3, 2000),
]


@some_of(["level"], [["O2+"], ["O2"], ["split8"], ["O1"]], 1)
def test_stages_ranks_and_buckets(ranks: RankPools, tmp_path: Path, level: str) -> None:
    start = ranks.run(2, train_and_save, str(tmp_path / "0"), config(level, 3), seconds=SECONDS)
    saved = [each["saved"] for each in start]
    for hop, (world_size, stage, bucket) in enumerate(WAYS):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        assert_same(
            saved, ranks.run(world_size, move, *folders, config(level, stage, bucket), seconds=SECONDS)
        )
