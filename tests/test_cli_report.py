"""`ds_fp8 report`."""

import json
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from engines import build, ds_config
from packaging.version import Version
from ranks import RankPools
from test_cli import output, piped
from torch import nn

import ds_fp8
from ds_fp8.cli import main
from ds_fp8.cli.configs import shipped
from ds_fp8.ops.cpu import build as kernels_build


def written(folder: Path, config: Any) -> str:
    path = folder / "ds_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def judged(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(capsys, "report", "--json", *arguments))["config"]
    return found


class TestMachine:
    def test_versions(self, capsys: pytest.CaptureFixture[str]) -> None:
        versions = json.loads(output(capsys, "report", "--json"))["versions"]
        assert versions["ds_fp8"] == ds_fp8.__version__
        assert (
            Version(versions["torch"]).public == torch.__version__.partition("+")[0]
        )  # some wheels add +cu132
        assert versions["deepspeed"] == deepspeed.__version__
        assert [*versions] == [
            "ds_fp8",
            "python",
            "torch",
            "deepspeed",
            "triton",
            "transformers",
            "accelerate",
        ]

    def test_a_package_that_is_missing(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ds_fp8.cli.report.PACKAGES", ("torch", "no_such_package"))
        assert json.loads(output(capsys, "report", "--json"))["versions"]["no_such_package"] is None
        assert "no_such_package  not installed" in output(capsys, "report")

    def test_kernels_and_why_not(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        found = json.loads(output(capsys, "report", "--json"))
        assert found["kernels"]["reference"] is None
        assert found["kernels"]["cpu"] == kernels_build.NO_COMPILER
        assert "NVIDIA GPU" in found["kernels"]["triton"]
        assert found["devices"][0]["name"].startswith("CPU")
        assert kernels_build.NO_COMPILER in output(capsys, "report")

    def test_a_gpu(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        class Properties:
            name, major, minor, total_memory = "A GPU", 7, 5, 16 * 10**9

        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
        found = json.loads(output(capsys, "report", "--json"))
        assert found["devices"] == 2 * [
            {"name": "A GPU", "compute_capability": "7.5", "bytes": 16_000_000_000}
        ]
        assert "needed is 8.0" in found["kernels"]["triton"]
        assert "16.00 GB" in output(capsys, "report")

    def test_another_deepspeed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> None:
            raise RuntimeError("deepspeed 9: expected another")

        assert json.loads(output(capsys, "report", "--json"))["cannot_register"] is None
        monkeypatch.setattr("ds_fp8.compat.check_signatures", refuse)
        assert (
            json.loads(output(capsys, "report", "--json"))["cannot_register"]
            == "deepspeed 9: expected another"
        )
        assert "deepspeed 9: expected another" in output(capsys, "report")

    def test_in_a_pipe_it_is_plain(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a process of its own, where DeepSpeed logs which accelerator it has found: that is not in it."""
        monkeypatch.delenv("DS_ACCELERATOR")
        result = piped("report", "--json", "--config", written(tmp_path, ds_config({})), COLUMNS="20")
        assert result.returncode == 0
        assert json.loads(result.stdout)["config"]["run"]["opt_level"] == "O2"


def described(config: dict[str, Any]) -> dict[str, Any]:
    engine = build(config, nn.Linear(16, 16))
    (nodes,) = (each.layout for each in engine.optimizer.parts.fleets.values())
    facts = {**ds_fp8.describe(engine), "nodes": nodes.count, "intra_node_size": nodes.size}
    engine.destroy()
    return facts


CONFIGS = {
    "O2": ds_config({}),
    "O1, accumulating": ds_config({"opt_level": "O1"}, micro_steps=2),
    "O2+, ZeRO 1, overlap": ds_config({"opt_level": "O2+"}, stage=1, zero={"overlap_comm": True}),
    "ZeRO 3": ds_config({}, stage=3, micro_steps=2, zero={"stage3_param_persistence_threshold": 8}),
    "O3": ds_config({"opt_level": "O3", "weights": {"min_elements": 256}}),
    "offloaded": ds_config(
        {"offload": {"ratio": 0.5}}, zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    ),
    "two hops": ds_config({"gradients": {"intra_node_size": 2, "inter_node_dtype": "bf16"}}),
}


OF_AN_ENGINE = {
    "version",
    "bytes_in_flight",
    "rank_bytes_min",
    "rank_bytes_max",
    "persistent_bytes",
    "fetch_bytes",
    "kernels",
    "products",
    "products_instead",
    "fp8_elements",
    "fp8_share",
    "fp8_weights",
    "bf16_matrices",
    "weight_bytes",
    "weight_bytes_per_parameter",
    "weight_room_bytes",
    "gather_bytes",
    "agreement_bytes",
    "offload",
    "host_bytes",
    "landing_bytes",
    "pinned_bytes",
    "ring_bytes",
}


class TestConfig:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_it_tells_what_an_engine_does(
        self, ranks: RankPools, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        gpus = 4 if name == "two hops" else 2
        found = judged(capsys, "--config", written(tmp_path, CONFIGS[name]), "--gpus", str(gpus))
        assert found["refused"] is None
        facts = ranks.run(gpus, described, CONFIGS[name])[0]
        for key in facts.keys() - OF_AN_ENGINE:
            assert found["run"][key] == facts[key], key
        assert found["run"]["weights"] == "bf16"

    @pytest.mark.parametrize("name", shipped())
    def test_shipped_ones_are_accepted(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = judged(capsys, "--config", written(tmp_path, shipped()[name]))
        assert found["refused"] is None
        assert (found["run"] is None) == name.endswith("bf16")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"fp8": {"enabled": True, "opt_level": "O3"}, "bf16": None, "fp16": {"enabled": True}},
                'fp16.enabled: received true, allowed: false with fp8.opt_level "O3"',
            ),
            (
                {"fp_8": {"enabled": True}},
                'fp_8: received {"enabled": true}, allowed: the section is spelled "fp8"',
            ),
            ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: received 0, allowed: 1, 2, 3"),
            (
                {"zero_optimization": {"stage": 3}, "fp8": {"enabled": True, "scaling": "tensor"}},
                'fp8.scaling: received "tensor", allowed: "block" with zero_optimization.stage 3',
            ),
            ({"optimizer": {"type": "Lamb"}}, 'optimizer.type: received "Lamb", allowed: Adam'),
            ({"fp8": {"enabled": "auto"}}, 'fp8.enabled: received "auto", allowed: '),
            (
                {"fp8": {"enabled": True, "gradients": {"intra_node_size": 3}}},
                "fp8.gradients.intra_node_size: received 3, allowed: divisors of the world size 4: 1, 2, 4",
            ),
            (
                {"fp8": {"enabled": True, "opt_level": "O2+"}, "bf16": None, "fp16": {"enabled": True}},
                "fp16.enabled: received true, allowed: false: beside a master split16 weights are BF16",
            ),
            (
                {"gradient_accumulation_steps": 0},
                "gradient_accumulation_steps: received 0, allowed: an integer",
            ),
        ],
    )
    def test_a_refusal_in_its_own_words(
        self, changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = written(tmp_path, {**ds_config({}), **changes})
        for as_json in ([], ["--json"]):
            with pytest.raises(SystemExit) as stopped:
                main(["report", "--config", path, "--gpus", "4", *as_json])
            assert stopped.value.code == 1
            out, err = capsys.readouterr()
            assert err == ""
        assert words in json.loads(out)["config"]["refused"]

    @pytest.mark.parametrize(
        ("fp8", "bucket", "gpus", "told"),
        [
            ({}, 4_000_000, 2, True),
            ({}, 16_000_000, 2, False),
            ({}, 4_000_000, 1, False),
            ({"gradients": {"dtype": "bf16"}}, 4_000_000, 2, False),
            ({"gradients": {"intra_node_size": 2}}, 4_000_000, 4, False),
        ],
    )
    def test_buckets_for_which_stock_is_faster(
        self,
        fp8: dict[str, Any],
        bucket: int,
        gpus: int,
        told: bool,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = written(tmp_path, ds_config(fp8, bucket=bucket))
        advice = judged(capsys, "--config", path, "--gpus", str(gpus))["run"]["advice"]
        assert ["reduce_bucket_size to 16,000,000" in each for each in advice] == [True] * told

    @pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2.0), (None, None)])
    def test_zero_3(
        self, dtype: str | None, itemsize: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        zero = {"stage3_param_persistence_threshold": 640, "sub_group_size": 10}
        path = written(tmp_path, ds_config({}, stage=3, micro_steps=2, zero=zero, bf16=dtype is not None))
        run = judged(capsys, "--config", path, "--gpus", "4")["run"]
        assert (run["zero_stage"], run["overlap_comm"], run["reduced_gradient"]) == (3, True, "fp32")
        assert (run["param_persistence_threshold"], run["wire_bytes_per_fetched_element"]) == (640, itemsize)
        assert run["without_effect"] == [
            "zero_optimization.sub_group_size (the step processes one bucket at a time)"
        ]
        told = output(capsys, "report", "--config", path)
        assert re.search(rf"wire bytes per fetched element +{'2.0000' if itemsize else '-'}", told)

    def test_ranks_that_share_sequences(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Four sequences of a batch on eight ranks, two for each."""
        config = {**ds_config({}), "sequence_parallel_size": 2, "train_batch_size": 16}
        run = judged(capsys, "--config", written(tmp_path, config), "--gpus", "8")["run"]
        assert (run["world_size"], run["sequence_parallel_size"], run["micro_steps"]) == (8, 2, 1)
        with pytest.raises(SystemExit):
            main(["report", "--config", written(tmp_path, config), "--gpus", "3"])
        assert "sequence_parallel_size: received 2, allowed: divisors" in capsys.readouterr().out

    def test_a_model_that_autotp_splits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """By default on as many ranks as it is split over."""
        config = written(tmp_path, {**ds_config({}), "tensor_parallel": {"autotp_size": 2}})
        for options, ranks in (((), 2), (("--gpus", "8"), 8)):
            run = judged(capsys, "--config", config, *options)["run"]
            assert (run["world_size"], run["model_parallel_size"]) == (ranks, 2)
        with pytest.raises(SystemExit):
            main(["report", "--config", config, "--gpus", "3"])
        assert "tensor_parallel.autotp_size: received 2, allowed: divisors" in capsys.readouterr().out

    def test_where_micro_steps_add_up(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for stage, dtype in ((1, "fp32"), (2, None)):
            config = {**ds_config({}, stage=stage), "data_types": {"grad_accum_dtype": "fp32"}}
            assert judged(capsys, "--config", written(tmp_path, config))["run"]["grad_accum_dtype"] == dtype

    def test_no_batch_size(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A template for an autotuner, or for accelerate: DeepSpeed alone refuses it."""
        config = {"zero_optimization": {"stage": 1}, "fp8": {"enabled": True}}
        alone = judged(capsys, "--config", written(tmp_path, config))["run"]["refused_without_hugging_face"]
        assert "train_batch_size" in alone

    def test_an_engine_that_may_have_no_optimizer(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Under ZeRO 3 a client may bring one: the report is of that run."""
        config = {**ds_config({}, stage=3), "zero_optimization.reduce_bucket_size": 4096}
        del config["optimizer"]
        run = judged(capsys, "--config", written(tmp_path, config))["run"]
        assert run["without_effect"] == [
            "zero_optimization.reduce_bucket_size (DeepSpeed reads no key with a dot)"
        ]
        config["zero_optimization"]["stage"] = 0
        assert "idle" in judged(capsys, "--config", written(tmp_path, config))["off"]

    def test_brackets_are_text(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = written(tmp_path, {"fp8": {"enabled": True, "opt_level": "[red]"}})
        with pytest.raises(SystemExit):
            main(["report", "--config", path])
        assert 'fp8.opt_level: received "[red]"' in capsys.readouterr().out

    def test_what_hugging_face_fills_in(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = ds_config({}, lr="auto", clipping="auto")
        config |= {
            "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": "auto"},
            "prescale_gradients": True,
        }
        plan = judged(capsys, "--config", written(tmp_path, config), "--micro-steps", "4")["run"]
        filled_in = [
            "gradient_accumulation_steps",
            "gradient_clipping",
            "optimizer.params.lr",
            "bf16.enabled",
        ]
        assert plan["filled_in_by_hugging_face"] == filled_in
        assert (plan["micro_steps"], plan["reduced_gradient"], plan["weights"]) == (4, "fp32", "bf16")
        assert plan["without_effect"][0].startswith("prescale_gradients (")
        told = output(capsys, "report", "--config", written(tmp_path, config))
        assert "optimizer.params.lr" in told
        assert "prescale_gradients" in told

    @pytest.mark.parametrize(
        ("batches", "micro_steps"),
        [
            ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, 4),
            ({"train_batch_size": 64}, 1),
            ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, 2),
        ],
    )
    def test_micro_steps_as_deepspeed_infers_them(
        self, batches: dict[str, int], micro_steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = ds_config({})
        del config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        found = judged(capsys, "--config", written(tmp_path, config | batches), "--gpus", "4")
        assert found["run"]["micro_steps"] == micro_steps

    def test_off(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        told = output(capsys, "report", "--config", written(tmp_path, ds_config()))
        assert "FP8 is off" in told
