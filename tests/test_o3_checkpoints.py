"""Checkpoints of runs whose weights are FP8 codes: masters and codes are the same bits wherever they go."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import SMALL, Lines, batches, build, build_gpt, ds_config, packed, train_losses, whole_states
from engines import assert_same_bits as assert_same
from ranks import RankPools
from safetensors.torch import load_file
from torch import Tensor
from train_lm import Shape

from ds_fp8.cli import main
from ds_fp8.ops.masters import write_weights
from ds_fp8.ops.products import Operand, tiles
from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.whole import fp8_layout
from ds_fp8.zero_fp8.products.choice import eligible
from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.kernels import REFERENCE
from ds_fp8.zero_fp8.products.ways import DecodedProducts
from ds_fp8.zero_fp8.weights.frozen import FrozenWeights
from ds_fp8.zero_fp8.weights.tiled import matrices_of

O3 = {"weights": {"dtype": "e4m3", "min_elements": 1024}, "optimizer": {"exp_avg_sq_dtype": "ue4m4"}}
O2 = {"optimizer": {"exp_avg_sq_dtype": "ue4m4"}}


@contextmanager
def engine_of(
    fp8: dict[str, Any], *, seed: int = 0, way: str = "decoded", shape: Shape = SMALL, **options: Any
) -> Iterator[Any]:
    """An engine of a GPT, destroyed at the end."""
    with patch.dict(os.environ, DS_FP8_PRODUCTS=way):
        engine = build_gpt(ds_config(fp8, **options), shape, seed)
        yield engine
        engine.destroy()


def codes_of(engine: Any) -> dict[str, Tensor]:
    """Codes and exponents of every matrix, by name."""
    found = {}
    for matrix in matrices_of(engine.optimizer.parts.weights):
        found[f"{matrix.name}/codes"] = matrix.codes.view(torch.uint8).clone()
        found[f"{matrix.name}/exponents"] = matrix.exponents.clone()
    return found


def facts(engine: Any) -> dict[str, Any]:
    """This rank's packed states; all codes; all plain weights."""
    plain = {
        name: each.detach().clone().view(torch.int16)
        for name, each in engine.module.named_parameters()
        if not isinstance(each, FP8Parameter)
    }
    return {"packed": packed(engine.optimizer), "codes": codes_of(engine), "plain": plain}


def train_and_save(folder: str, fp8: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    with engine_of(fp8, way="emulated", bucket=10_000, **options) as engine:
        source = batches(engine)
        train_losses(engine, source, 2)
        engine.save_checkpoint(folder, tag="start")
        return {**facts(engine), "losses": train_losses(engine, source, 2), "after": facts(engine)}


def move(source: str, target: str, fp8: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Load and save, without training between, nor a BF16 copy of all weights on the device."""
    with engine_of(fp8, seed=7, **options) as engine:
        matrices = list(matrices_of(engine.optimizer.parts.weights))
        decodes = [each.decodes for each in matrices]
        assert engine.load_checkpoint(source)[0] is not None
        engine.save_checkpoint(target, tag="moved")
        assert [each.decodes for each in matrices] == decodes
        return facts(engine)


def assert_moved(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert_same(*(whole_states([each["packed"] for each in run]) for run in (first, second)))
    for each in (*first, *second):
        assert_same(first[0]["codes"], each["codes"] or first[0]["codes"])


def test_other_ranks_stages_buckets_and_o2(ranks: RankPools, tmp_path: Path) -> None:
    """States and codes are the same bits after every hop; between two of O3 lies one of O2."""
    start = ranks.run(2, train_and_save, str(tmp_path / "0"), O3, {"stage": 2})
    assert len(start[0]["codes"]) == 2 * 8
    hops = [(1, O3, 2, 10**6), (3, O3, 1, 500), (2, O2, 2, 3_000), (2, O3, 1, 10_000)]
    for hop, (world_size, fp8, stage, bucket) in enumerate(hops):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        moved = ranks.run(world_size, move, *folders, fp8, {"stage": stage, "bucket": bucket})
        assert_moved(start, moved)
        assert bool(moved[0]["codes"]) == (fp8 is O3)
        if fp8 is O3:
            assert_same(start[0]["plain"], moved[0]["plain"])


def resume(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    with engine_of(O3, seed=7, way="emulated", bucket=10_000, **options) as engine:
        source = batches(engine)
        for _ in range(2):
            next(source)
        engine.load_checkpoint(folder)
        return {"losses": train_losses(engine, source, 2), "after": facts(engine)}


def test_a_run_goes_on_bit_for_bit(ranks: RankPools, tmp_path: Path) -> None:
    start = ranks.run(2, train_and_save, str(tmp_path), O3, {"stage": 2})
    for before, now in zip(start, ranks.run(2, resume, str(tmp_path), {"stage": 2}), strict=True):
        assert now["losses"] == before["losses"]
        assert_moved([before["after"]], [now["after"]])


MASTERS = {**O3, "checkpoint": {"weights": "masters"}}


def rounded(values: Tensor) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    write_weights(values, out)
    return out


def masters_of(engine: Any) -> dict[str, Tensor]:
    """Every parameter's master in FP32, as bits."""
    named = engine.module.named_parameters()
    return {name: safe_get_full_fp32_param(each).view(torch.int32) for name, each in named}


def save_both(folder: str) -> dict[str, Any]:
    """Save with codes in the model file and, by a second engine of the same state, with masters in it."""
    lines = Lines()
    logging.getLogger("ds_fp8").addHandler(lines)
    with engine_of(O3, bucket=10_000) as engine:
        train_losses(engine, batches(engine), 2)
        engine.save_checkpoint(f"{folder}/codes")
        engine.save_16bit_model(folder, "codes.bin")
        state = {name: each.clone() for name, each in engine.module.state_dict().items()}
        assert {type(each) for each in engine.module.state_dict().values()} == {Tensor}
        found = {
            "values": state,
            "matrices": {each.name: each.values() for each in matrices_of(engine.optimizer.parts.weights)},
            "masters": {name: each.view(torch.float32) for name, each in masters_of(engine).items()},
            "codes": codes_of(engine),
        }
    with engine_of(MASTERS, bucket=10_000) as engine:
        engine.load_checkpoint(f"{folder}/codes")
        engine.save_checkpoint(f"{folder}/masters")
        engine.save_16bit_model(folder, "masters.bin")
    logging.getLogger("ds_fp8").removeHandler(lines)
    said = [line for line in lines.lines if "state_dict" in line]
    return {**found, "said": said}


@pytest.fixture(scope="module")
def saved(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, ranks.run(2, save_both, str(folder))[0]


def model_file(folder: Path) -> dict[str, Tensor]:
    """What the model file of the only tag holds."""
    path = next(folder.glob("global_step*/mp_rank_00_model_states.pt"))
    module: dict[str, Tensor] = torch.load(path, weights_only=False)["module"]
    return module


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert found[name].dtype == each.dtype, name
        assert torch.equal(found[name], each), name


def test_model_files_hold_codes_values_or_masters(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, engine = saved
    assert len(engine["matrices"]) == 8
    assert_equal({name: engine["values"][name] for name in engine["matrices"]}, engine["matrices"])
    expected = {name: rounded(each) for name, each in engine["masters"].items()}
    for name, files in (("codes", engine["values"]), ("masters", expected)):
        assert_equal(model_file(folder / name), files)
        assert_equal(torch.load(folder / f"{name}.bin", weights_only=True), files)
    assert any(not torch.equal(engine["values"][name], expected[name]) for name in engine["matrices"])
    assert len(engine["said"]) == 1
    assert "fp8.checkpoint.weights masters" in engine["said"][0]


def load_weights(folder: str, fp8: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What a run has from a checkpoint without its states."""
    with engine_of(fp8, seed=7, bucket=3000) as engine:
        engine.load_checkpoint(folder, load_optimizer_states=False, **options)
        return {"masters": masters_of(engine), "codes": codes_of(engine)}


def by_hand(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    dst.load_state_dict(src)


def writes_data(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    for name, each in dst.named_parameters():
        each.data.copy_(src[name])


@pytest.mark.parametrize(
    "options",
    [{}, {"load_module_only": True}, {"custom_load_fn": by_hand}, {"custom_load_fn": writes_data}],
)
def test_weights_alone_make_masters_of_what_was_saved_of_masters(
    ranks: RankPools, saved: tuple[Path, dict[str, Any]], options: dict[str, Any]
) -> None:
    """Not of codes, which know less; but for a function of the user's, which has the model file itself."""
    folder, _ = saved
    plain = ranks.run(1, load_weights, str(folder / "masters"), O2, {})[0]["masters"]
    found = ranks.run(2, load_weights, str(folder / "masters"), O3, options)
    if "custom_load_fn" not in options:
        for fp8 in (O3, O2):
            found += ranks.run(2, load_weights, str(folder / "codes"), fp8, options)
    for each in found:
        assert_same(each["masters"], plain)
        assert_same(each["codes"] or found[0]["codes"], found[0]["codes"])


def edit_and_refresh(folder: str) -> dict[str, Any]:
    """Give two weights new values, one of them long before masters are asked to follow."""
    with engine_of(O3, bucket=3000) as engine:
        first, second = engine.module.blocks[0].qkv.weight, engine.module.blocks[1].qkv.weight
        before, values = masters_of(engine), torch.linspace(-1, 1, first.numel()).view(first.shape)
        first.data = values.bfloat16()
        engine.save_checkpoint(folder)
        assert_same(masters_of(engine), before)
        second.data = values.bfloat16()
        engine.optimizer.refresh_fp32_params()
        after = {name: each.view(torch.float32) for name, each in masters_of(engine).items()}
        for name in ("blocks.0.qkv.weight", "blocks.1.qkv.weight"):
            assert torch.allclose(after[name], values.bfloat16().float(), rtol=2**-10, atol=1e-6)
        unchanged = after.keys() - {"blocks.0.qkv.weight", "blocks.1.qkv.weight"}
        for name in unchanged:
            assert torch.equal(after[name].view(torch.int32), before[name]), name
        safe_set_full_fp32_param(first, values)
        safe_set_full_fp32_param(second, values)
        codes = codes_of(engine)
        engine.optimizer.saved.weights_from_masters()
        assert_same(codes, codes_of(engine))  # as the ranks encode together what each has of it
        first.data = values.bfloat16() * 2
        safe_set_full_fp32_param(first, values)
        assert_refresh_leaves_masters(engine)
        second.data = values.bfloat16() * 2
        train_losses(engine, batches(engine), 1)
        assert_refresh_leaves_masters(engine)
        return codes


def assert_refresh_leaves_masters(engine: Any) -> None:
    """Of FP8 weights, whose edits are over; the others' are made of the weights."""
    encoded = {each.name for each in matrices_of(engine.optimizer.parts.weights)}
    before = {name: each for name, each in masters_of(engine).items() if name in encoded}
    engine.optimizer.refresh_fp32_params()
    assert_same({name: each for name, each in masters_of(engine).items() if name in encoded}, before)


def test_edits_and_access(ranks: RankPools, tmp_path: Path) -> None:
    first, second = ranks.run(2, edit_and_refresh, str(tmp_path))
    assert_same(first, second)


def read(folder: Path) -> dict[str, Tensor]:
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def test_the_command_line(saved: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    folder, engine = saved
    for kind in ("codes", "masters"):
        source = str(folder / kind)
        main(["export", source, str(tmp_path / kind)])
        assert_equal(read(tmp_path / kind), engine["masters"])
        assert_equal(get_fp32_state_dict_from_zero_checkpoint(source), engine["masters"])
        capsys.readouterr()
        main(["inspect", source])
        assert f"8 tensors, of which model files hold {kind}" in capsys.readouterr().out
        written = manifest.read(next((folder / kind).glob("global_step*")))
        assert written is not None
        encoded = {name for name, each in written.places[0].parameters.items() if each.codes_of == "Linear"}
        assert encoded == engine["matrices"].keys()


def save_a_million(folder: str) -> int:
    with engine_of(O3, shape=Shape(layers=2, width=192, heads=2, context=32)) as engine:
        engine.save_checkpoint(folder)
        return sum(each.numel() for each in engine.module.parameters())


def test_bytes(ranks: RankPools, tmp_path: Path) -> None:
    """Codes take no room in a checkpoint: states and their FP32 view are 8 bytes, weights 2."""
    parameters = ranks.run(2, save_a_million, str(tmp_path))[0]
    for ending, at_most in (("optim_states", 8.1), ("model_states", 2.05)):
        written = sum(path.stat().st_size for path in tmp_path.rglob(f"*_{ending}.pt"))
        assert at_most - 0.15 < written / parameters <= at_most


def test_codes_in_hugging_faces_layout(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The very codes and scales of the run, whose product they are again."""
    folder, engine = saved
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "anything"}))
    arguments = ["--fp8", "--max-shard-size", "20KB", "--config", str(tmp_path / "config.json")]
    main(["export", str(folder / "codes"), str(tmp_path / "out"), *arguments])
    found = read(tmp_path / "out")
    for name, values in engine["matrices"].items():
        codes, scales = found.pop(name), found.pop(f"{name}_scale_inv")
        assert codes.dtype is torch.float8_e4m3fn
        assert scales.dtype is torch.float32
        assert list(scales.shape) == [tiles(side) for side in values.shape]
        assert torch.equal(codes.view(torch.uint8), engine["codes"][f"{name}/codes"])
        assert torch.equal(Operand(codes, scales).decode(), values.float())
    assert_equal(found, {name: rounded(engine["masters"][name]) for name in found})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "anything"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["head", "positions", "tokens"],
    }


def load_universal(folder: str) -> dict[str, Any]:
    with engine_of(O3, seed=7, bucket=3000, way="decoded") as engine:
        engine._config.load_universal_checkpoint = True
        engine.load_checkpoint(folder)
        return {"masters": masters_of(engine), "codes": codes_of(engine)}


def test_universal(ranks: RankPools, saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, engine = saved
    main(["to-universal", str(folder / "codes"), str(tmp_path / "universal")])
    for each in ranks.run(3, load_universal, str(tmp_path)):
        assert_same(
            each["masters"], {name: value.view(torch.int32) for name, value in engine["masters"].items()}
        )
        assert_same(each["codes"], engine["codes"])


def writes_rows(src: dict[str, Tensor], dst: torch.nn.Module) -> None:
    for name, each in dst.named_parameters():
        each.data[:1].copy_(src[name][:1])


def test_what_cannot_be_loaded_or_exported_is_told(
    ranks: RankPools, saved: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    folder, _ = saved
    shutil.copytree(folder / "codes", tmp_path / "cut")
    for path in (tmp_path / "cut").glob("global_step*/*optim_states.pt"):
        path.unlink()
    with pytest.raises(AssertionError, match=r"optim_states\.pt: missing, but listed"):
        ranks.run(1, load_weights, str(tmp_path / "cut"), O3, {})
    function = {"custom_load_fn": writes_rows}
    with pytest.raises(AssertionError, match=r"qkv\.weight: copy_ would write to an FP8 weight"):
        ranks.run(1, load_weights, str(folder / "codes"), O3, function)
    ranks.run(1, train_and_save, str(tmp_path / "o2"), O2, {})
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "o2"), str(tmp_path / "out"), "--fp8", "--tag", "start"])
    assert "received no FP8 weights, allowed with --fp8" in capsys.readouterr().err


def test_conv1d_is_not_part_of_the_layout() -> None:
    weights = {"h.0.attn.c_attn.weight": SimpleNamespace(codes_of="Conv1D")}
    checkpoint: Any = SimpleNamespace(folder="tag", parameters=weights)
    with pytest.raises(ValueError, match="tag: received FP8 weights of Conv1D, allowed with --fp8"):
        fp8_layout.matrices(checkpoint)


def save_llama(folder: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the codes of a Hugging Face Llama say, an input, and the logits of what save_pretrained saves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    fp8 = {**O3, "weights": {"dtype": "e4m3", "min_elements": 8192}}
    with patch.dict(os.environ, DS_FP8_PRODUCTS="decoded"):
        torch.manual_seed(0)
        engine = build(ds_config(fp8), LlamaForCausalLM(config).bfloat16())
    tokens = torch.arange(64).view(2, 32)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(folder)
    engine.module.save_pretrained(folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = saved(input_ids=tokens).logits
    matrices = {each.name: each.values() for each in matrices_of(engine.optimizer.parts.weights)}
    engine.destroy()
    return matrices, tokens, logits


def test_transformers_loads_the_codes(ranks: RankPools, tmp_path: Path) -> None:
    """By its own loader, which decodes them where there is no GPU; LoRA's base has the same values again."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    matrices, tokens, logits = ranks.run(1, save_llama, str(tmp_path / "run"))[0]
    main(["export", str(tmp_path / "run"), str(tmp_path / "fp8"), "--fp8"])
    codes = {name for name, each in read(tmp_path / "fp8").items() if each.dtype is torch.float8_e4m3fn}
    assert codes == matrices.keys()
    assert len(codes) == 7
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    assert_equal({name: model.state_dict()[name] for name in codes}, matrices)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, logits)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).requires_grad_(False)
    found, _ = eligible(base, min_elements=8192, exclude=[], trained=False, frozen=True)
    parameters = {each.parameter: each.name for each in found}
    frozen = FrozenWeights()
    frozen.take_over(Choice([], [*parameters], {}, REFERENCE, DecodedProducts(), None), parameters)
    assert_equal({each.name: each.values() for each in frozen.matrices()}, matrices)
