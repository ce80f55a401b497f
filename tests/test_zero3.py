"""ZeRO 3 is ZeRO 2 bit for bit: states, weights, losses, norms and skips, whatever the model does."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from engines import assert_same_bits, build, ds_config, packed, weight_bits, whole_states, zero3
from grids import pairwise, some_of
from meters import Traffic, live_tensors, storages
from ranks import RankPools
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_fp8.estimate import memory
from ds_fp8.estimate.fetching import fetching_of, persistent
from ds_fp8.zero_fp8.comm.collectives import AllToAll

SECONDS = 60.0  # until a run that should take one counts as a hang
WIDTH = 24
CODED = (32, 208)  # of models whose matrices are FP8: two tiles along one side, cut within a tile's rows
VOCABULARY = 37


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return out


class Biased(nn.Linear):
    """Uses its bias on rank 0 only."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias if dist.get_rank() == 0 else None)


class Experts(nn.Module):
    """One of them is used, on each rank another, and another in each step; one is used on no rank."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block(width, inner) for _ in range(3))
        self.step = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.step += 1
        out: Tensor = self.experts[(self.step + dist.get_rank()) % 3](hidden)
        return out


class Model(nn.Module):
    """What a model may do with its modules and parameters, by name."""

    def __init__(self, kind: str, width: int = WIDTH, inner: int = 50) -> None:
        super().__init__()
        self.kind = kind
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(3))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if kind == "module unused":
            self.unused = nn.Linear(5, 5)
        if kind == "tied":
            self.head.weight = self.tokens.weight
        if kind == "frozen":
            self.tokens.requires_grad_(False)
            self.blocks[1].requires_grad_(False)
        if kind == "bias on one rank":
            self.blocks[1].down = Biased(inner, width)
        if kind == "experts":
            self.blocks[1] = Experts(width, inner)
            set_z3_leaf_modules(self, [Experts])
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
    *("block twice", "other order", "block left out", "module unused", "experts", "two groups", "two dtypes"),
)


def make(kind: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = Model(kind, *(CODED if config["fp8"].get("weights") else ()))
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
    with patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True):
        engine = make(kind, config)
    trace, early = [], Early(engine)
    with around():
        for step in range(steps):
            engine.module.step, early.buckets = step, 0
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
        "early": early.buckets,
        "buckets": len(engine.optimizer.parts.buckets),
    }
    engine.destroy()
    return found


class Early:
    """Counts the buckets that leave while a backward is running."""

    def __init__(self, engine: Any) -> None:
        self.buckets = 0
        reducer = engine.optimizer.gradients
        launch = reducer._launch

        def count(index: int) -> None:
            self.buckets += reducer.active
            launch(index)

        reducer._launch = count


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


DIMENSIONS: dict[str, Sequence[Any]] = {
    "kind": KINDS,
    "world_size": [1, 2, 3, 4],
    "micro_steps": [1, 2],
    "overlap": [False, True],
    "bucket": [1000, 4000, 10**9],
    "persistence": [0, 60, 10**6],
    "level": ["O1", "O2", "O2+"],
}
PAIRS = pairwise(DIMENSIONS)
DRAWN = [
    {name: random.Random(seed).choice(values) for name, values in DIMENSIONS.items()} for seed in range(60)
]


@some_of(["choice"], [[choice] for choice in (*PAIRS, *DRAWN)], len(PAIRS))
def test_zero_3_is_zero_2_bit_for_bit(ranks: RankPools, choice: dict[str, Any]) -> None:
    kind, level = choice["kind"], choice["level"]
    level = "O2" if kind == "two dtypes" and level == "O2+" else level  # split masters want BF16
    keys = zero3(persistence=choice["persistence"], prefetch=2000, reuse=1000)
    zero = {"overlap_comm": choice["overlap"], **keys}
    run = {"micro_steps": choice["micro_steps"], "bucket": choice["bucket"]}
    both(ranks, choice["world_size"], kind, ds_config({"opt_level": level}, zero=zero, **run))


SECTIONS: dict[str, dict[str, Any]] = {
    "small blocks": {"block_size": 32},
    "bf16 on the wire": {"gradients": {"dtype": "bf16"}},
    "e5m2, added in bf16": {"gradients": {"dtype": "e5m2", "accum_dtype": "bf16"}},
    "bf16 masters": {"optimizer": {"master_dtype": "bf16", "rounding": "stochastic"}},
    "split8": {"optimizer": {"master_dtype": "split8", "exp_avg_dtype": "bf16"}},
    "two hops": {"gradients": {"intra_node_size": 2}},
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section(ranks: RankPools, name: str, overlap: bool) -> None:
    zero = {"overlap_comm": overlap, **zero3(persistence=60, prefetch=2000, reuse=1000)}
    config = ds_config(SECTIONS[name], zero=zero, bucket=2000, micro_steps=1 + overlap)
    both(ranks, 4, "plain", config)


@pytest.mark.parametrize("level", ["O1", "O2", "O2+"])
def test_a_skipped_step_changes_nothing(ranks: RankPools, level: str) -> None:
    found = both(ranks, 2, "plain", ds_config({"opt_level": level}, zero=zero3(), bucket=2000), spoil=2)
    assert found[0]["trace"].endswith(", 1]"), "one step is skipped"


def test_a_dynamic_loss_scale(ranks: RankPools) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 30, "loss_scale_window": 2, "hysteresis": 1}
    config = {**ds_config({}, zero=zero3(), bucket=2000, bf16=False), "fp16": fp16}
    found = both(ranks, 2, "plain", config, steps=24)
    assert int(found[0]["trace"].rpartition(",")[2][:-1]) > 2, "some steps overflow"


def test_deepspeeds_own_linear_is_near(ranks: RankPools) -> None:
    """On unless the config says otherwise, it rounds the bias apart."""
    zero = {**zero3(), "memory_efficient_linear": True}
    fp8 = {"optimizer": {"exp_avg_dtype": "e4m3"}}
    configs = (ds_config(fp8, stage=2), ds_config(fp8, stage=3, zero=zero))
    two, three = (ranks.run(2, train, "plain", config, 20, seconds=SECONDS)[0] for config in configs)
    traces = [[float(each) for each in run["trace"][1:-1].split(", ")][:-2] for run in (two, three)]
    losses = [trace[::2] for trace in traces]
    assert losses[0] != losses[1]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3


class Borrowing(nn.Module):
    """Parameters that are used outside the modules that own them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.several = nn.ParameterList([torch.eye(WIDTH) for _ in range(2)])

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            hidden,
            hidden.clone(),
            hidden.clone(),
        )  # one tensor thrice is added in another order
        out: Tensor = self.attention(query, key, value)[0]
        for each in self.several:
            out = out @ each
        return out.float().square().mean()


def train_borrowing(config: dict[str, Any], folder: str) -> list[dict[str, Tensor]]:
    """Weights after every step, read between steps; loaded before the first."""
    found = []
    for source in (None, folder):
        torch.manual_seed(0)
        engine = build(config, Borrowing())
        if source is not None:
            engine.load_checkpoint(source)
        for step in range(4):
            torch.manual_seed(step)
            engine.backward(engine(torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)))
            engine.step()
            found.append(weight_bits(engine))
        if source is None:
            engine.save_checkpoint(folder)
        engine.destroy()
    return found


@pytest.mark.parametrize("persistence", [0, 10**6])
def test_weights_may_be_read_between_steps(ranks: RankPools, tmp_path: Path, persistence: int) -> None:
    runs = []
    for stage, zero in ((2, {}), (3, zero3(persistence=persistence))):
        config = ds_config({"opt_level": "O2+"}, stage=stage, zero=zero)
        runs.append(ranks.run(2, train_borrowing, config, str(tmp_path / str(stage)), seconds=SECONDS)[0])
    for two, three in zip(*runs, strict=True):
        assert_same_bits(three, two)


# Order of collectives


@contextmanager
def sleepy() -> Iterator[None]:
    """Ranks that come to their collectives at times of their own."""
    draw = random.Random(dist.get_rank())
    names = ("all_gather_into_tensor", "all_to_all_single", "all_reduce")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(dist, name, _late(getattr(dist, name), draw)))
        yield


def _late(collective: Callable[..., Any], draw: random.Random) -> Callable[..., Any]:
    def launch(*arguments: Any, **options: Any) -> Any:
        time.sleep(draw.choice([0.0, 0.0, 0.003]))
        return collective(*arguments, **options)

    return launch


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["bias on one rank", "block left out", "reentrant"])
def test_ranks_do_not_wait_for_each_other_in_different_collectives(
    ranks: RankPools, kind: str, overlap: bool
) -> None:
    """Small buckets, and weights that are fetched again in backward: many collectives of both sorts."""
    zero = {"overlap_comm": overlap, **zero3(persistence=60, prefetch=0, reuse=0)}
    both(ranks, 3, kind, ds_config({}, zero=zero, bucket=1000), around=sleepy)


def prompt() -> AbstractContextManager[Any]:
    """An exchange has a moment in which it may come: ranks here have nothing else to do."""

    def done(exchange: AllToAll) -> bool:
        for _ in range(50):
            if was_done.fget(exchange):
                return True
            time.sleep(0.001)
        return False

    was_done: Any = AllToAll.done
    return patch.object(AllToAll, "done", property(done))


def test_most_buckets_leave_before_backward_has_ended(ranks: RankPools) -> None:
    zero = {"overlap_comm": True, **zero3(persistence=60, prefetch=2000, reuse=0)}
    for kind in ("plain", "head by function", "bias on one rank", "checkpointing", "experts"):
        for found in both(ranks, 2, kind, ds_config({}, zero=zero, bucket=1000), around=prompt):
            assert found["early"] >= found["buckets"] - 2, f"{kind}: {found['early']} of {found['buckets']}"
            assert not found["late"], kind


class Changing(Model):
    """From some step on the blocks run in another order, and one of them is frozen on one rank."""

    def _order(self) -> list[nn.Module]:
        return list(self.blocks) if self.step < 3 else list(reversed(self.blocks))


def train_changing(config: dict[str, Any]) -> tuple[list[str], int, list[int]]:
    """Losses of ten steps, the buckets that leave early at the end, the attempts of each step."""
    torch.manual_seed(0)
    engine = build(config, Changing("plain"))
    stepper, attempts, losses, early = engine.optimizer.stepper, [], [], Early(engine)
    attempt = stepper.attempt

    def count(*arguments: Any) -> Any:
        attempts[-1] += 1
        return attempt(*arguments)

    stepper.attempt = count
    for step in range(10):
        engine.module.step, early.buckets = step, 0
        if step == 6 and dist.get_rank() == 0:
            engine.module.blocks[1].requires_grad_(False)
        attempts.append(0)
        loss = engine(tokens_of(engine, step, 0))
        with prompt():
            engine.backward(loss)
        engine.step()
        losses.append(repr(loss.item()))
    found = losses, early.buckets, attempts
    engine.destroy()
    return found


def test_the_order_is_learnt_anew_when_the_model_is_used_otherwise(ranks: RankPools) -> None:
    zero = {"overlap_comm": True, **zero3(persistence=60, prefetch=0, reuse=0)}
    configs = (ds_config({}, stage=stage, bucket=1000, zero=zero) for stage in (2, 3))
    two, three = (ranks.run(2, train_changing, config, seconds=SECONDS) for config in configs)
    for (losses, _, _), (expected, early_buckets, attempts) in zip(two, three, strict=True):
        assert losses == expected
        assert early_buckets > 3
        assert attempts == 10 * [1]


def slices_of(persistence: int) -> list[tuple[int, int]]:
    """Of each parameter, how many elements of its slice lie past its end, and how many of these are not zero.

    Memory that DeepSpeed leaves as it finds it is full of NaN here.
    """

    def dirty(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    empty = torch.empty
    with patch.object(torch, "empty", dirty):
        engine = make("plain", ds_config({}, stage=3, zero=zero3(persistence=persistence)))
    found = []
    for parameter in engine.module.parameters():
        slices = parameter.ds_tensor
        rest = slices[max(0, parameter.ds_numel - dist.get_rank() * len(slices)) :]
        found.append((len(rest), int((rest != 0).sum())))
    engine.destroy()
    return found


def test_what_lies_past_the_end_is_zero(ranks: RankPools) -> None:
    found = ranks.run(2, slices_of, 100)
    assert sum(count for rank in found for count, _ in rank) > 1000
    assert not any(bad for rank in found for _, bad in rank)


# Bytes


class Tower(nn.Module):
    """Layers of which each fetches one matrix in forward, and again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(each, each) for each in (33, 33, 33))
        self.scale = nn.Linear(33, 33).requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in (*self.layers, self.scale):
            hidden = hidden + layer(hidden)
        return hidden.float().square().mean()


def count_bytes(config: dict[str, Any]) -> dict[str, Any]:
    alive = live_tensors()
    before = storages(alive)
    torch.manual_seed(0)
    engine = build(config, Tower())
    batch = torch.ones(2, 33, dtype=torch.bfloat16)

    def step() -> None:
        engine.backward(engine(batch))
        engine.step()

    for _ in range(3):
        step()
    with Traffic() as traffic:
        step()
    handler, parameters = engine.optimizer, list(engine.module.parameters())
    held = storages(each for each in live_tensors() if each.device.type == "cpu")
    sizes, buckets = [each.ds_numel for each in parameters], handler.parts.buckets
    keeps = persistent(sizes, fetching_of(engine._config.zero_config))
    small, large = (
        [size for size, kept in zip(sizes, keeps, strict=True) if kept is want] for want in (True, False)
    )
    how = (128, buckets[0].fleet)
    found = {
        "held": sum(size for address, size in held.items() if address not in before) - batch.nbytes,
        "slices": sum(storages(each.ds_tensor for each in parameters).values()),
        "states": handler.nbytes,
        "expected states": memory.state_bytes(handler.recipe, buckets)
        + memory.gradient_bytes(handler.recipe, buckets, accumulating=False),
        "expected slices": memory.slice_bytes(2, sizes, *how),
        "persistent": memory.persistent_bytes(2, small, buckets[0].fleet),
        "exchange": traffic.handed["alltoall_base_"],
        "expected exchange": sum(sum(memory.hop_bytes(handler.recipe, bucket)) for bucket in buckets),
        "gathered": traffic.handed["_allgather_base_"],
        "fetched": 2 * memory.fetch_bytes(2, large, *how) + memory.fetch_bytes(2, small, *how),
    }
    engine.destroy()
    return found


@pytest.mark.parametrize("level", ["O2", "O2+"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_in_memory_and_on_the_wire(ranks: RankPools, world_size: int, level: str) -> None:
    config = ds_config({"opt_level": level}, stage=3, zero=zero3(persistence=40, prefetch=0, reuse=0))
    for found in ranks.run(world_size, count_bytes, config, seconds=SECONDS):
        assert found["states"] == found["expected states"]
        assert found["slices"] == found["expected slices"]
        assert found["held"] == found["states"] + found["slices"] + found["persistent"]
        assert found["exchange"] == found["expected exchange"]
        assert found["gathered"] == found["fetched"]
