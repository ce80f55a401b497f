"""Extra state of modules is of any type and may grow: saved, resumed, exported, converted."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import assert_same_bits, build, ds_config, state_bits, weight_bits
from ranks import RankPools
from safetensors.torch import load_file
from torch import nn

from ds_fp8.cli import main

KINDS = ("bytes", "dict", "none", "tensor", "several")


class Counting(nn.Linear):
    """Its extra state says how often it has run, in the way of its kind."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(inputs, outputs)
        self.kind, self.seen = kind, 0
        self.register_buffer("large", torch.tensor(2**40 + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(x)

    def get_extra_state(self) -> Any:
        grown = torch.full((self.seen + 1,), self.seen, dtype=torch.uint8)
        if self.kind == "bytes":
            stream = io.BytesIO()
            torch.save(grown, stream)
            return stream
        return {"dict": {"seen": self.seen}, "none": None, "tensor": grown, "several": [grown, self.seen]}[
            self.kind
        ]

    def set_extra_state(self, state: Any) -> None:
        if self.kind == "bytes":
            state.seek(0)
            self.seen = int(torch.load(state)[0])
        elif self.kind == "dict":
            self.seen = state["seen"]
        elif self.kind == "tensor":
            assert state.dtype is torch.uint8
            self.seen = int(state[0])
        elif self.kind == "several":
            self.seen = state[1]


def make(kind: str, seed: int, **config: Any) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(Counting(16, 24, kind), nn.GELU(), Counting(24, 4, kind))
    return build({**ds_config({"opt_level": "O1"}), **config}, model)


def train(engine: Any, steps: int) -> None:
    for step in range(steps):
        batch = torch.full((4, 16), float(step + 1), dtype=torch.bfloat16)
        engine.backward(engine(batch).float().square().mean())
        engine.step()


def saved(folder: str, kind: str) -> dict[str, torch.Tensor]:
    """The weights."""
    engine = make(kind, 0)
    train(engine, 3)
    engine.save_checkpoint(folder, tag="three")
    weights = {name: each.detach().clone() for name, each in engine.module.named_parameters()}
    engine.destroy()
    return weights


def resumed(folder: str, kind: str, seen: int, universal: bool) -> dict[str, torch.Tensor]:
    """States and weights after a load and two more steps."""
    engine = make(kind, 9, **({"checkpoint": {"load_universal": True}} if universal else {}))
    engine.load_checkpoint(folder)
    assert engine.module[0].seen == seen
    assert engine.module[2].large == 2**40 + 1
    train(engine, 2)
    found = {**weight_bits(engine), **state_bits(engine.optimizer)}
    engine.destroy()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_extra_state_of_any_type_and_length(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    run, universal = tmp_path / "run", tmp_path / "universal"
    weights = ranks.run(2, saved, str(run), kind)[0]
    main(["to-universal", str(run), str(universal / "three")])
    seen = 0 if kind == "none" else 3
    first = ranks.run(2, resumed, str(run), kind, seen, False)
    for native, converted in zip(first, ranks.run(2, resumed, str(universal), kind, seen, True), strict=True):
        assert_same_bits(native, converted)
    main(["export", str(run), str(tmp_path / "out"), "--dtype", "bf16"])
    exported = load_file(tmp_path / "out" / "model.safetensors")
    extra = {"0._extra_state", "2._extra_state"} if kind == "tensor" else set()
    assert exported.keys() == weights.keys() | {"0.large", "2.large"} | extra
    for name in extra:
        assert torch.equal(exported[name], torch.full((4,), 3, dtype=torch.uint8))
    for name, each in weights.items():
        assert torch.equal(exported[name], each), name
    assert get_fp32_state_dict_from_zero_checkpoint(str(run)).keys() >= weights.keys()
