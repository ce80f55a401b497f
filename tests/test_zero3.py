"""ZeRO 3 is ZeRO 2 bit for bit: states, weights, losses, norms and skips, whatever the model does."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from engines import assert_same_bits, build, ds_config, packed, weight_bits, whole_states, zero3
from grids import grid
from ranks import RankPools
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SECONDS = 60.0  # until a run that should take one counts as a hang
WIDTH = 24
VOCABULARY = 37


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 50)
        self.down = nn.Linear(50, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return out


class Biased(nn.Linear):
    """Uses its bias on rank 0 only."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias if dist.get_rank() == 0 else None)


class Model(nn.Module):
    """What a model may do with its modules and parameters, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.unused = nn.Linear(5, 5)
        if kind == "tied":
            self.head.weight = self.tokens.weight
        if kind == "frozen":
            self.tokens.requires_grad_(False)
            self.blocks[1].requires_grad_(False)
        if kind == "bias on one rank":
            self.blocks[1].down = Biased(50, WIDTH)
        self.step = 0

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens[:, :-1])
        for block in self._order():
            hidden = self._run(block, hidden)
        if self.kind in ("head by function", "tied"):
            logits = F.linear(hidden, self.head.weight)
        else:
            logits = self.head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def _order(self) -> list[nn.Module]:
        first, second, third = self.blocks
        if self.kind == "block twice":
            return [first, second, second, third]
        if self.kind == "other order" and self.step % 3 == 2:
            return [second, first, third]
        if self.kind == "block left out" and self.step % 2:
            return [first, third]
        return [first, second, third]

    def _run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.kind in ("checkpointing", "reentrant"):
            out: Tensor = checkpoint(block, hidden, use_reentrant=self.kind == "reentrant")
            return out
        return block(hidden)


KINDS = (
    *("plain", "checkpointing", "reentrant", "tied", "head by function", "frozen", "bias on one rank"),
    *("block twice", "other order", "block left out", "two groups", "two dtypes"),
)


def make(kind: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = Model(kind)
    if kind == "two dtypes":
        model = model.to(torch.bfloat16)
        model.head = model.head.float()
        model.head.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
        return build({**config, "bf16": {"enabled": False}}, model)
    if kind == "two groups":
        small = [each for each in model.parameters() if each.dim() < 2]
        large = [each for each in model.parameters() if each.dim() > 1]
        groups = [{"params": large}, {"params": small, "weight_decay": 0.0, "lr": 3e-3}]
        return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
    return build(config, model)


def tokens_of(engine: Any, step: int, micro_step: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro_step + dist.get_rank())
    return torch.randint(0, VOCABULARY, (engine.train_micro_batch_size_per_gpu(), 9), generator=draw)


def train(
    kind: str,
    config: dict[str, Any],
    steps: int = 5,
    spoil: int | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """A run: losses and norms, this rank's states, weights. spoil: a step in which a loss is NaN."""
    engine = make(kind, config)
    trace = []
    with around():
        for step in range(steps):
            engine.module.step = step
            for micro_step in range(engine.gradient_accumulation_steps()):
                loss = engine(tokens_of(engine, step, micro_step))
                if step == spoil and dist.get_rank() == dist.get_world_size() - 1:
                    loss = loss * torch.nan
                trace.append(loss.item())
                engine.backward(loss)
                engine.step()
            trace.append(engine.get_global_grad_norm())
    scale, reducer = engine.optimizer.loss_scale, engine.optimizer.gradients
    found = {
        "trace": repr([*trace, scale, engine.skipped_steps]),
        "states": packed(engine.optimizer),
        "weights": weight_bits(engine),
        "late": reducer._expects_late,
        "schedule": reducer.schedule,
    }
    found["early"] = early(found.pop("schedule"))
    engine.destroy()
    return found


def early(schedule: Any) -> int:
    """Buckets that leave before the end of a backward."""
    triggers = getattr(schedule, "_triggers", None) or {}
    return sum(trigger is not None for trigger in triggers.values())


def assert_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same run on every rank."""
    for one, other in zip(ours, theirs, strict=True):
        assert one["trace"] == other["trace"]
        assert_same_bits(one["weights"], other["weights"])
    assert_same_bits(*(whole_states([each["states"] for each in run]) for run in (ours, theirs)))


def both(ranks: RankPools, world_size: int, kind: str, config: dict[str, Any], **options: Any) -> Any:
    """Runs under ZeRO 2 and 3, which are the same; that of ZeRO 3."""
    zero, keys = dict(config["zero_optimization"]), {}
    for key in [key for key in zero if key.startswith("stage3") or key == "memory_efficient_linear"]:
        keys[key] = zero.pop(key)
    two, three = (
        ranks.run(
            world_size,
            train_with,
            kind,
            {**config, "zero_optimization": {**zero, "stage": stage, **more}},
            options,
            seconds=SECONDS,
        )
        for stage, more in ((2, {}), (3, keys))
    )
    assert_equal(three, two)
    return three


def train_with(kind: str, config: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return train(kind, config, **options)


@grid(
    kind=KINDS,
    world_size=[1, 2, 3, 4],
    micro_steps=[1, 2],
    overlap=[False, True],
    bucket=[1000, 4000, 10**9],
    persistence=[0, 60, 10**6],
    level=["O1", "O2", "O2+"],
)
def test_zero_3_is_zero_2_bit_for_bit(
    ranks: RankPools,
    kind: str,
    world_size: int,
    micro_steps: int,
    overlap: bool,
    bucket: int,
    persistence: int,
    level: str,
) -> None:
    level = "O2" if kind == "two dtypes" and level == "O2+" else level  # split masters want BF16
    zero = {"overlap_comm": overlap, **zero3(persistence=persistence, prefetch=2000, reuse=1000)}
    config = ds_config({"opt_level": level}, micro_steps=micro_steps, bucket=bucket, zero=zero)
    both(ranks, world_size, kind, config)
