"""The benchmarks for several GPUs on gloo ranks, at tiny sizes: what they hold for wrong is found wrong."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from benchmark_runs import torchrun
from ranks import RankPools

from ds_fp8.ops.product_backend import MULTIPLY
from ds_fp8.ops.product_backend import REFERENCE as PRODUCTS
from ds_fp8.ops.products import CastGradient, Operand

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import engine_facts  # noqa: E402
import exchange_times  # noqa: E402
import gpu_graphs  # noqa: E402
import gpu_train  # noqa: E402
import offload_runs  # noqa: E402
import paired  # noqa: E402
import verify_products  # noqa: E402

CPU = torch.device("cpu")
PRODUCT = MULTIPLY["emulated"]


def measure(elements: int) -> dict[str, Any]:
    return exchange_times.measure(elements, 2, CPU, torch.distributed.new_group())


def test_exchange_times(ranks: RankPools) -> None:
    elements = 16 * exchange_times.GRAIN
    found = ranks.run(2, measure, elements)
    assert found[0]["rows"] == found[1]["rows"], "the ranks have not met"
    rows = {row["name"]: row for row in found[0]["rows"]}
    assert {exchange_times.EXCHANGE, exchange_times.OVERLAPPED, *exchange_times.PARTS} < {*rows}
    assert all(len(row["rounds"]) == 2 and row["milliseconds"] > 0 for row in rows.values())
    sent = {name: row["sent_bytes"] for name, row in rows.items()}
    assert sent[exchange_times.REDUCE] == elements
    assert sent["FP32 all-reduce"] == 4 * elements
    assert sent[exchange_times.EXCHANGE] == elements * 129 / 128 / 2
    assert sent[exchange_times.BF16_WIRE] == elements
    assert sent[exchange_times.OVERLAPPED] == pytest.approx(sent[exchange_times.EXCHANGE], rel=0.01)
    assert found[0]["no_native_fp8"], "gloo does not add FP8"


def step_with_waits(stages: int) -> dict[str, int]:
    """Waits of a function that reads `stages` sums from the device."""
    numbers = torch.arange(4.0)
    return engine_facts.waits(lambda: [numbers.sum().item() for _ in range(stages)])


def test_waits_are_counted_by_name() -> None:
    assert step_with_waits(0) == {}
    assert step_with_waits(3) == {"aten::_local_scalar_dense": 3}


def test_names_of_waits() -> None:
    seen = [
        "cudaMemcpyAsync",
        "cudaMemcpy",
        "Memcpy DtoD (Device -> Device)",
        "Memcpy DtoH (Device -> Pinned)",
    ]
    seen += ["cudaEventRecord", "cudaEventSynchronize", "cudaStreamWaitEvent", "cudaStreamSynchronize"]
    assert [name for name in seen if engine_facts.is_wait(name)] == [seen[1], seen[3], seen[5], seen[7]]


def run_of(config: str, **figures: Any) -> gpu_train.Run:
    ours = {"config": config, "model": "1.3B", "world_size": 2, "parameters": 100, "losses": [3.0] * 80}
    ours |= {"predicted_bytes": 300.0, "state_bytes_per_parameter": 6.0, "peak_bytes_allocated": 1000.0}
    return {**ours, "milliseconds_per_step": 90.0, "waits": {"cudaEventSynchronize": 1}, **figures}


def verdicts(run: gpu_train.Run, stock: gpu_train.Run) -> list[bool]:
    return [claim.holds for claim in gpu_train.claims_of(run, stock)]


def test_claims_of_a_training() -> None:
    stock = run_of("bf16", predicted_bytes=600.0, peak_bytes_allocated=1300.0, milliseconds_per_step=90.0)
    ours = run_of("o2")
    assert verdicts(ours, stock) == [True] * 5
    for number, wrong in enumerate(
        (
            {"state_bytes_per_parameter": 6.2},
            {"peak_bytes_allocated": 1007.0},
            {"milliseconds_per_step": 90.5},
            {"losses": [3.0] * 29 + [3.011] * 50},
            {"waits": {"cudaStreamSynchronize": 1, "Memcpy DtoH (Device -> Pinned)": 1}},
        )
    ):
        assert verdicts({**ours, **wrong}, stock) == [place != number for place in range(5)], wrong


def test_a_run_is_compared_with_its_own_model_and_ranks() -> None:
    torch_adam, stock, ours = (run_of(each) for each in ("bf16_torch", "bf16", "o2"))
    others = [run_of("bf16", model="125M"), run_of("bf16", world_size=4), run_of("bf16", seed=1)]
    assert gpu_train.baseline_of(ours, [*others, torch_adam, ours, stock]) is stock
    assert gpu_train.baseline_of(ours, [*others, ours]) is None


def test_bytes_of_fp8_weights_are_not_states() -> None:
    stock = run_of("bf16", predicted_bytes=600.0, peak_bytes_allocated=1400.0)
    ours = run_of("o3", fp8_weights={"elements": 100, "bytes": 100}, state_bytes_per_parameter=8.0)
    assert verdicts(ours, stock) == [True] * 5
    assert not any(verdicts({**ours, "fp8_weights": {"elements": 0, "bytes": 0}}, stock)[:2])


def test_losses_are_paired_by_seed() -> None:
    """The last 100 steps of both, the same seed's stock; |mean| + 2 standard errors by hand."""
    runs = [run_of("bf16_torch", seed=seed, fp8=None, losses=[9.0] + [3.0 + seed] * 100) for seed in range(4)]
    runs += [
        run_of("o3", seed=seed, fp8={}, losses=[8.0] + [3.0 + seed + apart] * 100 + [0.0] * 50)
        for seed, apart in enumerate((0.01, -0.01, 0.03))
    ]
    found = paired.pairs(runs)["1.3B o3"]
    assert list(found.differences.values()) == pytest.approx([0.01, -0.01, 0.03])
    assert found.mean == pytest.approx(0.01)
    assert found.standard_error == pytest.approx(0.02 / 3**0.5)
    assert found.at_most == pytest.approx(0.01 + 0.04 / 3**0.5)
    assert found.spread == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"received seeds \[1\] and \[2\]"):
        paired.paired({1: 3.0}, {2: 3.0})


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "gpu").glob("train_*.json")), ids=lambda path: path.stem
)
def test_runs_of_earlier_versions_can_be_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_train.report(gpu_train.load(path))
    assert "waits in engine.step" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_many(tmp_path: Path) -> None:
    out = tmp_path / "many.json"
    printed = torchrun("gpu_many.py", "--quick", "--elements", "64K", "128K", "--out", str(out))
    result = json.loads(out.read_text())
    assert result["backend"] == "gloo"
    assert result["ranks"] == 2
    assert [each["elements"] for each in result["sizes"]] == [57344, 122880]
    assert len(result["same_as_gloo"]) == 8
    assert all(claim["holds"] for claim in result["claims"])
    assert "no FP8 reduce-scatter" in printed
    assert printed.count("claims") == 1, "one rank prints"


@pytest.mark.slow
def test_zero3_bits(tmp_path: Path) -> None:
    """A run gives the digests of the run before."""
    out, again = tmp_path / "bits.json", tmp_path / "again.json"
    torchrun("zero3_bits.py", "--out", str(out))
    printed = torchrun("zero3_bits.py", "--out", str(again), "--expect", str(out))
    assert json.loads(out.read_text()) == json.loads(again.read_text())
    assert f"the same bits as {out}: 18 runs" in " ".join(printed.split())


@pytest.mark.slow
def test_gpu_train(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    common = (
        "--out",
        str(out),
        "--model",
        "tiny",
        "--micro_batch",
        "4",
        "--steps",
        "6",
        "--log_interval",
        "3",
    )
    for config in ("bf16_torch", "o2", "o2"):
        path = ROOT / "benchmarks" / "gpu" / f"{config}.json"
        printed = torchrun("gpu_train.py", "--out", str(out), *common, "--deepspeed_config", str(path))
    assert "step 6/6" not in printed, "the second o2 is not run again"
    stock, ours = json.loads(out.read_text())["runs"]
    assert (stock["fp8"], ours["fp8"]["opt_level"]) == (None, "O2")
    held = [run["state_bytes_per_parameter"] * run["parameters"] / 2 for run in (stock, ours)]
    assert held == pytest.approx([stock["predicted_bytes"], ours["predicted_bytes"]], rel=0.01)
    sent = [sum(run["sent"].values()) / run["parameters"] for run in (stock, ours)]
    assert sent == pytest.approx([3.0, 1.504], rel=0.02)
    assert ours["waits"] == {}
    assert stock["waits"]
    assert "waits in engine.step, tiny o2: none" in printed


def with_another_code(codes: torch.Tensor, exponents: torch.Tensor) -> Operand:
    wrong = PRODUCTS.transpose(codes, exponents)
    wrong.codes.view(torch.uint8)[3, 4] ^= 1
    return wrong


def with_scales_of_before(values: torch.Tensor, **wanted: bool) -> CastGradient:
    found = PRODUCTS.cast_gradient(values, **wanted)
    if found.wgrad is None or not len(values):
        return found
    return dataclasses.replace(found, wgrad=Operand(found.wgrad.codes, found.wgrad.scales.roll(1, 0)))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (dataclasses.replace(PRODUCTS, transpose=with_another_code), "transpose"),
        (dataclasses.replace(PRODUCTS, cast_gradient=with_scales_of_before), "dy for wgrad: other scales"),
        (dataclasses.replace(PRODUCTS, find_exponents=lambda *_: None), "other exponents"),
    ],
    ids=["transpose", "cast_gradient", "find_exponents"],
)
def test_a_wrong_function_of_products_is_found(wrong: Any, told: str) -> None:
    found = verify_products.verify(wrong, ["emulated"], CPU, tiny=True).wrong
    assert any(told in each for each in found), found


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MULTIPLY, "emulated", lambda *each: PRODUCT(*each) * 1.01)
    found = list(verify_products.errors(PRODUCTS, ["emulated"], CPU, (17, 208, 272)))
    assert len(found) == 4
    assert all(isinstance(each, str) and "beyond rounding" in each for each in found)


def test_the_contract_itself_passes() -> None:
    found = verify_products.verify(PRODUCTS, ["emulated"], CPU, tiny=True)
    assert not found.wrong
    assert len(found.lines) == 5
    assert {each.product for each in found.errors} == {*verify_products.NAMES, "forward with bias"}


@pytest.mark.slow
def test_gpu_products(tmp_path: Path) -> None:
    """Under Triton's interpreter, at sizes for which that takes seconds."""
    out = tmp_path / "products.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_products.py"), "--tiny", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    result = json.loads(out.read_text())
    assert {"dy and its sums", "encode", "transpose"} < {row["operation"] for row in result["rows"]}
    assert result["no_cublas"] == "cuBLAS needs an NVIDIA GPU"
    assert result["host_microseconds"]["linear"] > 0


def test_a_training_with_graphs_that_differs_is_named() -> None:
    def found(loss: float, weight: float, **figures: float) -> gpu_graphs.Found:
        return gpu_graphs.Found([1.0, loss], [torch.tensor([1.0, weight])], {"total": figures}, replays=1)

    plain = found(2.0, 2.0, w_underflow=0.5, x_underflow=0.25)
    differ = gpu_graphs.differences
    assert not any(differ(plain, plain, counted=True).values())
    assert not any(differ(plain, found(2.0, 2.0, w_underflow=0.5), counted=False).values())
    assert [*differ(plain, found(2.0, 2.0, w_underflow=0.5), counted=True).values()] == [0, 0, 1, 0]
    assert [*differ(plain, found(3.0, 4.0, w_underflow=1.0), counted=False).values()] == [1, 1, 1, 0]
    assert [*differ(plain, plain, counted=False).values()] == [0, 0, 0, 1]


@pytest.mark.slow
def test_gpu_graphs(tmp_path: Path) -> None:
    """There are no graphs on a CPU: compiled by either mode."""
    out = tmp_path / "graphs.json"
    torchrun("gpu_graphs.py", "--tiny", "--out", str(out))
    pairs = json.loads(out.read_text())["pairs"]
    assert [pair["frozen"] for pair in pairs] == [False, True]
    assert all(pair["figures"] > 0 and not any(pair["differences"].values()) for pair in pairs)


def offloaded_bits(planted: bool) -> str:
    """What the check says, or its objection where a row of a moment gets lost on the way."""
    from ds_fp8.zero_fp8.states import ring

    def lossy(source: Any, target: Any, *, waits: bool = True) -> None:
        copy(source, target, waits=waits)
        if planted:
            target.exp_avg.codes[-1].zero_()

    copy = ring.copy
    with patch.object(ring, "copy", lossy):
        try:
            return "\n".join(offload_runs.check_bits(CPU))
        except SystemExit as error:
            return str(error)


@pytest.mark.slow
def test_offloaded_bytes_are_compared(ranks: RankPools) -> None:
    lines = ranks.run(1, offloaded_bits, False)[0].splitlines()
    assert len(lines) == 4
    assert all("the same bytes" in line for line in lines)
    assert ranks.run(1, offloaded_bits, True)[0].startswith("not measured: stream, O2")
