"""States in host memory: the same bits as on the device, whatever else a run does."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from engines import (
    Lines,
    assert_same_bits,
    build,
    ds_config,
    packed,
    refusal,
    state_bits,
    weight_bits,
    whole_states,
    zero3,
)
from grids import pairwise, some_of
from ranks import RankPools
from torch import Tensor, nn

import ds_fp8
from ds_fp8.zero_fp8.gradients.landing import HostSum

SECONDS = 120.0  # until a run that should take some counts as a hang
WIDTH = 32
LEVELS = ("O1", "O2", "O2+", "O3")
EVENTS = ("clip", "skip", "late", "unused", "tied")
EXECUTORS = ("stream", "host")
CLIPPING = 0.05
CHUNK = 48 * 128  # elements: chunks cut parameters, and buckets have several


class Model(nn.Module):
    """Matrices that O3 makes codes of, and what the events need."""

    def __init__(self, event: str) -> None:
        super().__init__()
        self.event = event
        self.tokens = nn.Embedding(61, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH, bias=bool(each)) for each in range(3))
        self.back = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 61, bias=False)
        if event == "unused":
            self.unused = nn.Linear(50, 70)
        if event == "tied":
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens[:, :-1])
        for out, back in zip(self.layers, self.back, strict=True):
            hidden = hidden + back(nn.functional.gelu(out(hidden)))
        logits = self.head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def config_of(level: str, stage: int, micro_steps: int, offload: dict[str, Any] | None) -> dict[str, Any]:
    fp8: dict[str, Any] = {"opt_level": level, "stats": {"interval": 1}}
    if level == "O3":
        fp8["weights"] = {"min_elements": 256}
    zero = zero3() if stage == 3 else {}
    if offload is not None:
        zero["offload_optimizer"] = {"device": "cpu"}
        fp8["offload"] = offload
    return ds_config(fp8, stage=stage, micro_steps=micro_steps, clipping=CLIPPING, bucket=15_000, zero=zero)


@contextmanager
def small_chunks() -> Iterator[None]:
    with patch("ds_fp8.zero_fp8.states.visits.CHUNK", CHUNK):
        yield


def train(engine: Any, event: str, steps: Sequence[int]) -> list[tuple[float, float, int]]:
    """Losses, norms and skips so far."""
    source = torch.Generator().manual_seed(7 + torch.distributed.get_rank())
    seen = []
    for step in steps:
        weight = engine.module.layers[0].weight
        hook = weight.register_hook(lambda g: g * torch.inf) if event == "skip" and step == 1 else None
        for _ in range(engine.gradient_accumulation_steps()):
            tokens = torch.randint(61, (4, 16), generator=source)
            loss = engine(tokens)
            engine.backward(loss)
            if event == "late" and step % 2 == 0 and engine.is_gradient_accumulation_boundary():
                # A backward towards some weights only exchanges nothing: what it leaves comes late.
                engine(tokens).backward(inputs=[engine.module.layers[1].weight])
            engine.step()
        if hook:
            hook.remove()
        seen.append((float(loss), engine.get_global_grad_norm(), engine.skipped_steps))
    return seen


def run(
    level: str, stage: int, micro_steps: int, event: str, offload: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything that a run comes to, on this rank."""
    torch.manual_seed(0)
    with small_chunks():
        engine = build(config_of(level, stage, micro_steps, offload), Model(event))
    seen = train(engine, event, range(4))
    result = {
        "seen": seen,
        "states": packed(engine.optimizer),
        "weights": weight_bits(engine),
        "health": engine.optimizer.parts.health.last,
        "host": engine.optimizer.parts.host_nbytes,
        "executor": ds_fp8.describe(engine).get("offload"),
    }
    engine.destroy()
    return result


def both(level: str, stage: int, executor: str, micro_steps: int, event: str, ratio: float) -> dict[str, Any]:
    plain = run(level, stage, micro_steps, event, None)
    offload = {"executor": executor, **({"ratio": ratio} if executor == "stream" else {"threads": 2})}
    away = run(level, stage, micro_steps, event, offload)
    assert (plain["host"], plain["executor"]) == (0, None)
    assert away["executor"] == executor
    assert (away["host"] > 0) is (len(away["states"]) > 0)
    assert away["seen"] == plain["seen"]
    assert_same_bits(away["weights"], plain["weights"])
    assert_same_bits(whole_states([away["states"]]), whole_states([plain["states"]]))
    assert away["health"] == plain["health"]
    return away


CORNERS = (0, 2, 5, 7, 9, 10, 13, 19)  # of the cells: every value, and a skipped step of either executor


def cells() -> list[tuple[Any, ...]]:
    """Every pair of values, corners first.

    FP8 weights are not built under ZeRO 3, whose pairs go to two other cells; a ratio is for streaming only.
    """
    chosen = pairwise(
        {
            "level": LEVELS,
            "stage": (1, 2, 3),
            "executor": EXECUTORS,
            "ranks": (1, 2, 3),
            "micro_steps": (1, 3),
            "event": EVENTS,
            "ratio": (1.0, 0.4),
        }
    )
    found = []
    for level, stage, *others in (tuple(each.values()) for each in chosen):
        apart = [("O3", 2), ("O2+", 3)] if (level, stage) == ("O3", 3) else [(level, stage)]
        found += [(*each, *others) for each in apart]
    return [found[each] for each in CORNERS] + [
        each for number, each in enumerate(found) if number not in CORNERS
    ]


@some_of(["level", "stage", "executor", "world_size", "micro_steps", "event", "ratio"], cells(), len(CORNERS))
def test_offloaded_runs_are_the_same_bits(
    level: str,
    stage: int,
    executor: str,
    world_size: int,
    micro_steps: int,
    event: str,
    ratio: float,
    ranks: RankPools,
) -> None:
    results = ranks.run(world_size, both, level, stage, executor, micro_steps, event, ratio, seconds=SECONDS)
    seen = results[0]["seen"]
    assert len({norm for _, norm, _ in seen if norm < torch.inf}) >= 3, "a norm that stands still"
    assert max(norm for _, norm, _ in seen if norm < torch.inf) > CLIPPING, "the clip was not active"
    assert seen[-1][2] == (event == "skip")


@contextmanager
def logged() -> Iterator[list[str]]:
    """What ds_fp8 logs meanwhile."""
    lines, logger = Lines(), logging.getLogger("ds_fp8")
    logger.addHandler(lines)
    level = logger.level
    logger.setLevel("INFO")
    try:
        yield lines.lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(lines)


def offloading(level: str = "O2", stage: int = 2, **options: Any) -> dict[str, Any]:
    return config_of(level, stage, 1, options)


def make(config: dict[str, Any], event: str = "clip") -> Any:
    torch.manual_seed(0)
    with small_chunks():
        return build(config, Model(event))


def moved_and_back(level: str, stage: int) -> list[str]:
    """A plain run beside one whose states go to host memory and come back, with a step in between."""
    plain, moved = (make(config_of(level, stage, 1, None)) for _ in range(2))
    with logged() as log, small_chunks():
        for engine in (plain, moved):
            train(engine, "clip", range(2))
        bytes_before = moved.optimizer.nbytes
        moved.offload_states()
        host = moved.optimizer.parts.host_nbytes
        assert 0 < host < bytes_before
        moved.offload_states()  # once more: nothing happens
        assert state_bits(moved.optimizer).keys() == state_bits(plain.optimizer).keys()
        assert_same_bits(state_bits(moved.optimizer), state_bits(plain.optimizer))
        seen = [train(engine, "clip", range(2)) for engine in (plain, moved)]
        assert seen[0] == seen[1]
        moved.reload_states()
        assert moved.optimizer.parts.host_nbytes == 0
        assert moved.optimizer.nbytes == bytes_before
        seen = [train(engine, "clip", range(2)) for engine in (plain, moved)]
        assert seen[0] == seen[1]
        moved.offload_states(include=[OffloadStateTypeEnum.hp_params], pin_memory=False, non_blocking=True)
        assert moved.optimizer.parts.host_nbytes == host
        moved.reload_states()
        moved.offload_states(include=[OffloadStateTypeEnum.lp_params])
        assert moved.optimizer.parts.host_nbytes == 0
    assert_same_bits(weight_bits(moved), weight_bits(plain))
    assert_same_bits(state_bits(moved.optimizer), state_bits(plain.optimizer))
    moved.offload_states()
    for engine in (plain, moved):
        engine.destroy()
    return [line for line in log if "stay" in line]


@pytest.mark.parametrize(("level", "stage"), [("O2", 2), ("O2+", 3), ("O3", 1)])
def test_states_go_to_host_memory_and_come_back(level: str, stage: int, ranks: RankPools) -> None:
    lines = ranks.run(2, moved_and_back, level, stage, seconds=SECONDS)[0]
    both = "offload_states: weights and reduced gradients stay on the device"
    assert lines == [both, both, "offload_states: weights stay on the device"]


def moved_with_a_scale_per_tensor() -> str:
    engine = make(ds_config({"scaling": "tensor"}, bucket=15_000))
    said = refusal(engine.offload_states)
    host = engine.optimizer.parts.host_nbytes
    engine.destroy()
    return f"{said} {host}"


def test_states_with_a_scale_per_tensor_stay(ranks: RankPools) -> None:
    """Their two sweeps need the whole of a tensor."""
    (said,) = ranks.run(1, moved_with_a_scale_per_tensor, seconds=SECONDS)
    assert said == 'fp8.scaling: received "tensor", allowed for states in host memory: "block" 0'


def with_two_hops(executor: str) -> None:
    """Sums of nodes arrive, in 16 bits, and add up in 16 bits."""
    gradients = {"intra_node_size": 2, "inter_node_dtype": "bf16", "accum_dtype": "bf16"}
    runs = []
    for offload in (None, {"executor": executor}):
        config = config_of("O2", 2, 3, offload)
        config["fp8"]["gradients"] = gradients
        engine = make(config)
        runs.append((train(engine, "late", range(3)), weight_bits(engine), state_bits(engine.optimizer)))
        engine.destroy()
    (seen, *bits), (expected, *expected_bits) = runs
    assert seen == expected
    for found, other in zip(bits, expected_bits, strict=True):
        assert_same_bits(found, other)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
def test_two_hops(ranks: RankPools, executor: str) -> None:
    ranks.run(4, with_two_hops, executor, seconds=SECONDS)


def test_an_addition_on_the_host_that_failed_is_not_followed_by_a_step() -> None:
    failed: Future[Tensor] = Future()
    failed.set_exception(MemoryError("no room"))
    added: Future[Tensor] = Future()
    added.set_result(torch.zeros(1))
    total = HostSum(on_device=Mock(), landing=Mock(add=Mock(side_effect=[failed, added])))
    for _ in range(2):
        total.add([], Mock(), overwrite=False)
    with pytest.raises(MemoryError, match="no room"):
        total.settle()
