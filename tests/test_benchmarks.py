"""The benchmarks run here at tiny sizes, so that they are known to work before they are needed."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fp8.ops.adam import Rounding
from ds_fp8.ops.backend import REFERENCE, Backend
from ds_fp8.ops.blocks import Blocks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import timing  # noqa: E402
from verify import verify  # noqa: E402

CPU = torch.device("cpu")


def broken(which: str) -> Backend:
    """The reference with one op a little wrong."""

    def quantize(values: torch.Tensor, out: Blocks, counts: torch.Tensor | None = None) -> None:
        REFERENCE.quantize(values, out, counts)
        out.codes.view(torch.uint8)[3, 4] ^= 1

    def accumulate(pieces: list[Blocks], shard: Blocks, *, fresh: bool) -> torch.Tensor:
        return REFERENCE.accumulate(pieces, shard, fresh=fresh) * (1 + 1e-5)

    def adam_step(*operands: object, rounding: Rounding, **others: object) -> None:
        REFERENCE.adam_step(*operands, rounding=Rounding(rounding.seed + 1), **others)

    wrong = {"quantize": quantize, "accumulate": accumulate, "adam_step": adam_step}
    return dataclasses.replace(REFERENCE, **{which: wrong[which]})


@pytest.mark.parametrize("which", ["quantize", "accumulate", "adam_step"])
def test_verify_finds_a_wrong_kernel(which: str) -> None:
    with pytest.raises(AssertionError, match=which):
        verify(broken(which), CPU)


def test_verify_passes_the_reference() -> None:
    assert len(verify(REFERENCE, CPU)) == 3


@pytest.mark.slow
def test_gpu_one_under_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "gpu_one.json"
    command = [sys.executable, BENCHMARKS / "gpu_one.py", "--parameters", "2048", "--json", out]
    environment = {**os.environ, "DS_FP8_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    subprocess.run(command, env=environment, check=True, timeout=600)
    result = json.loads(out.read_text())
    names = [row["name"] for row in result["rows"]]
    assert result["kernels"] == "triton"
    assert len(result["verified"]) == 3
    assert {
        "quantize bf16 to e4m3",
        "sweep O2, writes bf16 weights",
        "torch AdamW fused, then bf16 weights",
    } <= {*names}
    moved = {row["name"]: row["bytes_moved"] for row in result["rows"]}
    blocks = 2048 // 128
    assert moved["quantize bf16 to e4m3"] == 2048 * 3 + blocks
    assert moved["sweep O2, writes bf16 weights"] == 2048 * 13 + 7 * blocks


def test_a_size_that_is_not_whole_blocks_is_refused() -> None:
    command = [sys.executable, BENCHMARKS / "gpu_one.py", "--parameters", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "multiples of 1024" in done.stderr


def quick(script: str, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """A CPU benchmark at tiny sizes: its JSON and what it printed."""
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(out.read_text())
    assert len(result["verified"]) == 3
    assert result["machine"]["threads"] >= 1
    return result, done.stdout


def test_adam_cpu(tmp_path: Path) -> None:
    result, printed = quick("adam_cpu.py", tmp_path / "adam.json", "--sizes", "64K", "128K")
    rows = {row["name"]: row for row in result["rows"]}
    assert {"ds_fp8 O1", "ds_fp8 O2", "torch AdamW fused, fp32", "torch AdamW fused, bf16"} <= {*rows}
    peers = {
        *(f"DeepSpeedCPUAdam, {dtype}" for dtype in ("fp32", "bf16")),
        "torchao AdamWFp8, fp32",
        "bitsandbytes AdamW8bit, fp32",
    }
    assert peers <= {*rows, *result["not_run"]}, "a peer was silently left out"
    assert all(f"{name}: {reason}"[:60] in printed for name, reason in result["not_run"].items())
    ours = rows["ds_fp8 O2"]
    assert ours["bytes_a_parameter"] == 14 + 6 / 128
    assert ours["state_bytes_a_parameter"] == 5 + 3 / 128
    assert ours["peak_extra_bytes"] < 2 << 20
    assert rows["torch AdamW fused, fp32"]["bytes_a_parameter"] == 34
    assert all(row["milliseconds"] > 0 and len(row["rounds"]) == 2 for row in rows.values())
    assert result["fastest_fp32_peer"]["name"] == "torch AdamW fused, fp32"
    assert [row["parameters"] for row in result["by_size"]] == [62 * 1024, 125 * 1024]


def test_quantize_cpu(tmp_path: Path) -> None:
    result, printed = quick("quantize_cpu.py", tmp_path / "quantize.json")
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 6
    assert rows["quantize bf16 to e4m3"]["bytes_an_element"] == 3 + 1 / 128
    assert rows["decode and sum 8 ranks into fp32"]["bytes_an_element"] == 1 + 1 / 128 + 4 / 8
    assert all(row["milliseconds"] > 0 and row["reference_milliseconds"] > 0 for row in rows.values())
    assert all(name in printed for name in rows)


def test_step_cpu(tmp_path: Path) -> None:
    result, printed = quick("step_cpu.py", tmp_path / "step.json")
    rows = {row["part"]: row for row in result["rows"]}
    assert [*rows] == ["forward", "backward", "step", "iteration"]
    assert all(row["ours_by_stock"] > 0 and len(row["rounds"]) == 2 for row in rows.values())
    assert result["fp8"]["kernels"] == "cpu"
    assert result["last_loss"]["ds_fp8"] == pytest.approx(result["last_loss"]["stock"], abs=0.05)
    assert "torch_adam (torch AdamW)" in printed


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("adam_cpu.py", ["--parameters", "5O"], "received '5O', allowed: a count such as 50M"),
        ("adam_cpu.py", ["--rounds", "0"], "received '0', allowed: 1 or more"),
        ("quantize_cpu.py", ["--elements", "1M"], "received 1000000, allowed: multiples of 1024"),
        ("step_cpu.py", ["--width", "33", "--heads", "2"], "received 33, allowed: multiples of --heads, 2"),
        ("step_cpu.py", ["--stock-optimizer", "sgd"], "torch_adam"),
    ],
)
def test_wrong_arguments_are_refused(script: str, options: list[str], message: str) -> None:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_nothing_is_timed_with_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cpu_backend", lambda: broken("quantize"))
    with pytest.raises(SystemExit, match="not timed: a kernel differs from the reference: quantize"):
        timing.checked_backend()


def test_contestants_take_turns_and_are_compared_round_by_round() -> None:
    ran = []
    first, second = (
        timing.Contestant(name, lambda name=name: ran.append(name), 10, rounds)
        for name, rounds in (("first", None), ("second", 2))
    )
    times = timing.interleave([first, second], 3)
    twice = {name: [name] * 2 for name in ("first", "second")}  # once untimed, just before
    assert ran == twice["first"] + twice["second"] * 2 + twice["first"] * 2
    times.milliseconds = {"first": [1.0, 2.0, 9.0], "second": [2.0, 2.0], timing.TRIAD: [4.0, 2.0, 9.0]}
    assert times.ratio("second", to="first") == 1.5
    assert times.median("first") == 2.0


def test_peak_extra_bytes_sees_a_temporary() -> None:
    values = torch.ones(1 << 21)
    assert timing.peak_extra_bytes(lambda: values.add_(1)) < 1 << 20
    assert timing.peak_extra_bytes(lambda: values + 1) > 7 << 20
