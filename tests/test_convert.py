"""Entering and leaving: other formats, stock DeepSpeed's states, universal checkpoints."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import SMALL, batches, build, ds_config, train_losses
from ranks import RankPools
from torch import Tensor, nn
from train_lm import ByteGPT

import ds_fp8
from ds_fp8.cli import main

STATES = ("fp32", "exp_avg", "exp_avg_sq")
O1, O2, O2PLUS = ({"opt_level": level} for level in ("O1", "O2", "O2+"))
SPLIT8 = {"opt_level": "O2+", "optimizer": {"master_dtype": "split8"}}
SPLIT16 = {"opt_level": "O2", "optimizer": {"master_dtype": "split16"}}
ALLOWED = {"checkpoint": {"allow_conversion": True}}


class Model(ByteGPT):
    """With a frozen block and a buffer."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.blocks[0].requires_grad_(False)
        self.register_buffer("scale", torch.rand(3))


def make(fp8: dict[str, Any] | None, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    universal = options.pop("universal", False)
    config = ds_config(fp8, bucket=10_000, **options)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return build(config, Model())


def values(engine: Any) -> dict[str, Tensor]:
    """Every state of every trained parameter, in FP32."""
    found = {}
    for name, each in engine.module.named_parameters():
        if each.requires_grad:
            found[f"{name}/fp32"] = safe_get_full_fp32_param(each).float()
            for key in STATES[1:]:
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(each, key).float()
    return {key: each.detach().clone().view(-1) for key, each in found.items()}


def others(engine: Any) -> dict[str, Tensor]:
    frozen = {name: each for name, each in engine.module.named_parameters() if not each.requires_grad}
    return {name: each.detach().clone() for name, each in [*frozen.items(), *engine.module.named_buffers()]}


@contextmanager
def log() -> Iterator[list[str]]:
    """What ds_fp8 logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_fp8")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def save(folder: str, fp8: dict[str, Any] | None) -> dict[str, Any]:
    engine = make(fp8)
    train_losses(engine, batches(engine), 4)
    engine.save_checkpoint(folder, tag="four")
    found = {"values": values(engine), "others": others(engine), "loss": next_loss(engine)}
    engine.destroy()
    return found


def next_loss(engine: Any) -> float:
    """Of the same batch on every rank."""
    text = torch.arange(4 * 33).view(4, 33) % 251
    return float(engine(text).detach())


def load(
    folder: str, fp8: dict[str, Any] | None, options: dict[str, Any], again: str | None = None
) -> dict[str, Any]:
    """Load into an engine of another seed; what it has then, and whether it trains. again: saved there."""
    engine = make(fp8, seed=9, **options)
    with log() as lines:
        path, _ = engine.load_checkpoint(folder)
    assert path is not None
    if again is not None:
        engine.save_checkpoint(again)
    found = {"values": values(engine), "others": others(engine), "loss": next_loss(engine)}
    handler = engine.optimizer
    if ds_fp8.is_active(engine):
        found |= {"steps": handler.optimizer.steps, "clamp": handler.optimizer.clamp_squares}
    losses = train_losses(engine, batches(engine), 10)
    assert losses[-1] < losses[0]
    engine.destroy()
    return {**found, "log": [line for line in lines if "checkpoint converted" in line]}


def refuse(folder: str, fp8: dict[str, Any]) -> str:
    engine = make(fp8)
    with pytest.raises(ValueError, match="allow_conversion") as caught:
        engine.load_checkpoint(folder)
    engine.destroy()
    return str(caught.value)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest relative difference (norm) of each state; 0: the same bits."""
    assert found.keys() == expected.keys()
    worst = dict.fromkeys(STATES, 0.0)
    for name, each in expected.items():
        key = name.rsplit("/", maxsplit=1)[1]
        if not torch.equal(found[name], each):
            worst[key] = max(worst[key], float((found[name] - each).norm() / each.norm()), 1e-30)
    return worst


CASES = {  # saved, loaded, what is rounded
    "O2 to O1": (O2, O1, []),
    "O1 to O2": (O1, O2, ["master", "exp_avg", "exp_avg_sq"]),
    "block 128 to 64": (O2, {**O2, "block_size": 64}, ["master", "exp_avg", "exp_avg_sq"]),
    "fp16 to split16": (O2, SPLIT16, []),
    "O2+ to O1": (O2PLUS, O1, []),
    "O1 to O2+": (O1, O2PLUS, ["exp_avg", "exp_avg_sq"]),
    "split8 to split16": (SPLIT8, O2PLUS, []),
    "split16 to split8": (O2PLUS, SPLIT8, ["master"]),
    "e4m3 to int8": ({"opt_level": "O2", "optimizer": {"exp_avg_dtype": "e4m3"}}, O2, ["exp_avg"]),
    "int8 to e4m3": (O2PLUS, {"opt_level": "O2+", "optimizer": {"exp_avg_dtype": "e4m3"}}, ["exp_avg"]),
    "another seed": (O2, {**O2, "optimizer": {"seed": 5}}, []),
}
# Half a code of fp16 and of e4m3; of ue4m4 twice, as its root is stored. A little more for subnormals.
ROUNDING = {"fp32": 2**-10, "exp_avg": 2**-4, "exp_avg_sq": 2**-4 + 2**-9}


@pytest.mark.parametrize("case", CASES)
def test_other_formats(ranks: RankPools, tmp_path: Path, case: str) -> None:
    """At another world size, too; refused without the key that allows it."""
    before, after, rounded = CASES[case]
    saved = ranks.run(2, save, str(tmp_path), before)[0]
    assert all("through FP32" in each for each in ranks.run(2, refuse, str(tmp_path), after))
    for loaded in ranks.run(3, load, str(tmp_path), {**after, **ALLOWED}, {}):
        worst = differences(loaded["values"], saved["values"])
        for key, name in zip(STATES, ("master", "exp_avg", "exp_avg_sq"), strict=True):
            allowed = ROUNDING[key] if name in rounded else 0.0
            assert worst[key] <= allowed, (case, key)
        assert len(loaded["log"]) == 1
        assert f"rounded: {', '.join(rounded) or 'nothing'}" in loaded["log"][0]
        assert loaded["steps"] == 4
        assert loaded["clamp"] != [float("inf")]
        for name, each in saved["others"].items():
            assert torch.equal(loaded["others"][name], each), name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("level", [O1, O2, O2PLUS], ids=["O1", "O2", "O2+"])
def test_stock_states_enter(ranks: RankPools, tmp_path: Path, level: dict[str, Any], stage: int) -> None:
    stock = ranks.run(3, save, str(tmp_path), None)[0]
    assert "allow_conversion" in ranks.run(2, refuse, str(tmp_path), level)[0]
    for loaded in ranks.run(2, load, str(tmp_path), {**level, **ALLOWED}, {"stage": stage}):
        worst = differences(loaded["values"], stock["values"])
        exact = level is O1
        assert all(worst[key] <= (0 if exact else ROUNDING[key]) for key in STATES), worst
        assert loaded["loss"] == pytest.approx(stock["loss"], rel=2e-3)
        assert loaded["steps"] == 4
        assert loaded["clamp"] == [float("inf")]
        for name, each in stock["others"].items():
            assert torch.equal(loaded["others"][name], each), name


def stock_to_universal(folder: Path, out: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder), "--output_folder", str(out)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [*command, *folders, *workers], check=True, capture_output=True, timeout=300, env=environment
    )


def test_stock_universal_enters(ranks: RankPools, tmp_path: Path) -> None:
    stock = ranks.run(2, save, str(tmp_path / "saved"), None)[0]
    stock_to_universal(tmp_path / "saved" / "four", tmp_path / "universal" / "four")
    for world_size, level in ((1, O2PLUS), (3, O1)):
        options = {"universal": True, "stage": world_size % 2 + 1}
        for loaded in ranks.run(world_size, load, str(tmp_path / "universal"), level, options):
            worst = differences(loaded["values"], stock["values"])
            assert all(worst[key] <= (0 if level is O1 else ROUNDING[key]) for key in STATES), worst
            assert loaded["steps"] == 4
            assert len(loaded["log"]) == 1


@pytest.mark.parametrize("level", [O1, O2, O2PLUS], ids=["O1", "O2", "O2+"])
def test_our_universal_is_read_by_us_and_by_stock(
    ranks: RankPools, tmp_path: Path, level: dict[str, Any]
) -> None:
    saved = ranks.run(2, save, str(tmp_path / "saved"), level)[0]
    main(["to-universal", str(tmp_path / "saved"), str(tmp_path / "universal" / "four")])
    ours, stock = {"universal": True}, {"universal": True, "stage": 1}
    for world_size in (1, 3):
        for loaded in ranks.run(world_size, load, str(tmp_path / "universal"), level, ours):
            assert differences(loaded["values"], saved["values"]) == dict.fromkeys(STATES, 0.0)
            assert loaded["clamp"] != [float("inf")]
            assert loaded["loss"] == pytest.approx(saved["loss"], rel=1e-6)
            for name, each in saved["others"].items():
                assert torch.equal(loaded["others"][name], each), name
        again = tmp_path / f"again{world_size}"
        for loaded in ranks.run(world_size, load, str(tmp_path / "universal"), None, stock, str(again)):
            # DeepSpeed 0.19.5 does not find the masters that it has just loaded, but saves them.
            masters = get_fp32_state_dict_from_zero_checkpoint(str(again))
            found = {f"{name}/fp32": each.view(-1) for name, each in masters.items()}
            found = {key: found.get(key, each) for key, each in loaded["values"].items()}
            assert differences(found, saved["values"]) == dict.fromkeys(STATES, 0.0)


class Slashed(nn.Module):
    """Names of a ModuleDict's entries may hold a slash."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a/b": nn.Linear(8, 8)})

    def forward(self, values: Tensor) -> Tensor:
        return self.layers["a/b"](values).square().mean()  # type: ignore[no-any-return]


def save_slashed(folder: str) -> None:
    engine = build(ds_config({}), Slashed())
    engine.backward(engine(torch.ones(4, 8, dtype=torch.bfloat16)))
    engine.step()
    engine.save_checkpoint(folder, tag="one")
    engine.destroy()


def test_a_name_may_hold_a_slash(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(1, save_slashed, str(tmp_path / "saved"))
    main(["to-universal", str(tmp_path / "saved"), str(tmp_path / "universal" / "one")])
    states = tmp_path / "universal" / "one" / "zero" / "layers.a" / "b.weight"
    assert sorted(each.stem for each in states.iterdir()) == ["exp_avg", "exp_avg_sq", "fp32", "step"]


def test_universal_with_weights_only_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save, str(tmp_path / "saved"), O2)
    main(["to-universal", str(tmp_path / "saved"), str(tmp_path / "universal" / "four")])
    ranks.run(2, refuse_universal, str(tmp_path / "universal"))


def refuse_universal(folder: str) -> None:
    engine = make(O2, universal=True)
    before = values(engine)
    for option in ({"load_optimizer_states": False}, {"load_module_only": True}):
        with pytest.raises(ValueError, match=r"allowed with checkpoint\.load_universal: neither"):
            engine.load_checkpoint(folder, **option)
    parameter = next(Path(folder).glob("four/zero/*/fp32.pt"))
    torch.distributed.barrier()
    torch.save({"param": torch.zeros(2)}, parameter)
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="shape"):
        engine.load_checkpoint(folder)
    assert differences(values(engine), before) == dict.fromkeys(STATES, 0.0)
    engine.destroy()


def stock_engine_on_ours(folder: str, options: dict[str, Any]) -> str:
    """The error of stock DeepSpeed that loads states of ours."""
    engine = make(None, **options)
    try:
        engine.load_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()
    return "loaded"


SCRIPT = """
import importlib.abc, os, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ds_fp8":
            raise ModuleNotFoundError("ds_fp8 is not installed here")
sys.meta_path.insert(0, Blocked())
import deepspeed, torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
sys.path.insert(0, EXAMPLES)
from train_lm import ByteGPT, Shape
model = ByteGPT(Shape(layers=2, width=32, heads=2, context=32))
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)[0]
try:
    engine.load_checkpoint(FOLDER)
except Exception as error:
    print("REFUSED", type(error).__name__, error)
engine.load_checkpoint(FOLDER, load_optimizer_states=False)
print("WEIGHTS", sum(each.double().sum().item() for each in model.parameters()))
"""


def save_plain(folder: str) -> float:
    torch.manual_seed(0)
    engine = build(ds_config(O2, stage=1), ByteGPT(SMALL))
    train_losses(engine, batches(engine), 2)
    engine.save_checkpoint(folder)
    total = sum(each.double().sum().item() for each in engine.module.parameters())
    engine.destroy()
    return total


def test_stock_refuses_our_states(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save, str(tmp_path), O2)
    for options in ({"stage": 1}, {"stage": 2}, {"universal": True}):
        for message in ranks.run(2, stock_engine_on_ours, str(tmp_path), options):
            assert message != "loaded", options
            assert "universal" in message or "states of ds_fp8" in message


def test_stock_refuses_our_states_without_ds_fp8(ranks: RankPools, tmp_path: Path) -> None:
    """And takes our weights."""
    total = ranks.run(1, save_plain, str(tmp_path))[0]
    examples = str(Path(__file__).parents[1] / "examples")
    config = {**ds_config(None, stage=1), "fp8": {"enabled": True}}
    text = SCRIPT
    for name, value in {"EXAMPLES": examples, "CONFIG": config, "FOLDER": str(tmp_path)}.items():
        text = text.replace(name, repr(value))
    from ranks import free_port, rank_environment

    environment = {**os.environ, **rank_environment(0, 1, free_port()), "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    lines = result.stdout.splitlines()
    assert any(line.startswith("REFUSED") and "states of ds_fp8" in line for line in lines), result.stdout
    assert f"WEIGHTS {total}" in lines


def test_stock_converter_refuses_our_states(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(1, save_plain, str(tmp_path))
    with pytest.raises(subprocess.CalledProcessError):
        stock_to_universal(tmp_path / "global_step2", tmp_path / "universal")


def load_other_model(folder: str) -> None:
    torch.manual_seed(3)
    model: nn.Module = ByteGPT(SMALL)  # nothing is frozen
    engine = build(ds_config({**O2, **ALLOWED}), model)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ValueError, match="other parameters were trained"):
        engine.load_checkpoint(folder)
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])
    engine.destroy()


def test_stock_states_of_another_model_are_refused(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save, str(tmp_path), None)
    ranks.run(2, load_other_model, str(tmp_path))
