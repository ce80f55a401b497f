"""Llama trainings beside their peers, at tiny sizes: a faster contestant is found faster."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import ROOT, torchrun

sys.path.append(str(ROOT / "benchmarks"))

import gpu_train
import headline
import llama_report
import operations
import step_profile
import sweeps


@pytest.mark.slow
def test_hf_llama_and_headline(tmp_path: Path) -> None:
    """Contestants of one file, and what headline.py makes of them."""
    pytest.importorskip("transformers")
    out = tmp_path / "llama.json"
    options = ("--out", str(out), "--context", "64", "--micro_steps", "2", "--steps", "3", "--warm_up", "1")
    options += ("--deterministic",)  # torch then fills what nothing has written with NaN
    printed = ""
    for contestant in ("bf16_torch_overlap", "o2plus_overlap", None):
        config = ("--deepspeed_config", str(ROOT / f"benchmarks/gpu/{contestant}.json"))
        printed = torchrun("hf_llama.py", *options, *(config if contestant else ("--fsdp2",)))
    words = " ".join(printed.split())
    assert "bytes of gradients sent, relative error of the estimate" in words
    stock, ours, fsdp2 = json.loads(out.read_text())["runs"]
    assert stock["tokens"] == ours["tokens"] == fsdp2["tokens"] == 2 * 2 * 64
    assert max(abs(a - b) for a, b in zip(fsdp2["losses"], stock["losses"], strict=True)) < 0.02
    assert abs(ours["sent"]["alltoall_base_"] / ours["gradient_bytes"] - 1) < 0.01
    assert stock["sent"]
    assert not fsdp2["sent"]
    runs = llama_report.gathered(gpu_train.load(out))
    faster = [{**run, "config": "o3"} if run is runs[1] else run for run in runs]
    for run, milliseconds in zip(faster, (100.0, 50.0, 90.0), strict=True):  # as measured they are noise
        run["milliseconds_per_step"] = milliseconds
    holds = [each.holds for each in (*headline.of_equal_batch(faster), *headline.of_equal_memory(faster))]
    assert holds == [True, True]
    faster[1]["milliseconds_per_step"] *= 3
    assert not any(each.holds for each in headline.of_equal_batch(faster))


def test_memory_is_compared_if_the_same_layers_are_checkpointed() -> None:
    """Predictions are of states; what activations take is the same only then."""

    def run_of(config: str, peak: float, **options: str) -> dict[str, Any]:
        figures = {"peak_bytes_allocated": peak, "predicted_bytes": peak / 2, "weights_saved": 0.0}
        named = {"model": "7B", "config": config, "world_size": 2, "milliseconds_per_step": 90.0}
        shared = {"micro_batch": "4", "checkpointing": "True", "compile": "None"}
        return {**named, **figures, "options": {**shared, **options}}

    stock = run_of("bf16", 80.0)
    for options, count in (({}, 2), ({"kept_layers": "4"}, 1), ({"kept_layers": "0"}, 2)):
        assert len(llama_report.claims_beside(run_of("o3", 60.0, **options), stock)) == count


def test_a_gpu_is_busy_while_any_kernel_runs() -> None:
    """Kernels of two streams overlap; between others there is a gap."""
    found = step_profile.kernels_of([(5000.0, 9000.0, "b"), (0.0, 3000.0, "a"), (1000.0, 4000.0, "b")])
    assert found == {"launches": 3, "busy_ms": 8.0, "kernels_ms": {"b": 7.0, "a": 3.0}}


@pytest.mark.slow
def test_step_profile(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out, config = tmp_path / "profile.json", ROOT / "benchmarks/gpu/o2plus.json"
    torchrun("step_profile.py", "--out", str(out), "--context", "64", "--deepspeed_config", str(config))
    (run,) = json.loads(out.read_text())["runs"]
    for phase in step_profile.PHASES:
        assert 0 < run[phase]["host_ms"] <= run[phase]["whole_ms"]


@pytest.mark.slow
def test_offload(tmp_path: Path) -> None:
    """Streamed states leave weights, gradient and ring on the device."""
    pytest.importorskip("transformers")
    out = tmp_path / "offload.json"
    options = ("--micro_batch", "1", "--context", "64", "--steps", "3", "--level", "O2+")
    torchrun("gpu_offload.py", "--out", str(out), *options, "--where", "stream")
    (run,) = json.loads(out.read_text())["runs"]
    assert len(run["checked"]) == 4
    least = 2 * run["parameters"] + run["about"]["ring_bytes"]
    assert least < run["expected_between_steps"] < least + 2 * run["parameters"]


def test_sweeps(tmp_path: Path) -> None:
    times = sweeps.sweep_times(2048, 1, torch.device("cpu"))
    assert len(times) == len(operations.LEVELS)
    assert min(times.values()) > 0
