"""Trainings of every level and mode end with the bits that are kept in digests.json.

They hold the arithmetic while code moves: a change that means to change no bit changes no digest. Gradients
are given, as numbers that every dtype holds exactly, so no matrix product of this machine has a part in them.
`python tests/test_digests.py` writes the file anew, after a change that means to. The tags in tags_v1 were
saved after some of the steps, in the first format of the manifest, and runs go on from them to the same bits.
"""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_optimizer_state
from engines import build, ds_config, refusal, state_bits, weight_bits
from ranks import RankPools, on_examples_path
from torch import Tensor, nn

KEPT = Path(__file__).with_name("digests.json")
TAGS = KEPT.with_name("tags_v1")
SAVED_MODES = ("O2", "O2+", "a sum in FP8")
STEPS, SAVED = 20, 5
SIZES = (700, 129, 1, 4096, 33)

# What is not said is O2 under ZeRO 2 on two ranks, with exp_avg in E4M3, BF16 weights and a clip that acts.
MODES: dict[str, dict[str, Any]] = {
    "O1": {"fp8": {"opt_level": "O1"}},
    "O2": {},
    "O2+": {"fp8": {"opt_level": "O2+"}},
    "O2, one rank": {"ranks": 1},
    "O2, three ranks": {"ranks": 3},
    "O2, ZeRO 1": {"stage": 1},
    "O2, overlap": {"zero": {"overlap_comm": True}},
    "O2, four micro-steps": {"micro_steps": 4},
    "O2, four micro-steps, ZeRO 1": {"micro_steps": 4, "stage": 1},
    "O2, no clip": {"clipping": 0.0},
    "O2, FP32 weights": {"bf16": False},
    "O2, Adam": {"adam_w_mode": False},
    "O2, blocks of 32": {"fp8": {"block_size": 32}},
    "O2, masters to nearest": {"fp8": {"optimizer": {"rounding": "nearest"}}},
    "O2, E5M2 on the wire": {"fp8": {"gradients": {"dtype": "e5m2"}}},
    "O2, BF16 on the wire": {"fp8": {"gradients": {"dtype": "bf16"}}},
    "O2, E4M3 kept": {"micro_steps": 4, "fp8": {"gradients": {"accum_dtype": "e4m3"}}},
    "O2, BF16 masters": {"fp8": {"optimizer": {"master_dtype": "bf16"}}},
    "O2, split8 masters": {"fp8": {"optimizer": {"master_dtype": "split8"}}},
    "O2, two hops": {"ranks": 4, "fp8": {"gradients": {"intra_node_size": 2}}},
    "O2+, ZeRO 1, overlap": {"fp8": {"opt_level": "O2+"}, "stage": 1, "zero": {"overlap_comm": True}},
    "a scale per tensor": {"fp8": {"scaling": "tensor"}},
    "a scale per tensor, three ranks": {"ranks": 3, "fp8": {"scaling": "tensor"}},
    "a sum in FP8": {"fp8": {"scaling": "tensor", "gradients": {"reduction": "fp8"}}},
    "a sum in FP8, four micro-steps": {
        "micro_steps": 4,
        "fp8": {"scaling": "tensor", "gradients": {"reduction": "fp8"}},
    },
    "O2, INT8": {"exp_avg": "int8"},
    "O2+, INT8, three ranks": {"fp8": {"opt_level": "O2+"}, "exp_avg": "int8", "ranks": 3},
    "O2+, INT8, independent draws": {
        "fp8": {"opt_level": "O2+", "optimizer": {"draws": "independent"}},
        "exp_avg": "int8",
    },
}


class Given(nn.Module):
    """A loss whose gradients are given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(_exact(size, 3, generator) for size in SIZES)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        products = [
            (weight * each.to(weight.dtype)).float().sum()
            for weight, each in zip(self.weights, gradients, strict=True)
        ]
        return torch.stack(products).sum()


def _exact(size: int, span: int, generator: torch.Generator) -> Tensor:
    """Numbers of 4 bits over 2 * span binades, from integers alone: the same on every machine."""
    signed = torch.randint(-15, 16, (size,), generator=generator).float()
    powers = torch.randint(-span, span, (size,), generator=generator)
    return signed * torch.ldexp(torch.ones(size), powers) * 2.0**-6


def train(mode: dict[str, Any], tag: str = "", *, save: bool = False) -> str:
    """The digest of this rank's states, of all weights and of the last norm.

    tag: to go on from, or with `save` to save on the way.
    """
    options = {key: value for key, value in mode.items() if key != "ranks"}
    options = {"stage": 2, "fp8": {}, "bucket": 2000, "clipping": 1e-2, "micro_batch": 1, **options}
    fp8, exp_avg = options.pop("fp8"), options.pop("exp_avg", "e4m3")
    if fp8.get("opt_level") != "O1":
        fp8 = {**fp8, "optimizer": {"exp_avg_dtype": exp_avg, **fp8.get("optimizer", {})}}
    engine = build(ds_config(fp8, **options), Given())
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    if tag and not save:
        engine.load_checkpoint(TAGS, tag)
    for step in range(STEPS * engine.gradient_accumulation_steps()):
        gradients = [_exact(size, 12, generator) for size in SIZES]
        if step == SAVED and save:
            engine.save_checkpoint(TAGS, tag, save_latest=False)
        if step >= SAVED or save or not tag:
            engine.backward(engine(gradients))
            engine.step()
    digest = hashlib.sha256(str(engine.get_global_grad_norm()).encode())
    for name, each in (*sorted(state_bits(engine.optimizer).items()), *weight_bits(engine).items()):
        digest.update(name.encode() + each.contiguous().view(torch.uint8).numpy().tobytes())
    engine.destroy()
    return digest.hexdigest()[:16]


def digests(ranks: RankPools, name: str, *more: Any) -> list[str]:
    return ranks.run(MODES[name].get("ranks", 2), train, MODES[name], *more, seconds=60)


@pytest.mark.parametrize("name", MODES)
def test_a_training_ends_with_the_bits_that_are_kept(ranks: RankPools, name: str) -> None:
    assert digests(ranks, name) == json.loads(KEPT.read_text())[name]


@pytest.mark.parametrize("name", SAVED_MODES)
def test_a_tag_of_the_first_format_goes_on_to_these_bits(ranks: RankPools, name: str) -> None:
    manifest = json.loads((TAGS / name / "ds_fp8_manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert digests(ranks, name, name) == json.loads(KEPT.read_text())[name]


def enter(level: str, *, allowed: bool) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """A tag of before, loaded into a level of now and into the formats it has: the refusal, both exp_avg."""
    found: list[dict[str, Tensor]] = []
    for states in ({"exp_avg_dtype": "e4m3"}, {}):
        fp8 = {"opt_level": level, "optimizer": states, "checkpoint": {"allow_conversion": allowed}}
        engine = build(ds_config(fp8, stage=2, bucket=2000, clipping=1e-2, micro_batch=1), Given())
        told = refusal(lambda engine=engine: engine.load_checkpoint(TAGS, level))  # type: ignore[misc]
        named = engine.module.named_parameters()
        found.append({name: safe_get_full_optimizer_state(each, "exp_avg") for name, each in named})
        engine.destroy()
    return told, *found


@pytest.mark.parametrize("level", ["O2", "O2+"])
def test_a_tag_of_before_enters_the_levels_of_now(ranks: RankPools, level: str) -> None:
    """With exp_avg in E4M3 and independent draws, of which the first manifests say nothing."""
    for told, *_ in ranks.run(2, partial(enter, allowed=False), level, seconds=60):
        assert "exp_avg e4m3 -> int8, draws independent -> spread" in told
        assert "fp8.checkpoint.allow_conversion: true" in told
    for told, before, after in ranks.run(2, partial(enter, allowed=True), level, seconds=60):
        assert not told
        for name, expected in before.items():
            assert (after[name] - expected).norm() <= 0.07 * expected.norm(), name


if __name__ == "__main__":
    on_examples_path()
    pools = RankPools()
    KEPT.write_text(json.dumps({name: digests(pools, name) for name in MODES}, indent=1) + "\n")
    pools.stop()
    sys.stdout.write(f"{len(MODES)} digests in {KEPT.name}\n")
