"""Checkpoints of offloaded runs are those of others: byte for byte, either way, at any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import assert_same_bits, packed, state_bits, weight_bits, whole_states
from ranks import RankPools
from test_offload import config_of, make, small_chunks, train
from torch import Tensor

from ds_fp8.cli import main

SECONDS = 120.0
Run = tuple[str, int, dict[str, Any] | None]  # level, stage of ZeRO, offload
AWAY: dict[str, Any] = {"ratio": 0.7}
HOST: dict[str, Any] = {"executor": "host"}


def facts(engine: Any) -> dict[str, Any]:
    return {"states": packed(engine.optimizer), "weights": weight_bits(engine)}


def engine_of(run: Run, **keys: Any) -> Any:
    level, stage, offload = run
    return make(config_of(level, stage, 1, offload) | keys)


def save(folder: str, run: Run, source: str | None = None) -> dict[str, Any]:
    """Load, if there is something to load, else train; then save."""
    engine = engine_of(run)
    if source is None:
        train(engine, "clip", range(2))
    else:
        with small_chunks():
            engine.load_checkpoint(source)
    engine.save_checkpoint(folder, tag="tag")
    found = facts(engine)
    engine.destroy()
    return found


def resume(folder: str, run: Run, keys: dict[str, Any]) -> dict[str, Any]:
    engine = engine_of(run, **keys)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    found = facts(engine)
    found["seen"] = train(engine, "clip", range(2))
    found["after"] = facts(engine)
    engine.destroy()
    return found


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert_same_bits(*(whole_states([each["states"] for each in run]) for run in (first, second)))
    assert_same_bits(first[0]["weights"], second[0]["weights"])


@pytest.mark.parametrize(
    ("level", "hops"),
    [
        ("O2", [(2, 2, None), (3, 3, AWAY), (1, 1, HOST), (2, 2, None)]),
        ("O2+", [(3, 2, AWAY), (2, 3, HOST), (1, 2, None)]),
        pytest.param("O3", [(2, 2, None), (3, 1, AWAY), (2, 2, None)], marks=pytest.mark.slow),
        pytest.param("O1", [(1, 3, AWAY), (2, 2, {}), (1, 1, None)], marks=pytest.mark.slow),
    ],
)
def test_to_an_offloaded_run_and_back(
    ranks: RankPools, tmp_path: Path, level: str, hops: list[tuple[int, int, dict[str, Any] | None]]
) -> None:
    """By way of other numbers of ranks and other stages; the last of them goes on as the first would."""
    first, source = None, None
    for number, (world_size, stage, offload) in enumerate(hops):
        folder = str(tmp_path / str(number))
        found = ranks.run(world_size, save, folder, (level, stage, offload), source, seconds=SECONDS)
        first, source = first or found, folder
        assert_same(first, found)
        master = get_fp32_state_dict_from_zero_checkpoint(folder)
        assert_same_fp32(master, get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "0")))


def assert_same_fp32(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert torch.equal(each, expected[name]), name


@pytest.mark.parametrize(("level", "stage"), [("O2+", 3), ("O2", 1)])
def test_an_offloaded_run_saves_and_goes_on_as_any(
    ranks: RankPools, tmp_path: Path, level: str, stage: int
) -> None:
    for name, offload in (("plain", None), ("away", AWAY), ("all", {})):
        ranks.run(2, save, str(tmp_path / name), (level, stage, offload), seconds=SECONDS)
    files = {
        name: {file.name: file.stat().st_size for file in (tmp_path / name / "tag").glob("*optim_states.pt")}
        for name in ("plain", "away", "all")
    }
    assert files["plain"]
    for name in ("away", "all"):  # and not the whole arena with each tensor
        assert files[name].keys() == files["plain"].keys()
        for file, size in files[name].items():
            assert size < 1.2 * files["plain"][file]
    folder = str(tmp_path / "away")
    runs = [
        ranks.run(2, resume, folder, (level, stage, offload), {}, seconds=SECONDS) for offload in (None, AWAY)
    ]
    assert_same(*runs)
    for plain, away in zip(*runs, strict=True):
        assert plain["seen"] == away["seen"]
        assert_same_bits(plain["after"]["weights"], away["after"]["weights"])
    # Through FP32 and by parameter, as states of stock DeepSpeed enter.
    main(["to-universal", folder, str(tmp_path / "universal" / "tag")])
    keys = {"checkpoint": {"load_universal": True}}
    universal = [
        ranks.run(2, resume, str(tmp_path / "universal"), (level, stage, offload), keys, seconds=SECONDS)
        for offload in (None, AWAY)
    ]
    assert_same(*universal)
    assert_same_bits(universal[0][0]["after"]["weights"], universal[1][0]["after"]["weights"])


def edited_gradients(engine: Any) -> dict[str, Tensor]:
    """Gradients as they are read between backward and step, one of which is halved."""
    tokens = torch.arange(68).view(4, 17) % 61
    engine.backward(engine(tokens))
    found = {f"{name} gradient": safe_get_full_grad(each) for name, each in engine.module.named_parameters()}
    weight = engine.module.layers[0].weight
    safe_set_full_grad(weight, safe_get_full_grad(weight) / 2)
    engine.step()
    return found


def edit(stage: int, level: str, offload: dict[str, Any] | None) -> dict[str, Any]:
    """Read and write whole tensors, save weights that were replaced, take masters from weights."""
    engine = engine_of((level, stage, offload))
    train(engine, "clip", range(1))
    read = edited_gradients(engine)
    for name, each in engine.module.named_parameters():
        read[f"{name} master"] = safe_get_full_fp32_param(each)
        read |= {
            f"{name} {key}": safe_get_full_optimizer_state(each, key) for key in ("exp_avg", "exp_avg_sq")
        }
    weight = engine.module.layers[0].weight
    safe_set_full_fp32_param(weight, safe_get_full_fp32_param(weight) * 0.9)
    for key in ("exp_avg", "exp_avg_sq"):
        safe_set_full_optimizer_state(weight, safe_get_full_optimizer_state(weight, key) * 0.9, key)
    train(engine, "clip", range(2))
    engine.optimizer.refresh_fp32_params()
    train(engine, "clip", range(1))
    found = {"read": read, "states": state_bits(engine.optimizer), "weights": weight_bits(engine)}
    engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "level"), [(2, "O2"), (3, "O2+")])
def test_whole_tensors_are_read_and_written(ranks: RankPools, stage: int, level: str) -> None:
    runs = [ranks.run(2, edit, stage, level, offload, seconds=SECONDS) for offload in (None, AWAY, HOST)]
    for plain, *others in zip(*runs, strict=True):
        for away in others:
            assert_same_fp32(away["read"], plain["read"])
            assert_same_bits(away["states"], plain["states"])
            assert_same_bits(away["weights"], plain["weights"])
