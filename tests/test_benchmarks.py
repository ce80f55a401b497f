"""The benchmarks run here at tiny sizes, so that they are known to work before a GPU is."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_fp8.ops.backend import REFERENCE, Backend
from ds_fp8.ops.blocks import Blocks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from verify import verify  # noqa: E402

CPU = torch.device("cpu")


def broken(which: str) -> Backend:
    """The reference with one op a little wrong."""

    def quantize(values: torch.Tensor, out: Blocks) -> None:
        REFERENCE.quantize(values, out)
        out.codes.view(torch.uint8)[3, 4] ^= 1

    def accumulate(pieces: list[Blocks], shard: Blocks, *, fresh: bool) -> torch.Tensor:
        return REFERENCE.accumulate(pieces, shard, fresh=fresh) * (1 + 1e-5)

    def adam_step(state: object, gradient: object, weights: torch.Tensor, *rest: object, seed: int) -> None:
        REFERENCE.adam_step(state, gradient, weights, *rest, seed=seed + 1)

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
