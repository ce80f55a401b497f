"""The launchers that users have, on two CPU ranks, with the script unchanged."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [str(ROOT / "examples" / "train_lm.py"), "--steps", "3", "--layers", "1", "--width", "32", "--quiet"]


def launch(command: list[str], tmp_path: Path, config: str) -> tuple[dict[str, object], str]:
    """Run a launcher; the figures it wrote and what it printed."""
    out = tmp_path / "out.json"
    arguments = [*SCRIPT, "--deepspeed_config", str(ROOT / "configs" / config), "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", *command, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, object] = json.loads(out.read_text())
    return figures, done.stdout + done.stderr


def deepspeed(*options: str) -> list[str]:
    return ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()), *options]


def torchrun(*options: str) -> list[str]:
    return ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), *options]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_module_turns_fp8_on(tmp_path: Path, launcher: Callable[..., list[str]]) -> None:
    option = "--module" if launcher is deepspeed else "-m"
    figures, printed = launch(launcher(option, "ds_fp8"), tmp_path, "zero2_o2.json")
    assert "ON, O2, ZeRO 2, 2 ranks" in printed
    assert figures["world_size"] == 2
    assert float(str(figures["state_bytes_per_parameter"])) < 7


@pytest.mark.slow
def test_without_the_module_deepspeed_is_stock(tmp_path: Path) -> None:
    figures, printed = launch(deepspeed(), tmp_path, "zero2_bf16.json")
    assert "ds_fp8 0" not in printed
    assert float(str(figures["state_bytes_per_parameter"])) > 12


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """What `make demo` runs, in three steps."""
    configs = [str(ROOT / "configs" / name) for name in ("zero2_o2.json", "zero2_bf16.json")]
    printed = run_script("examples/compare.py", *configs, "--steps", "3", "--out", str(tmp_path))
    assert "zero2_o2" in printed
    assert "validation loss" in printed
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_parity_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / "parity.json", tmp_path / "parity.png"
    options = ["--steps", "22", "--seeds", "1", "--out", str(out), "--picture", str(picture)]
    printed = run_script("benchmarks/parity.py", *options)
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert [*rows] == ["stock BF16", "O1", "O2", "O2+"]
    assert all(abs(row["differences"][0]) < 0.02 and name in printed for name, row in rows.items())
    assert picture.stat().st_size > 10_000


def run_script(script: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LAST_COLLECTIVE = """
import sys, torch, deepspeed, ds_fp8
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
ds_fp8.register()
deepspeed.init_distributed("gloo")
for _ in range(3):
    deepspeed.comm.all_reduce(torch.ones(()))
"""


@pytest.mark.slow
def test_ranks_end_quietly(tmp_path: Path) -> None:
    """gloo's threads have dropped their last tensors when Python ends; without a wait some runs abort."""
    script = tmp_path / "last_collective.py"
    script.write_text(LAST_COLLECTIVE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for _ in range(6):
        command = [sys.executable, "-m", *torchrun(), str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr.decode()
