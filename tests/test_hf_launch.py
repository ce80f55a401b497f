"""The examples, started by every launcher, through ds_fp8 and with one line in the script."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftConfig
from ranks import free_port
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONFIG = str(EXAMPLES / "hf_o2.json")
SMALL = ["--layers", "1", "--width", "64", "--heads", "2", "--context", "32"]
ONE_LINE = """
import runpy, sys
sys.path.insert(0, {folder!r})
import ds_fp8; ds_fp8.register()
runpy.run_path({script!r}, run_name="__main__")
"""


def deepspeed(ranks: int) -> list[str]:
    return ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def torchrun(ranks: int) -> list[str]:
    return ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def accelerate(ranks: int) -> list[str]:
    """With the config given to the launcher and not to the script."""
    options = ["--use_deepspeed", "--deepspeed_config_file", CONFIG, "--num_machines", "1"]
    ports = ["--main_process_port", str(free_port()), "--num_processes", str(ranks)]
    return ["accelerate.commands.launch", *options, *ports]


def through_ds_fp8(launcher: list[str], script: Path, _: Path) -> list[str]:
    return ["--module" if launcher[0] == "deepspeed.launcher.runner" else "-m", "ds_fp8", str(script)]


def one_line(_: list[str], script: Path, folder: Path) -> list[str]:
    """A script of the same name that registers and is otherwise the example."""
    registering = folder / script.name
    registering.write_text(ONE_LINE.format(folder=str(EXAMPLES), script=str(script)))
    return [str(registering)]


Way = Callable[[list[str], Path, Path], list[str]]
WAYS = [through_ds_fp8, one_line]


def run(command: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def launch(launcher: list[str], way: Way, script: str, arguments: list[str], folder: Path) -> str:
    """What the ranks print."""
    done = run([*launcher, *way(launcher, EXAMPLES / script, folder), *arguments], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("launcher", [deepspeed, torchrun, accelerate])
def test_trainer(tmp_path: Path, launcher: Callable[[int], list[str]], way: Way) -> None:
    config = [] if launcher is accelerate else ["--deepspeed", CONFIG]
    saving = ["--save_strategy", "steps", "--save_steps", "10"]
    arguments = [*SMALL, *config, *saving, "--use_cpu", "--max_steps", "20"]
    printed = launch(launcher(2), way, "hf_trainer.py", arguments, tmp_path)
    assert "ON, O2, ZeRO 2, 2 ranks" in printed
    (last,) = re.findall(r"loss, mean of the last 50 steps: ([\d.]+)", printed)
    assert float(last) < 5.5
    state = json.loads((tmp_path / "hf_trainer" / "checkpoint-20" / "trainer_state.json").read_text())
    assert [each["step"] for each in state["log_history"] if "fp8/gradient_snr_db" in each] == [10, 20]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf_trainer").config.vocab_size == 256


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed, torchrun, accelerate])
def test_one_rank(tmp_path: Path, launcher: Callable[[int], list[str]]) -> None:
    config = [] if launcher is accelerate else ["--deepspeed", CONFIG]
    arguments = [*SMALL, *config, "--use_cpu", "--max_steps", "3"]
    printed = launch(launcher(1), through_ds_fp8, "hf_trainer.py", arguments, tmp_path)
    assert "ON, O2, ZeRO 2, 1 rank |" in printed


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_accelerate_lora(tmp_path: Path, way: Way) -> None:
    arguments = ["--use_cpu", "--steps", "20"]
    printed = launch(accelerate(2), way, "accelerate_lora.py", arguments, tmp_path)
    assert "FP8: on; 20 steps" in printed
    before, after = map(float, re.findall(r"evaluation loss: ([\d.]+) before, ([\d.]+) after", printed)[0])
    assert after < before - 0.1
    assert PeftConfig.from_pretrained(tmp_path / "accelerate_lora").peft_type == "LORA"


@pytest.mark.slow
def test_accelerate_launch_cpu_drops_deepspeed(tmp_path: Path) -> None:
    """`accelerate launch --cpu` starts one process without DeepSpeed, in silence; the callback tells."""
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    script = ["-m", "ds_fp8", str(EXAMPLES / "hf_trainer.py"), *SMALL]
    done = run([*launcher, *script, "--deepspeed", CONFIG, "--use_cpu", "--max_steps", "1"], tmp_path)
    assert done.returncode != 0
    assert "and not of a DeepSpeed engine" in done.stderr
