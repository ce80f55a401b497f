"""States in host memory: the same bits as on the device, whatever else a run does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engines import assert_same_bits, build, ds_config, packed, weight_bits, whole_states, zero3
from grids import pairwise, some_of
from ranks import RankPools
from torch import Tensor, nn

SECONDS = 120.0  # until a run that should take some counts as a hang
WIDTH = 24
LEVELS = ("O1", "O2", "O2+", "O3")
EVENTS = ("clip", "skip", "late", "unused", "tied")
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
    return ds_config(fp8, stage=stage, micro_steps=micro_steps, clipping=0.05, bucket=15_000, zero=zero)


@contextmanager
def small_chunks() -> Iterator[None]:
    with patch("ds_fp8.zero_fp8.states.ring.CHUNK", CHUNK):
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
                extra = engine.module.layers[1].weight.float().square().sum()
                extra.backward(inputs=[engine.module.layers[1].weight])
            engine.step()
        if hook:
            hook.remove()
        seen.append((float(loss), engine.get_global_grad_norm(), engine.skipped_steps))
    return seen


def run(level: str, stage: int, micro_steps: int, event: str, offload: dict[str, Any] | None) -> dict[str, Any]:
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
    }
    engine.destroy()
    return result


def both(level: str, stage: int, executor: str, micro_steps: int, event: str, ratio: float) -> dict[str, Any]:
    plain = run(level, stage, micro_steps, event, None)
    away = run(level, stage, micro_steps, event, {"executor": executor, "ratio": ratio})
    assert plain["host"] == 0
    assert (away["host"] > 0) is (len(away["states"]) > 0)
    assert away["seen"] == plain["seen"]
    assert_same_bits(away["weights"], plain["weights"])
    assert_same_bits(whole_states([away["states"]]), whole_states([plain["states"]]))
    assert away["health"] == plain["health"]
    return away


if __name__ == "__main__":
    pass


def test_try(ranks: RankPools) -> None:
    for level, stage, ws, ms, ev, ratio in [("O2",2,1,1,"clip",1.0),("O2+",3,2,3,"skip",.4),("O1",1,2,3,"late",1.0),("O3",2,2,1,"tied",1.0)]:
        out = ranks.run(ws, both, level, stage, "stream", ms, ev, ratio, seconds=SECONDS)
        print(level, stage, out[0]["seen"], out[0]["host"])
