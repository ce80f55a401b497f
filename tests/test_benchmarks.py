"""The benchmarks run here at tiny sizes, so that they are known to work before they are needed."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from kernel_support import needs_compiler

from ds_fp8.ops.adam import Sweep
from ds_fp8.ops.backend import REFERENCE, Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.cpu import build
from ds_fp8.ops.rounding import Rounding

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import comm_model  # noqa: E402
import timing  # noqa: E402
from verify import verify  # noqa: E402

CPU = torch.device("cpu")


def broken(which: str) -> Backend:
    """The reference with one op a little wrong."""

    def quantize(values: torch.Tensor, out: Blocks, counts: torch.Tensor | None = None) -> None:
        REFERENCE.quantize(values, out, counts)
        out.codes.view(torch.uint8)[3, 4] ^= 1

    def accumulate(pieces: list[Blocks], shard: Blocks, *, overwrite: bool) -> torch.Tensor:
        return REFERENCE.accumulate(pieces, shard, overwrite=overwrite) + 1

    def adam_step(sweep: Sweep) -> None:
        other = Rounding(sweep.rounding.seed + 1)
        REFERENCE.adam_step(dataclasses.replace(sweep, rounding=other))

    def quantize_together(vectors: list[torch.Tensor], outs: list[Blocks], _: object) -> None:
        REFERENCE.quantize_vectors([vectors[0], *vectors[:-1]], outs)

    kernels = (quantize, quantize_together, accumulate, adam_step)
    wrong = {each.__name__: each for each in kernels}
    return dataclasses.replace(REFERENCE, **{which: wrong[which]})


@pytest.mark.parametrize("which", ["quantize", "quantize_together", "accumulate", "adam_step"])
def test_verify_finds_a_wrong_kernel(which: str) -> None:
    with pytest.raises(AssertionError, match=which.replace("together", "vectors")):
        verify(broken(which), CPU)


def test_verify_passes_the_reference() -> None:
    assert len(verify(REFERENCE, CPU)) == 5


@pytest.mark.slow
def test_gpu_one_under_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "gpu_one.json"
    command = [sys.executable, BENCHMARKS / "gpu_one.py", "--sweeps", "--parameters", "2048", "--json", out]
    environment = {**os.environ, "DS_FP8_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    subprocess.run(command, env=environment, check=True, timeout=600)
    result = json.loads(out.read_text())
    assert result["kernels"] == "triton"
    assert len(result["verified"]) == 1
    moved = {row["name"]: row["bytes_moved"] for row in result["rows"]}
    blocks = 2048 // 128
    assert moved["sweep O2, writes bf16 weights"] == 2048 * 13 + 7 * blocks


def refused(script: str, options: list[str]) -> int:
    """The status with which a benchmark ends in this process, before it has begun."""
    with patch.object(sys, "argv", [script, *options]), pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    return int(str(stopped.value.code))


def test_a_size_that_is_not_whole_blocks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("gpu_one.py", ["--parameters", "1000"]) == 2
    assert "multiples of 1024" in capsys.readouterr().err


def run_quick(script: str, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """A CPU benchmark at tiny sizes: its JSON and what it printed."""
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result, done.stdout


def quick(script: str, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """One that times kernels."""
    result, printed = run_quick(script, out, *options)
    assert len(result["verified"]) == 5
    assert result["machine"]["threads"] >= 1
    return result, printed


@needs_compiler
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
    assert ours["bytes_per_parameter"] == 14 + 6 / 128
    assert ours["state_bytes_per_parameter"] == 5 + 3 / 128
    assert ours["peak_extra_bytes"] < 2 << 20
    assert rows["torch AdamW fused, fp32"]["bytes_per_parameter"] == 34
    assert all(row["milliseconds"] > 0 and len(row["rounds"]) == 2 for row in rows.values())
    assert result["fastest_fp32_peer"]["name"] == "torch AdamW fused, fp32"
    assert [row["parameters"] for row in result["by_size"]] == [62 * 1024, 125 * 1024]


@needs_compiler
def test_quantize_cpu(tmp_path: Path) -> None:
    result, printed = quick("quantize_cpu.py", tmp_path / "quantize.json")
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 6
    assert rows["quantize bf16 to e4m3"]["bytes_per_element"] == 3 + 1 / 128
    assert rows["decode and sum 8 ranks into fp32"]["bytes_per_element"] == 1 + 1 / 128 + 4 / 8
    assert all(row["milliseconds"] > 0 and row["reference_milliseconds"] > 0 for row in rows.values())
    assert all(name in printed for name in rows)


@pytest.mark.slow
@needs_compiler
def test_step_cpu(tmp_path: Path) -> None:
    result, printed = quick("step_cpu.py", tmp_path / "step.json")
    rows = {row["part"]: row for row in result["rows"]}
    assert [*rows] == ["forward", "backward", "step", "iteration"]
    assert all(row["ours_by_stock"] > 0 and len(row["rounds"]) == 2 for row in rows.values())
    assert result["fp8"]["kernels"] == "cpu"
    assert result["last_loss"]["ds_fp8"] == pytest.approx(result["last_loss"]["stock"], abs=0.05)
    assert "torch_adam (torch AdamW)" in printed


@pytest.mark.slow
def test_comm_volume(tmp_path: Path) -> None:
    result, printed = run_quick("comm_volume.py", tmp_path / "volume.json", "--node-size", "4")
    rows = {row["name"]: row for row in result["counted"]}
    assert len(rows) == 7
    for stage in (1, 2):
        ours, bf16, fp32 = (rows[f"{name}, ZeRO {stage}"] for name in ("ds_fp8", "stock BF16", "stock FP32"))
        parameters = ours["parameters"]
        assert ours["sent"]["alltoall_base_"] == pytest.approx(parameters * 129 / 128 / 2, rel=0.01)
        assert bf16["sent"]["allreduce_"] == pytest.approx(parameters * 2, rel=0.001)
        assert fp32["sent"]["allreduce_"] == pytest.approx(parameters * 4, rel=0.001)
    reduce = rows["stock BF16, ZeRO 2, reduce to owners"]["sent"]
    assert reduce["reduce_"] == reduce["_allgather_base_"]
    assert [row["ranks"] for row in result["formula"]] == [2**n for n in range(1, 11)]
    assert all(f"{name}" in printed for name in rows)


@pytest.mark.slow
def test_overlap_cpu(tmp_path: Path) -> None:
    result, printed = run_quick("overlap_cpu.py", tmp_path / "overlap.json", "--layers", "1")
    rows = {row["part"]: row for row in result["rows"]}
    assert [*rows] == ["exchange", "gather", "iteration"]
    assert all(len(row["rounds"][name]) == 3 for row in rows.values() for name in ("plain", "overlap"))
    whole = rows["iteration"]["rounds"]["plain"]
    assert all(0 < part < all_ for part, all_ in zip(rows["exchange"]["rounds"]["plain"], whole, strict=True))
    assert result["fp8"]["overlap_comm"] is True
    assert result["buckets"] > 2
    assert "exchange, exposed" in printed


def test_two_hops(tmp_path: Path) -> None:
    result, printed = run_quick("two_hops.py", tmp_path / "hops.json")
    for row in result["rows"]:
        assert row["theory"] - 0.3 < row["cost"] < row["theory_with_ties"] + 0.3
        assert abs(row["cost_of_bf16"]) < 0.1
        assert row["decibels"]["two, kept in E4M3"] < row["decibels"]["two, kept in BF16"]
    assert "with ties" in printed


@pytest.mark.slow
def test_gradient_scaling(tmp_path: Path) -> None:
    """The exchange is above each of the paper's ways; post overflows, the others do not."""
    picture = tmp_path / "scaling.png"
    result, printed = run_quick("gradient_scaling.py", tmp_path / "scaling.json", "--picture", str(picture))
    assert [row["ranks"] for row in result["rows"]] == [2, 4]
    for row in result["rows"]:
        ways = row["ways"]
        for way in ("pre", "post", "dynamic"):
            assert ways["blocks, FP32"]["snr_db"] > ways[way]["snr_db"]
            assert ways["blocks, FP32"]["underflow"] < ways[way]["underflow"]
        assert ways["post"]["overflow"] > 0 == ways["pre"]["overflow"] == ways["blocks, FP32"]["overflow"]
        assert ways["pre"]["underflow"] >= ways["dynamic"]["underflow"] >= ways["post"]["underflow"]
    assert "overflow" in printed
    assert picture.stat().st_size > 10_000


class TestModel:
    CLUSTER = comm_model.Cluster(
        ranks=32,
        node_size=8,
        intra_latency=1e-6,
        intra_bandwidth=100e9,
        inter_latency=10e-6,
        inter_bandwidth=10e9,
        quantize_rate=1e12,
        sum_rate=2e12,
    )

    def test_bytes(self) -> None:
        sent = {name: way(self.CLUSTER) for name, way in comm_model.WAYS.items()}
        assert sent["BF16 all-reduce"].sent == 4 * 31 / 32
        assert sent["BF16 all-reduce"].crossed == 4 * 31 / 32 / 8
        assert sent["FP8 one hop"].crossed == pytest.approx(129 / 128 * 24 / 32)
        assert sent["FP8 two hops"].crossed == pytest.approx(sent["FP8 one hop"].crossed / 8)
        assert sent["FP8 two hops, BF16 between"].crossed == pytest.approx(2 * 3 / 4 / 8)
        weights = [comm_model.all_gather(self.CLUSTER, 2.0, hops=hops) for hops in (1, 2)]
        assert weights == [(2 * 31 / 32, 2 * 24 / 32), (2 * 31 / 32, 2 * 3 / 32)]

    def test_seconds(self) -> None:
        elements, fp8 = 1e9, 129 / 128
        one = comm_model.WAYS["FP8 one hop"](self.CLUSTER).seconds(self.CLUSTER, elements)
        assert one == pytest.approx(1e-3 + 24 * 10e-6 + fp8 * 24 / 32 * elements / 10e9 + 0.5e-3)
        two = comm_model.WAYS["FP8 two hops"](self.CLUSTER).seconds(self.CLUSTER, elements)
        inside = 7e-6 + fp8 * 7 / 8 * elements / 100e9 + 0.5e-3
        between = 3 * 10e-6 + fp8 * 3 / 4 / 8 * elements / 10e9 + 0.5e-3 / 8
        assert two == pytest.approx(1e-3 + inside + between)
        ring = comm_model.WAYS["BF16 all-reduce"](self.CLUSTER).seconds(self.CLUSTER, elements)
        assert ring == pytest.approx(2 * 2 * 10e-6 + 4 * 31 / 32 / 8 * elements / 10e9)

    def test_one_node_has_one_hop(self) -> None:
        cluster = comm_model.Cluster(ranks=8, node_size=8)
        assert comm_model.WAYS["FP8 two hops"](cluster) == comm_model.WAYS["FP8 one hop"](cluster)
        assert comm_model.WAYS["FP8 two hops"](cluster).crossed == 0

    def test_where_fp8_wins(self) -> None:
        cluster, stock = comm_model.Cluster(ranks=64), comm_model.STOCK[:1]
        first = comm_model.fp8_wins_from(cluster, stock)
        assert first is not None
        assert first > 1024, "nothing is left where BF16 wins"
        for elements, wins in ((first, True), (first // 2, False)):
            ours, theirs = (
                comm_model.fastest(names, cluster, elements)[1] for names in (comm_model.OURS, stock)
            )
            assert (ours < theirs) is wins


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("comm_volume.py", ["--inter-bandwidth", "0"], "received '0', allowed: a number above 0"),
        ("comm_volume.py", ["--node-size", "6"], "received 6, allowed: powers of two"),
        ("two_hops.py", ["--elements", "1000"], "received 1000, allowed: multiples of 128"),
        (
            "overlap_cpu.py",
            ["--width", "33", "--heads", "2"],
            "received 33, allowed: multiples of --heads, 2",
        ),
        ("adam_cpu.py", ["--parameters", "5O"], "received '5O', allowed: a count such as 50M"),
        ("adam_cpu.py", ["--rounds", "0"], "received '0', allowed: 1 or more"),
        ("quantize_cpu.py", ["--elements", "1M"], "received 1000000, allowed: multiples of 1024"),
        ("step_cpu.py", ["--width", "33", "--heads", "2"], "received 33, allowed: multiples of --heads, 2"),
        ("step_cpu.py", ["--stock-optimizer", "sgd"], "torch_adam"),
    ],
)
def test_wrong_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], script: str, options: list[str], message: str
) -> None:
    assert refused(script, options) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_timed_with_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cpu_obstacle", lambda device: None)
    monkeypatch.setattr(timing, "cpu_backend", lambda: broken("quantize"))
    with pytest.raises(SystemExit, match="not timed: a kernel differs from the reference: quantize"):
        timing.checked_backend()


def test_nothing_is_timed_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cpu_obstacle", lambda device: build.NO_COMPILER)
    with pytest.raises(SystemExit, match=r"not timed: the C\+\+ kernels cannot run: no C\+\+ compiler"):
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
