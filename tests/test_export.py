"""Stock tools, `ds_fp8 export` and `to-universal` give the masters that the engine has, bit for bit."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from engines import SMALL, batches, build, ds_config, train_losses
from ranks import RankPools
from safetensors.torch import load_file
from torch import Tensor, nn
from train_lm import ByteGPT

from ds_fp8.cli import main

LEVELS = {
    "O1": {"opt_level": "O1"},
    "O2": {"opt_level": "O2"},
    "O2+": {"opt_level": "O2+"},
    "split8": {"opt_level": "O2+", "optimizer": {"master_dtype": "split8"}},
}


class Everything(ByteGPT):
    """Tied and frozen parameters, a buffer of floats and one of integers."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.head.weight = self.tokens.weight
        self.blocks[0].requires_grad_(False)
        self.register_buffer("floats", torch.arange(5) / 3)
        self.register_buffer("integers", torch.arange(3))


def save(folder: str, fp8: dict[str, Any], fp32_master: bool = True) -> dict[str, Any]:
    """Train and save; what the engine has of each parameter in FP32, and its own weights."""
    torch.manual_seed(0)
    section = {**fp8, "checkpoint": {"fp32_master": fp32_master}}
    engine = build(ds_config(section, bucket=10_000), Everything())
    train_losses(engine, batches(engine), 3)
    engine.save_checkpoint(folder, client_state={"note": [1, "two"]})
    engine.save_16bit_model(folder, "weights.bin")
    parameters = {name: each for name, each in engine.module.named_parameters() if each.requires_grad}
    found = {
        "fp32": {name: safe_get_full_fp32_param(each).clone() for name, each in parameters.items()},
        "module": {name: each.clone() for name, each in engine.module.state_dict().items()},
        **{
            key: {name: safe_get_full_optimizer_state(each, key) for name, each in parameters.items()}
            for key in ("exp_avg", "exp_avg_sq")
        },
    }
    engine.destroy()
    return found


@pytest.fixture(scope="module", params=list(LEVELS))
def saved(
    request: pytest.FixtureRequest, ranks: RankPools, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, ranks.run(2, save, str(folder), LEVELS[request.param])[0]


def whole_fp32(engine: dict[str, Any]) -> dict[str, Tensor]:
    """The whole model in FP32: masters, and the rest widened."""
    module = {
        name: each.float() if each.is_floating_point() else each for name, each in engine["module"].items()
    }
    return {**module, **engine["fp32"], "head.weight": engine["fp32"]["tokens.weight"]}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert found[name].dtype == each.dtype, name
        assert torch.equal(found[name], each), name


def test_zero_to_fp32(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """As a function, as the script that was copied beside the checkpoint, and into a model."""
    folder, engine = saved
    expected = whole_fp32(engine)
    found = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    assert_equal({name: found[name] for name in engine["fp32"]}, engine["fp32"])
    copied = runpy.run_path(str(folder / "zero_to_fp32.py"))
    convert = copied["convert_zero_checkpoint_to_fp32_state_dict"]
    convert(str(folder), str(tmp_path / "out"), max_shard_size=None)  # else it wants huggingface_hub
    script = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert_equal({name: script[name] for name in engine["fp32"]}, engine["fp32"])
    model: nn.Module = load_state_dict_from_zero_checkpoint(Everything(), str(folder))
    assert_equal(dict(model.state_dict()), expected)


def test_save_16bit_model(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, engine = saved
    assert_equal(torch.load(folder / "weights.bin", weights_only=True), engine["module"])


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_export(saved: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str) -> None:
    folder, engine = saved
    expected = whole_fp32(engine)
    main(["export", str(folder), str(tmp_path / "fp32"), "--format", kind])
    assert_equal(read(tmp_path / "fp32"), expected)
    Everything().load_state_dict(read(tmp_path / "fp32"))
    main(["export", str(folder), str(tmp_path / "bf16"), "--format", kind, "--dtype", "bf16"])
    assert_equal(read(tmp_path / "bf16"), engine["module"])  # the weights that the engine trains with
    main(["export", str(folder), str(tmp_path / "fp16"), "--format", kind, "--dtype", "fp16"])
    buffers = ("floats", "integers")
    half = {name: each if name in buffers else each.half() for name, each in expected.items()}
    assert_equal(read(tmp_path / "fp16"), half)


def read(folder: Path) -> dict[str, Tensor]:
    """Whatever files there are, as an index lists them."""
    index = next(folder.glob("*.index.json"), None)
    names = set(json.loads(index.read_text())["weight_map"].values()) if index else {"model.safetensors"}
    if index is None and not (folder / "model.safetensors").exists():
        names = {"pytorch_model.bin"}
    found: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        found |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_export_in_shards(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, engine = saved
    arguments = ["--format", kind, "--max-shard-size", "30KB", "--json"]
    main(["export", str(folder), str(tmp_path / "out"), *arguments])
    told = json.loads(capsys.readouterr().out)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {Path(each["file"]).name: each["bytes"] for each in told} == files
    assert len(files) > 4
    found = read(tmp_path / "out")
    assert_equal(found, whole_fp32(engine))
    index = json.loads(next((tmp_path / "out").glob("*.index.json")).read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in found.values())
    largest = max(each.nbytes for each in found.values())
    for name in set(index["weight_map"].values()):
        together = sum(found[each].nbytes for each, home in index["weight_map"].items() if home == name)
        assert together <= max(30_000, largest)


def test_universal_files(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, engine = saved
    main(["to-universal", str(folder), str(tmp_path / "universal")])
    assert (tmp_path / "latest_universal").read_text() == "universal"
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        found = {
            name: torch.load(tmp_path / "universal/zero" / name / f"{key}.pt", weights_only=True)["param"]
            for name in engine["fp32"]
        }
        assert_equal(found, engine[key])


def test_without_the_fp32_view(ranks: RankPools, tmp_path: Path) -> None:
    engine = ranks.run(2, save, str(tmp_path / "saved"), LEVELS["O2"], False)[0]
    with pytest.raises(KeyError, match="single_partition_of_fp32_groups"):
        get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "saved"))
    main(["export", str(tmp_path / "saved"), str(tmp_path / "out")])
    assert_equal(read(tmp_path / "out"), whole_fp32(engine))


class TestCommandLine:
    @pytest.fixture
    def folder(self, saved: tuple[Path, dict[str, Any]]) -> Path:
        return saved[0]

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["export", "{}/nowhere", "{}/x"], ["nowhere: no such folder"]),
            (["export", "{}", "{}"], ["exists, allowed: the name of a new folder"]),
            (["export", "{}", "{}/x", "--tag", "lost"], ["lost: no such folder"]),
            (["export", "{}", "{}/x", "--max-shard-size", "5 apples"], ["'5 apples'", "5GB"]),
            (["export", "{}", "{}/x", "--dtype", "fp8"], ["fp8", "bf16"]),
            (["inspect", "{}/.."], ["neither ds_fp8_manifest.json nor latest"]),
            (["to-universal", "{}", "{}"], ["exists, allowed: the name of a new folder"]),
        ],
    )
    def test_a_wrong_one_is_one_line_and_status_2(
        self, folder: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            main([each.format(folder) for each in arguments])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        for part in parts:
            assert part in err

    def test_inspect(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["inspect", str(folder)])
        text = capsys.readouterr().out
        for part in ("every size and checksum is right", "2 ranks, ZeRO 2", "mp_rank_00_model_states.pt"):
            assert part in text
        main(["inspect", str(folder / "global_step3"), "--json"])
        told = json.loads(capsys.readouterr().out)
        assert told["verified"]
        assert told["steps"] == 3
        assert told["places"][0]["parameters"]["tokens.weight"]["shape"] == [256, 32]

    def test_damage_is_told(
        self, ranks: RankPools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ranks.run(1, save, str(tmp_path), LEVELS["O2"])
        file = tmp_path / "global_step3" / "mp_rank_00_model_states.pt"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        for command in (["inspect"], ["export", str(tmp_path / "x")], ["to-universal", str(tmp_path / "x")]):
            with pytest.raises(SystemExit):
                main([command[0], str(tmp_path), *command[1:]])
            assert f"{file}: SHA-256 does not match" in capsys.readouterr().err
        main(["inspect", str(tmp_path), "--no-verify"])
        assert not (tmp_path / "x").exists()

    def test_objects_of_a_client_want_a_flag(
        self, ranks: RankPools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ranks.run(1, save_with_object, str(tmp_path / "saved"))
        for command in ("export", "to-universal"):
            with pytest.raises(SystemExit):
                main([command, str(tmp_path / "saved"), str(tmp_path / command)])
            assert "--unpickle reads it" in capsys.readouterr().err
            main([command, str(tmp_path / "saved"), str(tmp_path / command), "--unpickle"])
            assert (tmp_path / command).exists()

    def test_a_value_that_fp16_does_not_hold(
        self, ranks: RankPools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ranks.run(1, save_large, str(tmp_path / "saved"))
        with pytest.raises(SystemExit):
            main(["export", str(tmp_path / "saved"), str(tmp_path / "x"), "--dtype", "fp16"])
        message = capsys.readouterr().err
        assert "1e+05, allowed as torch.float16: at most 6.55e+04" in message


class Anything:
    """A client's object."""


def save_with_object(folder: str) -> None:
    engine = build(ds_config({}), ByteGPT(SMALL))
    engine.save_checkpoint(folder, client_state={"object": Anything()})
    engine.destroy()


def save_large(folder: str) -> None:
    model = ByteGPT(SMALL)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    engine = build(ds_config({"opt_level": "O1"}, bf16=False), model)
    engine.save_checkpoint(folder)
    engine.destroy()
