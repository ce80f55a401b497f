"""Checkpoints of models that are split over ranks: every rank goes on from its own part, or all refuse."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from engines import Lines, assert_same_bits, packed, refusal, state_bits, whole_states
from ranks import RankPools
from safetensors.torch import load_file
from split_models import SIZE, bits_of, config_of, engine_of, run, splits_forgotten
from torch import Tensor

from ds_fp8.cli import main
from ds_fp8.zero_fp8.checkpoint import manifest

SECONDS = 120.0
TAG = "three"
Result = dict[str, Any]


def config(kind: str, size: int = SIZE, level: str = "O2", **options: Any) -> dict[str, Any]:
    return config_of(kind, {"opt_level": level}, size, bucket=10_000, **options)


def state_of(engine: Any) -> Result:
    return {
        "states": packed(engine.optimizer),
        "bits": state_bits(engine.optimizer),
        "weights": bits_of(engine),
    }


def save(folder: str, kind: str, level: str = "O2", more: int = 0, size: int = SIZE) -> Result:
    """Three steps, a tag, then more steps: what this rank had at the tag, and has at the end."""
    with splits_forgotten():
        engine = engine_of(kind, config(kind, size, level), size)
        run(engine, 0, 3, size)
        engine.save_checkpoint(folder, TAG, client_state={"note": "kept"})
        found: Result = {"saved": state_of(engine)}
        found |= run(engine, 3, more, size) | {"end": state_of(engine)}
        engine.destroy()
        return found


def load(
    folder: str, kind: str, level: str = "O2", more: int = 0, size: int = SIZE, stage: int = 2, **options: Any
) -> Result:
    """A tag in a new engine, from which a step has been taken, then more steps."""
    with splits_forgotten():
        engine = engine_of(kind, config(kind, size, level, stage=stage), size)
        run(engine, 7, 1, size)
        _, client_state = engine.load_checkpoint(folder, TAG, **options)
        found: Result = {
            "loaded": state_of(engine),
            "note": client_state["note"],
            "step": engine.global_steps,
        }
        found |= run(engine, 3, more, size) | {"end": state_of(engine)}
        engine.destroy()
        return found


def assert_same(first: Result, second: Result) -> None:
    for key in ("bits", "weights"):
        assert_same_bits(first[key], second[key])


@pytest.mark.parametrize(
    ("kind", "level", "size"),
    [("autotp", "O2", 2), ("mpu", "O2+", 2), pytest.param("autotp", "O2+", 4, marks=pytest.mark.slow)],
)
def test_resume_is_exact(ranks: RankPools, tmp_path: Path, kind: str, level: str, size: int) -> None:
    """Every rank's parameters and states are its own, which are not those of its peer.

    Of four ranks two have nothing of attention, which has two heads of keys.
    """
    folder = str(tmp_path)
    unbroken = ranks.run(size, save, folder, kind, level, 2, size, seconds=SECONDS)
    resumed = ranks.run(size, load, folder, kind, level, 2, size, seconds=SECONDS)
    parts = [each["saved"]["weights"] for each in unbroken]
    assert any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    for before, after in zip(unbroken, resumed, strict=True):
        assert_same(after["loaded"], before["saved"])
        assert_same(after["end"], before["end"])
        assert (after["losses"], after["norms"]) == (before["losses"], before["norms"])
        assert (after["note"], after["step"]) == ("kept", 3)


@pytest.fixture(scope="module", params=["autotp", "mpu"])
def tag(
    request: pytest.FixtureRequest, ranks: RankPools, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[Result]]:
    """A kind, a folder, and what 4 ranks have saved there: two parts, two replicas."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, ranks.run(4, save, str(folder), request.param, seconds=SECONDS)


def of_place(found: list[Result], key: str, place: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole states and the weights of a part."""
    mine = [each[key] for number, each in enumerate(found) if number % SIZE == place]
    return whole_states([each["states"] for each in mine]), mine[0]["weights"]


def test_what_peers_hold_alike_is_rounded_alike(tag: tuple[str, Path, list[Result]]) -> None:
    """Masters are rounded stochastically, by the same random bits on every peer."""
    _, folder, saved = tag
    found = manifest.read(folder / TAG)
    assert found is not None
    alike = [name for name in saved[0]["saved"]["weights"] if name not in found.places[0].cuts]
    assert len(alike) > 3
    for other in saved[1:]:
        assert_same_bits(
            *({name: each["saved"]["weights"][name] for name in alike} for each in (saved[0], other))
        )


def part_and_save(folder: str) -> list[str]:
    """What is logged by a save after one peer has edited what both hold alike, or both another place."""
    lines = Lines()
    with splits_forgotten():
        engine = engine_of("mpu", config("mpu"))
        engine.module.blocks[0].norm.weight.data[dist.get_rank()] += 1
        if dist.get_rank() == 0:
            engine.module.blocks[1].norm.weight.data[3] += 1
        logging.getLogger("ds_fp8").addHandler(lines)
        engine.save_checkpoint(folder, TAG)
        logging.getLogger("ds_fp8").removeHandler(lines)
        engine.destroy()
    return lines.lines


def test_a_save_names_what_has_parted(ranks: RankPools, tmp_path: Path) -> None:
    first, second = ranks.run(2, part_and_save, str(tmp_path), seconds=SECONDS)
    both = "blocks.0.norm.weight, blocks.1.norm.weight"
    assert f"model-parallel ranks should hold alike differ: {both}; each" in first[0]
    assert not second


def test_another_number_of_replicas(ranks: RankPools, tag: tuple[str, Path, list[Result]]) -> None:
    """Under another ZeRO stage, too."""
    kind, folder, saved = tag
    loaded = ranks.run(2, load, str(folder), kind, "O2", 0, SIZE, 1, seconds=SECONDS)
    for place in range(SIZE):
        for before, after in zip(
            of_place(saved, "saved", place), of_place(loaded, "loaded", place), strict=True
        ):
            assert_same_bits(after, before)


def test_weights_only(ranks: RankPools, tag: tuple[str, Path, list[Result]]) -> None:
    kind, folder, saved = tag
    loaded = ranks.run(2, weights_only, str(folder), kind, seconds=SECONDS)
    for place in range(SIZE):
        assert_same_bits(loaded[place]["loaded"]["weights"], of_place(saved, "saved", place)[1])


def weights_only(folder: str, kind: str) -> Result:
    return load(folder, kind, load_optimizer_states=False)


def words_of(folder: str, kind: str, size: int, keys: dict[str, Any]) -> tuple[str, bool]:
    """The refusal of a load, and whether the engine is as it was."""
    with splits_forgotten():
        engine = engine_of(kind, {**config(kind, size), **keys}, size)
        before = state_of(engine)
        words = refusal(lambda: engine.load_checkpoint(folder, TAG))
        after = state_of(engine)
        engine.destroy()
        unchanged = all(torch.equal(each, before["weights"][name]) for name, each in after["weights"].items())
        return words, unchanged and all(
            torch.equal(each, before["bits"][name]) for name, each in after["bits"].items()
        )


def test_another_size_is_refused_by_name(ranks: RankPools, tag: tuple[str, Path, list[Result]]) -> None:
    kind, folder, _ = tag
    for words, unchanged in ranks.run(2, words_of, str(folder), kind, 1, {}, seconds=SECONDS):
        assert "model parallel size" in words
        assert "received 2, expected 1" in words
        assert unchanged


@pytest.mark.parametrize("lost", ["mp_rank_01_model_states.pt", "*pp_rank_1_mp_rank_01_optim_states.pt"])
def test_a_tag_without_a_place_is_refused_by_all(
    ranks: RankPools, tag: tuple[str, Path, list[Result]], tmp_path: Path, lost: str
) -> None:
    kind, folder, _ = tag
    shutil.copytree(folder / TAG, tmp_path / TAG)
    (path,) = (tmp_path / TAG).glob(lost)
    path.unlink()
    for words, unchanged in ranks.run(2, words_of, str(tmp_path), kind, SIZE, {}, seconds=SECONDS):
        assert f"{path.name}: missing, but listed" in words
        assert unchanged


def test_stock_checkpoints_are_refused(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save_stock, str(tmp_path), seconds=SECONDS)
    allow = {"fp8": {"enabled": True, "checkpoint": {"allow_conversion": True}}}
    for words, unchanged in ranks.run(2, words_of, str(tmp_path), "mpu", SIZE, allow, seconds=SECONDS):
        assert (
            "received a checkpoint of stock DeepSpeed, allowed with tensor parallelism: those of ds_fp8"
            in words
        )
        assert unchanged


def save_stock(folder: str) -> None:
    with splits_forgotten():
        engine = engine_of("mpu", config_of("mpu", None))
        run(engine, 0, 1)
        engine.save_checkpoint(folder, TAG)
        engine.destroy()


def test_the_manifest_says_where_parts_lie(tag: tuple[str, Path, list[Result]]) -> None:
    kind, folder, _ = tag
    found = manifest.read(folder / TAG)
    assert found is not None
    assert found.world_size == 4
    assert [place.model_file for place in found.places] == [
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
    ]
    assert all(len(place.optimizer_files) == 2 for place in found.places)
    assert len({name for place in found.places for name in place.optimizer_files}) == 4
    cuts = found.places[0].cuts
    assert cuts == found.places[1].cuts
    expected = (
        {"blocks.0.up": 0, "blocks.0.down": 1, "blocks.1.up": 0, "blocks.1.down": 1}
        if kind == "mpu"
        else {name: 1 if "o_proj" in name or "down_proj" in name else 0 for name in cuts}
    )
    assert cuts == expected
    assert cuts


# What leaves


def whole_of(saved: list[Result], cuts: dict[str, int | None]) -> dict[str, Tensor]:
    """The whole model's weights, from those of the first replica's ranks."""
    parts = [each["saved"]["weights"] for each in saved[:SIZE]]
    found = {}
    for name, first in parts[0].items():
        dimension = cuts.get(name)
        found[name] = first if dimension is None else torch.cat([part[name] for part in parts], dim=dimension)
    return found


def exported(tag: tuple[str, Path, list[Result]], out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `ds_fp8 export` writes in BF16, and what the engine had."""
    _, folder, saved = tag
    found = manifest.read(folder / TAG)
    assert found is not None
    main(["export", str(folder), str(out), "--dtype", "bf16"])
    return load_file(out / "model.safetensors"), whole_of(saved, found.places[0].cuts)


def test_export_puts_parts_together(tag: tuple[str, Path, list[Result]], tmp_path: Path) -> None:
    assert_same_bits(*exported(tag, tmp_path / "out"))


def test_inspect(tag: tuple[str, Path, list[Result]], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(tag[1])])
    assert "4 ranks, model parallel 2, ZeRO 2" in capsys.readouterr().out
    main(["inspect", str(tag[1]), "--json"])
    assert len(json.loads(capsys.readouterr().out)["places"]) == SIZE


def test_a_tensor_cut_in_unknown_ways_is_refused(
    tag: tuple[str, Path, list[Result]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tag[1] / TAG, tmp_path / TAG)
    found = manifest.read(tmp_path / TAG)
    assert found is not None
    name = next(iter(found.places[0].cuts))
    for place in found.places:
        place.cuts[name] = None
    (tmp_path / TAG / manifest.NAME).write_text(manifest.render(found))
    for command in ("export", "to-universal"):
        with pytest.raises(SystemExit):
            main([command, str(tmp_path / TAG), str(tmp_path / "out")])
        assert f"{name}: received parts of 2 model-parallel ranks" in " ".join(
            capsys.readouterr().err.split()
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [TAG]


def test_zero_to_fp32_refuses(tag: tuple[str, Path, list[Result]], tmp_path: Path) -> None:
    """DeepSpeed's script counts the files first, and writes nothing."""
    with pytest.raises(ValueError, match=r"optim_states\.pt"):
        convert_zero_checkpoint_to_fp32_state_dict(str(tag[1]), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def load_universal(folder: str, fp8: dict[str, Any] | None) -> dict[str, Tensor]:
    """Weights of a run without parallelism that begins with a universal checkpoint."""
    with splits_forgotten():
        keys = {"checkpoint": {"load_universal": True}}
        engine = engine_of("autotp", {**config_of("autotp", fp8, 1), **keys}, 1)
        engine.load_checkpoint(folder, "universal")
        found = bits_of(engine)
        run(engine, 3, 1, 1)
        engine.destroy()
        return found


def test_universal(ranks: RankPools, tmp_path: Path) -> None:
    """Out of two parts into one run, ours and stock DeepSpeed's, whose weights are the exported ones."""
    saved = ranks.run(2, save, str(tmp_path), "autotp", seconds=SECONDS)
    main(["to-universal", str(tmp_path), str(tmp_path / "universal")])
    found = manifest.read(tmp_path / TAG)
    assert found is not None
    whole = whole_of(saved, found.places[0].cuts)
    assert_same_bits(ranks.run(1, load_universal, str(tmp_path), {}, seconds=SECONDS)[0], whole)
    stock = ranks.run(1, load_universal, str(tmp_path), None, seconds=SECONDS)[0]
    assert stock.keys() == whole.keys()
    for name, tensor in stock.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0.01, atol=1e-5)  # it rounds ties otherwise


def save_16bit(folder: str, kind: str) -> Result:
    """Steps with and without a 16-bit save between them."""
    ends = []
    for saves in (False, True):
        with splits_forgotten():
            engine = engine_of(kind, config(kind))
            run(engine, 0, 2)
            words = (
                refusal(lambda engine=engine: engine.save_16bit_model(folder, "whole.bin")) if saves else ""
            )
            before = bits_of(engine)
            homes = all(
                not home.was_left_by(engine.optimizer.parameters[home.parameter])
                for weights in engine.optimizer.parts.weights
                for home in weights.homes
            )
            found = run(engine, 2, 2)
            ends.append(state_of(engine) | {"found": found})
            engine.destroy()
    return {"ends": ends, "words": words, "weights": before, "homes": homes, "rank": dist.get_rank()}


def test_save_16bit_model(ranks: RankPools, tmp_path: Path) -> None:
    """Rank 0 writes whole weights, and training goes on to the same bits as without a save."""
    found = ranks.run(2, save_16bit, str(tmp_path), "autotp", seconds=SECONDS)
    for each in found:
        assert each["homes"], "a gather has left weights outside their buffers"
        assert each["ends"][0]["found"] == each["ends"][1]["found"]
        assert_same(each["ends"][0], each["ends"][1])
    whole = torch.load(tmp_path / "whole.bin", weights_only=True)
    parts = [each["weights"] for each in found]
    assert whole.keys() == parts[0].keys()
    for name, tensor in whole.items():
        dimension = next(
            (at for at in range(tensor.ndim) if tensor.shape[at] != parts[0][name].shape[at]), None
        )
        joined = parts[0][name] if dimension is None else torch.cat([part[name] for part in parts], dimension)
        assert torch.equal(tensor, joined), name


def test_save_16bit_model_of_an_mpu_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    for each in ranks.run(2, save_16bit, str(tmp_path), "mpu", seconds=SECONDS):
        assert "save_16bit_model: received a model that an mpu has split" in each["words"]
    assert not list(tmp_path.iterdir())
