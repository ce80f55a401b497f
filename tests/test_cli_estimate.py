"""`ds_fp8 estimate`, and DeepSpeed's estimators by their names."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed.runtime.zero import stage3, stage_1_and_2
from engines import ds_config
from test_cli import output, piped
from test_cli_report import written
from train_lm import ByteGPT, Shape

import ds_fp8
from ds_fp8.cli import main
from ds_fp8.estimate.codes import elements_of
from ds_fp8.estimate.methods import (
    STOCK,
    STOCK_BF16_STATES,
    largest,
    levels,
)
from ds_fp8.estimate.model_sizes import pretrained
from ds_fp8.estimate.runs import Run, model_of_module, model_of_size

G = 10**9


def gpt_2(**config: Any) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))


CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block of GPT-2
METHODS = [STOCK, STOCK_BF16_STATES, *levels().values()]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def estimated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(capsys, "estimate", "--json", *arguments))
    return found


def by_method(model: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {each["method"]: each for each in model["bytes"]}


class TestParams:
    def test_bytes_by_hand(self, capsys: pytest.CaptureFixture[str]) -> None:
        """8 ranks, a size that leaves no padding; bytes per parameter as in README's table."""
        found = estimated(capsys, "--params", "409600000", "--gpus", "8")
        (model,) = found["models"]
        assert model["parameters"] == 409_600_000
        assert (found["stage"], found["gpus"], found["micro_steps"]) == (2, 8, 1)
        share = 51_200_000
        methods = by_method(model)
        assert methods["DeepSpeed BF16"]["states"] == 12 * share
        assert methods["DeepSpeed BF16"]["gradients"] == 2 * share
        assert methods["DeepSpeed BF16"]["buffers"] == 2 * 500_000_000
        assert methods["DeepSpeed BF16 states"]["states"] == 6 * share
        assert methods["ds_fp8 O1"]["states"] == 12 * share
        assert methods["ds_fp8 O2"]["states"] == 5 * share + 3 * share // 128
        assert methods["ds_fp8 O2+"]["states"] == 4 * share + 2 * share // 128
        assert methods["ds_fp8 O3"]["states"] == 4 * share + 3 * share // 128
        coded = elements_of(409_600_000)
        for name, each in methods.items():
            weights = 2 * 409_600_000 - (coded if name == "ds_fp8 O3" else 0)
            assert each["weights"] == pytest.approx(weights, rel=0.0005 if name == "ds_fp8 O3" else 0)
            assert (each["persistent"], each["fetched"]) == (0, 0)
            assert each["total"] == sum(each[key] for key in ("weights", "states", "gradients", "buffers"))

    def test_zero_3_by_hand(self, capsys: pytest.CaptureFixture[str]) -> None:
        """8 ranks, a size that leaves no padding; all of it may be live at a time."""
        found = estimated(capsys, "--params", "409600000", "--gpus", "8", "--stage", "3")
        assert found["overlap"]  # DeepSpeed's default there
        methods, share = by_method(found["models"][0]), 51_200_000
        codes = 409_600_000 - 2 * 32_000 * round((409_600_000 * 128 / 12) ** (1 / 3))
        for name, each in methods.items():
            saved = codes if name == "ds_fp8 O3" else 0
            assert each["weights"] == pytest.approx(2 * share - saved / 8, rel=0.005 if saved else 0)
            assert (each["persistent"], each["fetched"]) == (0, 2 * 409_600_000 - saved)
            assert each["total"] == sum(each[key] for key in each.keys() - {"method", "total"})
        assert methods["DeepSpeed BF16"]["states"] == 12 * share
        assert methods["DeepSpeed BF16"]["gradients"] == 2 * share
        assert methods["DeepSpeed BF16"]["buffers"] == 2 * 500_000_000 + 2 * 409_600_000
        assert methods["ds_fp8 O2"]["states"] == 5 * share + 3 * share // 128
        assert methods["ds_fp8 O2"]["gradients"] == share + share // 128

    def test_stock_zero_3_holds_most_in_its_step(self, capsys: pytest.CaptureFixture[str]) -> None:
        (model,) = estimated(capsys, "--params", "6144M", "--gpus", "8", "--stage", "3")["models"]
        stock, share = by_method(model)["DeepSpeed BF16"], 768_000_000
        assert (stock["persistent"], stock["fetched"]) == (0, 0)
        assert stock["buffers"] == 2 * 500_000_000 + 6 * share
        assert by_method(model)["ds_fp8 O2"]["fetched"] == 2 * 1_050_000_000

    @pytest.mark.parametrize(
        ("text", "parameters"),
        [
            ("7G", 7 * G),
            ("7b", 7 * G),
            ("1.3B", 1_300_000_000),
            ("350M", 350_000_000),
            ("12k", 12_000),
            ("5", 5),
        ],
    )
    def test_units(self, text: str, parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
        assert estimated(capsys, "--params", text)["models"][0]["parameters"] == parameters

    def test_micro_steps_make_the_reduced_gradient_fp32(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--params", "1024000", "--opt-level", "O2")
        one, two = (
            by_method(estimated(capsys, *arguments, *more)["models"][0])
            for more in ([], ["--micro-steps", "2"])
        )
        assert one["ds_fp8 O2"]["gradients"] == 1_024_000 * 129 // 128
        assert two["ds_fp8 O2"]["gradients"] == 4 * 1_024_000
        assert [*one] == ["DeepSpeed BF16", "DeepSpeed BF16 states", "ds_fp8 O2"]

    def test_zero_1_keeps_every_grad(self, capsys: pytest.CaptureFixture[str]) -> None:
        methods = by_method(
            estimated(capsys, "--params", "1024000", "--stage", "1", "--gpus", "4")["models"][0]
        )
        assert methods["ds_fp8 O1"]["gradients"] == 2 * 1_024_000 + 256_000 * 129 // 128
        assert methods["DeepSpeed BF16"]["gradients"] == 2 * 1_024_000

    def test_table_of_zero_3(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, _, heading, *rows, note = output(capsys, "estimate", "--params", "7G", "--stage", "3").splitlines()
        assert heading.split()[-4:] == ["persistent", "fetched", "per", "GPU"]
        assert note.startswith("ds_fp8 O3: 96.1% of the parameters in FP8")
        assert all(row.count("B") >= 7 for row in rows)

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        caption, name, heading, *rows, note = output(
            capsys, "estimate", "--params", "7G", "--gpus", "8"
        ).splitlines()
        assert note.startswith("ds_fp8 O3: 96.1% of the parameters in FP8, as of a Llama of that size")
        assert caption == "What a GPU holds, without activations: ZeRO 2, 8 GPUs, 1 micro-step per step"
        assert "7.00 G parameters" in name
        assert heading.split() == ["weights", "states", "gradients", "buffers", "per", "GPU"]
        assert [row.split("  ")[0].strip() for row in rows] == [each.name for each in METHODS]
        assert all(row.count("B") >= 5 for row in rows)


class TestConfig:
    def test_it_decides(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fp8 = {"block_size": 32, "optimizer": {"master_dtype": "bf16"}}
        config = ds_config(fp8, stage=1, micro_steps=2, bucket=1024, zero={"overlap_comm": True})
        found = estimated(capsys, "--params", "64000", "--config", written(tmp_path, config))
        run = {key: found[key] for key in ("gpus", "stage", "micro_steps", "bucket_elements", "overlap")}
        assert run == {"gpus": 1, "stage": 1, "micro_steps": 2, "bucket_elements": 1024, "overlap": True}
        ours = by_method(found["models"][0])["ds_fp8, ds_config.json"]
        assert ours["states"] == 64_000 * 5 + 2 * 64_000 // 32
        assert len(found["models"][0]["bytes"]) == 3

    def test_the_keys_of_zero_3_decide(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        zero = {"stage3_max_live_parameters": 9000, "prefetch_bucket_size": 1000, "sub_group_size": 5e3}
        path = written(tmp_path, ds_config({}, stage=3, bucket=2048, zero=zero))
        found = estimated(capsys, "--params", "64000", "--gpus", "2", "--config", path)
        assert found["overlap"]
        assert (found["fetching"]["max_live_parameters"], found["fetching"]["sub_group_size"]) == (9000, 5000)
        methods = by_method(found["models"][0])
        ours = methods["ds_fp8, ds_config.json"]
        assert (ours["persistent"], ours["fetched"]) == (2 * 64_000, 0)  # none has 100,000 elements
        zero["stage3_param_persistence_threshold"] = 100
        path = written(tmp_path, ds_config({}, stage=3, bucket=2048, zero=zero))
        found = estimated(capsys, "--params", "64000", "--gpus", "2", "--config", path)
        ours = by_method(found["models"][0])["ds_fp8, ds_config.json"]
        assert (ours["persistent"], ours["fetched"]) == (0, 2 * 10_000)


class TestModel:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("as_folder", [False, True])
    def test_a_config(
        self, tied: bool, as_folder: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "config.json"
        config = {**LLAMA, "tie_word_embeddings": tied}
        path.write_text(json.dumps(config))
        found = estimated(capsys, "--model", str(tmp_path if as_folder else path), "--gpus", "2")["models"][0]
        real = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        assert found["parameters"] == sum(each.numel() for each in real.parameters())
        expected = levels()["O2"].held(model_of_module(real), Run(2))
        assert by_method(found)["ds_fp8 O2"]["states"] == expected.states

    def test_fp8_weights_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Of a model in FP32, as it comes from its config: a run casts it. GPT-2 has Conv1D."""
        gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(gpt2))
        weights = {"min_elements": 256, "exclude": ["*.h.0.*"]}
        section = written(tmp_path, ds_config({"opt_level": "O3", "weights": weights}))
        arguments = ("--model", str(path), "--config", section)
        (found,) = estimated(capsys, *arguments)["models"][0]["fp8_weights"].values()
        names = [f"transformer.h.1.{name}.weight" for name in CONV1D]
        assert found["fp8_weights"] == names
        assert found["fp8_elements"] == 12 * 32**2
        assert found["bf16_matrices"]["transformer.h.0.mlp.c_fc.weight"] == "excluded by *.h.0.*"
        assert "transformer.wte.weight" in found["bf16_matrices"]
        share = 12 * 32**2 / sum(each.numel() for each in gpt_2(**gpt2).parameters())
        note = f"ds_fp8, ds_config.json: 4 matrices, {share:.1%} of the parameters, in FP8"
        assert output(capsys, "estimate", *arguments).splitlines()[-1] == note

    def test_a_config_without_an_architecture(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}))
        found = estimated(capsys, "--model", str(path))["models"][0]
        real = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2))
        assert found["parameters"] == sum(each.numel() for each in real.parameters())
        why = "GPT2LMHeadModel, as the config names no architecture"
        assert found["counted"] == why
        assert f"parameters ({why})" in output(capsys, "estimate", "--model", str(path))

    @pytest.mark.parametrize(
        ("changes", "counted"),
        [
            ({"architectures": ["LlamaModel"]}, "LlamaModel"),
            ({"architectures": "LlamaModel"}, "LlamaModel"),
            ({"architectures": []}, "LlamaForCausalLM, as the config names no architecture"),
            (
                {"architectures": ["OursForCausalLM"]},
                'LlamaForCausalLM, as transformers has no "OursForCausalLM"',
            ),
            ({"architectures": ["logging"]}, 'LlamaForCausalLM, as transformers has no "logging"'),
            (
                {"model_type": "t5", "architectures": None},
                "T5ForConditionalGeneration, as the config",
            ),
            ({"model_type": "vit", "architectures": None}, "ViTModel, as the config names no architecture"),
        ],
    )
    def test_the_class_that_is_counted_is_said(
        self, changes: dict[str, Any], counted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        found = estimated(capsys, "--model", str(tmp_path))["models"][0]["counted"]
        assert found.startswith(counted)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"num_hidden_layers": 10**9},
                "num_hidden_layers: received 1000000000, allowed: an integer",
            ),
            ({"num_hidden_layers": -1}, "num_hidden_layers: received -1"),
            ({"num_hidden_layers": 1.5}, "num_hidden_layers: received 1.5"),
            ({"hidden_size": 10**30}, "hidden_size: received 1000000000000000000000000000000"),
            ({"hidden_size": "wide"}, "hidden_size"),
            ({"vocab_size": None}, "config.json"),
            ({"num_hidden_layers": 10**4, "hidden_size": 10**8}, "received"),
            ({"num_hidden_layers": [2]}, "config.json"),
        ],
    )
    def test_absurd_sizes_are_refused(
        self, changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ds_fp8.estimate.model_sizes.MOST_TENSORS", 1000)
        monkeypatch.setattr("ds_fp8.estimate.runs.MOST_TENSORS", 1000)
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        start = time.monotonic()
        with pytest.raises(ValueError, match=re.escape(words)) as refused:
            pretrained(str(tmp_path))
        assert time.monotonic() - start < 10
        assert len(str(refused.value)) < 1000

    def test_a_name_in_the_cache(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshot = tmp_path / "models--somebody--small" / "snapshots" / "0" / "config.json"
        snapshot.parent.mkdir(parents=True)
        snapshot.write_text(json.dumps(LLAMA))
        reference = tmp_path / "models--somebody--small" / "refs" / "main"
        reference.parent.mkdir()
        reference.write_text("0")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert estimated(capsys, "--model", "somebody/small")["models"][0]["name"] == "somebody/small"


class TestPaper:
    def test_sizes_are_those_of_the_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        models = {each["name"]: each for each in estimated(capsys, "--paper", "--gpus", "32")["models"]}
        wanted = {"125M": 125e6, "7B": 7e9, "13B": 13e9, "175B": 175e9}
        assert [*models] == [*wanted]
        for name, parameters in wanted.items():
            assert models[name]["parameters"] == pytest.approx(parameters, rel=0.025)
            totals = {method: each["total"] for method, each in by_method(models[name]).items()}
            assert totals["ds_fp8 O2+"] < totals["ds_fp8 O2"] < totals["ds_fp8 O1"]

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, heading, *rows = output(capsys, "estimate", "--paper", "--opt-level", "O2").splitlines()
        assert heading.split()[:2] == ["model", "size"]
        assert [row.split()[0] for row in rows] == ["125M", "7B", "13B", "175B"]


class TestLargest:
    @pytest.mark.parametrize("stage", [1, 2, 3])
    @pytest.mark.parametrize("method", METHODS, ids=lambda each: each.name)
    def test_it_fits_and_one_percent_more_does_not(self, method: Any, stage: int) -> None:
        run, memory = Run(8, stage), 80 * G
        if method.refusal(model_of_size(40 * G, run), run):
            pytest.skip("refused")
        size = largest(method, run, memory)
        assert 79.9 * G < method.held(model_of_size(size, run), run).total <= memory
        assert method.held(model_of_size(size + size // 100, run), run).total > memory

    def test_none_fits(self) -> None:
        """DeepSpeed's bucket alone takes 1 GB."""
        assert largest(STOCK, Run(8), G // 2) == 0

    def test_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = estimated(capsys, "--memory", "80", "--gpus", "8")
        sizes = {each["method"]: each["parameters"] for each in found["largest"]}
        assert found["memory"] == 80 * G
        assert sizes["ds_fp8 O2"] == largest(levels()["O2"], Run(8), 80 * G)
        ours = [sizes[f"ds_fp8 {level}"] for level in levels()]
        assert sizes["DeepSpeed BF16"] < ours[0] < ours[1] < ours[2] < ours[3]
        at_stage_3 = estimated(capsys, "--memory", "80", "--gpus", "8", "--stage", "3")
        sizes = {each["method"]: each["parameters"] for each in at_stage_3["largest"]}
        assert sizes["ds_fp8 O3"] > 1.1 * sizes["ds_fp8 O2+"]
        assert "ds_fp8 O2+" in output(capsys, "estimate", "--memory", "141.5")


class TestEstimators:
    NAMES = ("model_states_mem_needs_all_live", "model_states_mem_needs_all_cold")

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_called_as_deepspeeds(self, stage: int, name: str) -> None:
        ours = signature(getattr(ds_fp8, f"estimate_zero{stage}_{name}")).parameters
        home = stage3 if stage == 3 else stage_1_and_2
        theirs = signature(getattr(home, f"estimate_zero{max(2, stage)}_{name}")).parameters
        assert [*ours] == [each for each in theirs if each != "additional_buffer_factor"]
        assert all(ours[each].default == theirs[each].default for each in ours)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_live_and_cold(self, stage: int, capsys: pytest.CaptureFixture[str]) -> None:
        with torch.device("meta"):
            model = ByteGPT(Shape(layers=2, width=32, heads=2, context=32))
        for parameter in model.blocks[0].parameters():
            parameter.requires_grad_(False)
        live = getattr(ds_fp8, f"estimate_zero{stage}_model_states_mem_needs_all_live")
        assert live(model, num_gpus_per_node=4, num_nodes=2) is None
        told = capsys.readouterr().out
        assert f"under ZeRO {stage}" in told
        assert "2 nodes, 4 GPUs per node" in told
        assert "of them frozen" in told
        main(["estimate", "--params", "7G", "--gpus", "8", "--stage", str(stage)])
        rows = capsys.readouterr().out.splitlines()[1:]
        cold = getattr(ds_fp8, f"estimate_zero{stage}_model_states_mem_needs_all_cold")
        cold(*([7 * G, G] if stage == 3 else [7 * G]), 8)
        assert capsys.readouterr().out.splitlines()[2:] == rows

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((0,), "total_params: received 0, allowed: an integer, 1 or more"),
            ((7.0,), "total_params: received 7.0, allowed"),
            ((7, 0), "num_gpus_per_node: received 0, allowed"),
            ((7, 1, -1), "num_nodes: received -1, allowed"),
        ],
    )
    def test_wrong_arguments(self, arguments: tuple[Any, ...], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            ds_fp8.estimate_zero2_model_states_mem_needs_all_cold(*arguments)

    def test_the_largest_layer_is_whole_while_it_computes(self, capsys: pytest.CaptureFixture[str]) -> None:
        ds_fp8.estimate_zero3_model_states_mem_needs_all_cold(70 * G, 2 * G, 64)
        *_, ours, at_o3, _ = capsys.readouterr().out.splitlines()
        assert [each.split()[-4:-2] for each in (ours, at_o3)] == [["4.10", "GB"], ["2.07", "GB"]]
        with pytest.raises(ValueError, match="largest_layer_params: received 0, allowed"):
            ds_fp8.estimate_zero3_model_states_mem_needs_all_cold(7 * G, 0)

    def test_a_model_without_anything_to_train(self) -> None:
        frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        with pytest.raises(
            ValueError, match="Linear: received no parameter that trains, allowed: at least one"
        ):
            ds_fp8.estimate_zero1_model_states_mem_needs_all_live(frozen)


def test_tensor_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of everything; of known shapes embeddings and norms stay whole."""
    once, split = (
        by_method(estimated(capsys, "--params", "1G", "--gpus", gpus, *more)["models"][0])
        for gpus, more in (("4", ()), ("8", ("--tensor-parallel", "2")))
    )
    for key in ("weights", "states", "gradients"):
        assert split["ds_fp8 O2"][key] == pytest.approx(once["ds_fp8 O2"][key] / 2, rel=0.001)
    assert "ds_fp8 O3" not in split
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = ("--model", str(tmp_path / "config.json"), "--opt-level", "O2")
    found = by_method(estimated(capsys, *model, "--tensor-parallel", "2")["models"][0])["ds_fp8 O2"]
    # Of two layers attention, MLP and, beside the embedding, the head; five norms, a block each.
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176) + 256 * 64
    assert found["weights"] == pytest.approx(2 * (matrices / 2 + 256 * 64 + 5 * 128))
    for options, words in (
        (("--gpus", "3"), "--tensor-parallel: received 2, allowed: divisors"),
        (("--stage", "3"), "--tensor-parallel: received 2, allowed: 1 under ZeRO 3"),
    ):
        with pytest.raises(SystemExit):
            main(["estimate", "--params", "1G", "--tensor-parallel", "2", *options])
        assert words in capsys.readouterr().err


def test_deepspeed_is_not_imported() -> None:
    code = (
        "import sys; from ds_fp8.cli import main; main(['estimate', '--params', '7G', '--json']);"
        "print([name for name in ('deepspeed', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_in_a_pipe_it_is_plain() -> None:
    result = piped("estimate", "--paper", COLUMNS="20")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii()
    assert len(result.stdout.splitlines()) == 6


CONFIG = "CONFIG"  # stands for a file of the given text
OK = json.dumps(ds_config({}))
STOCK_CONFIG = json.dumps(ds_config())
WRONG: list[tuple[list[str], str, list[str]]] = [
    (["estimate"], "", ["--params", "--model", "--paper", "--memory", "required"]),
    (["estimate", "--params", "many"], "", ["--params", "'many'", "350M"]),
    (["estimate", "--params", "0"], "", ["--params", "'0'", "350M"]),
    (["estimate", "--params", "7G", "--paper"], "", ["--paper", "not allowed with", "--params"]),
    (["estimate", "--params", "7G", "--gpus", "0"], "", ["--gpus", "'0'", "1 or more"]),
    (["estimate", "--params", "7G", "--micro-steps", "1.5"], "", ["--micro-steps", "'1.5'", "1 or more"]),
    (["estimate", "--params", "7G", "--stage", "4"], "", ["--stage", "4", "1", "2", "3"]),
    (["estimate", "--params", "7G", "--opt-level", "O4"], "", ["--opt-level", "'O3'", "O1", "O2", "O2+"]),
    (["estimate", "--memory", "80GB"], "", ["--memory", "'80GB'", "as 80"]),
    (["estimate", "--memory", "-80"], "", ["--memory"]),
    (["estimate", "--model", "somebody/no-such-model"], "", ["'somebody/no-such-model'", "config.json"]),
    (["estimate", "--model", "no/such/config.json"], "", ["no/such/config.json", "no such file"]),
    (["estimate", "--model", CONFIG], '{"model_type": "quux"}', ["quux", "config.json"]),
    (["estimate", "--model", CONFIG], "{", ["config.json"]),
    (["estimate", "--params", "7G", "--config", "no/such.json"], "", ["no/such.json"]),
    (["estimate", "--params", "7G", "--config", CONFIG], "[1, 2]", ["[1, 2]", "an object"]),
    (["estimate", "--params", "7G", "--config", CONFIG], STOCK_CONFIG, ['no enabled "fp8" section']),
    (["estimate", "--params", "7G", "--config", CONFIG, "--stage", "1"], OK, ["--stage", "--config"]),
    (
        ["estimate", "--params", "7G", "--config", CONFIG, "--opt-level", "O1"],
        OK,
        ["--opt-level", "--config"],
    ),
    (
        ["estimate", "--params", "7G", "--config", CONFIG],
        json.dumps(ds_config({"block_size": 48, "opt_level": "O9"})),
        ["fp8.block_size: received 48", 'fp8.opt_level: received "O9"'],
    ),
    (
        ["estimate", "--params", "7G", "--config", CONFIG],
        json.dumps(ds_config({}, bf16=False)),
        ["bf16.enabled: received false"],
    ),
    (["report", "--config", "no/such.json"], "", ["no/such.json: no such file"]),
    (["report", "--config", CONFIG], '{"fp8": ', ["DeepSpeed refuses it", "line 1 column 9"]),
    (["report", "--config", CONFIG, "--gpus", "none"], OK, ["--gpus", "'none'", "1 or more"]),
    (["report", "ds_config.json"], "", ["unrecognized", "ds_config.json"]),
]


@pytest.mark.parametrize(("arguments", "text", "parts"), WRONG)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str],
    text: str,
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main([str(path) if each == CONFIG else each for each in arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ds_fp8 {arguments[0]}: ") or "unrecognized" in err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_without_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find: Callable[..., Any] = lambda name: None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--model", str(tmp_path)])
    assert stopped.value.code == 2
    assert "pip install ds-fp8[hf]" in capsys.readouterr().err


class TestAbsurdSizes:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--params", "1" + "0" * 30],
            ["--params", "9" * 5000],
            ["--params", "1e400B"],
            ["--params", "9" * 400 + "B"],
            ["--params", "10000001M"],
            ["--params", "99999999T"],
            ["--params", "1.5"],
            ["--params", "0.0000001K"],
            ["--params", "-7G"],
            ["--params", "nan"],
            ["--params", "x y" * 1000],
            ["--params", "7G", "--gpus", "1000000000"],
            ["--params", "7G", "--gpus", "1000000"],
            ["--params", "7G", "--gpus", "9" * 5000],
            ["--params", "7G", "--gpus", "1.5"],
            ["--params", "7G", "--micro-steps", "9" * 30],
            ["--params", "7G", "--stage", "1" * 5000],
            ["--memory", "9" * 400],
            ["--memory", "1e400"],
            ["--memory", "0"],
            ["--memory", "0.0"],
        ],
        ids=lambda arguments: " ".join(arguments)[:30],
    )
    def test_refused_in_one_line_at_once(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            main(["estimate", *arguments])
        assert stopped.value.code == 2
        assert time.monotonic() - start < 5
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert len(err) < 500
        assert "received" in err or "invalid" in err or "expected one argument" in err

    def test_small_buckets(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = written(tmp_path, ds_config({}, bucket=1))
        with pytest.raises(SystemExit):
            main(["estimate", "--params", "7G", "--config", path])
        assert "tensors: received 7000000000, allowed: 1 to 100,000" in capsys.readouterr().err
        path = written(tmp_path, ds_config({"scaling": "tensor"}, bucket=10**6))
        with pytest.raises(SystemExit):
            main(["estimate", "--params", "7G", "--gpus", "10000", "--config", path])
        assert "received 7000, allowed: at most 400 on 10,000 GPUs" in capsys.readouterr().err

    def test_the_largest_that_are_taken_take_seconds(self) -> None:
        start = time.monotonic()
        run = Run(2**14)
        for each in METHODS:
            each.held(model_of_size(10**12, run), run)
        assert time.monotonic() - start < 30

    def test_in_python(self) -> None:
        with pytest.raises(
            ValueError, match="parameters: received 1000000000000000000000000000000, allowed: 1"
        ):
            ds_fp8.estimate_zero2_model_states_mem_needs_all_cold(10**30)
        with pytest.raises(ValueError, match="GPUs: received 1000000000, allowed: 1 to 16,384"):
            ds_fp8.estimate_zero1_model_states_mem_needs_all_cold(7, 10**9)


DOCS = Path(__file__).parents[1] / "docs"
SHOWN = [
    block
    for page in ("command_line.md", "memory.md")
    for block in re.findall(r"```console\n\$ ds_fp8 (.*?)```", (DOCS / page).read_text(), re.DOTALL)
]


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: block.splitlines()[0])
def test_the_documentation_shows_what_is_printed(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *lines = block.splitlines()
    assert [line.rstrip() for line in output(capsys, *command.split()).splitlines()] == lines
