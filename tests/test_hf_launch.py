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


def launch(launcher: list[str], script: str, arguments: list[str], folder: Path, *, module: bool) -> str:
    """What the ranks print."""
    path = EXAMPLES / script
    command = [str(path)]
    if module:
        command = ["--module" if "deepspeed.launcher.runner" in launcher else "-m", "ds_fp8", str(path)]
    else:
        registering = folder / script
        registering.write_text(ONE_LINE.format(folder=str(EXAMPLES), script=str(path)))
        command = [str(registering)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *command, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", [True, False], ids=["module", "one line"])
@pytest.mark.parametrize("launcher", [deepspeed, torchrun, accelerate])
def test_trainer(tmp_path: Path, launcher: Callable[[int], list[str]], module: bool) -> None:
    config = [] if launcher is accelerate else ["--deepspeed", CONFIG]
    saving = ["--save_strategy", "steps", "--save_steps", "10"]
    arguments = [*SMALL, *config, *saving, "--use_cpu", "--max_steps", "20"]
    printed = launch(launcher(2), "hf_trainer.py", arguments, tmp_path, module=module)
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
    printed = launch(launcher(1), "hf_trainer.py", arguments, tmp_path, module=True)
    assert "ON, O2, ZeRO 2, 1 ranks" in printed


@pytest.mark.slow
@pytest.mark.parametrize("module", [True, False], ids=["module", "one line"])
def test_accelerate_lora(tmp_path: Path, module: bool) -> None:
    printed = launch(
        accelerate(2), "accelerate_lora.py", ["--use_cpu", "--steps", "20"], tmp_path, module=module
    )
    assert "FP8: on; 20 steps" in printed
    before, after = map(float, re.findall(r"evaluation loss: ([\d.]+) before, ([\d.]+) after", printed)[0])
    assert after < before - 0.1
    assert PeftConfig.from_pretrained(tmp_path / "accelerate_lora").peft_type == "LORA"


@pytest.mark.slow
def test_accelerate_launch_cpu_drops_deepspeed(tmp_path: Path) -> None:
    """`accelerate launch --cpu` starts one process without DeepSpeed, in silence; the callback tells."""
    options = ["--cpu", "--num_processes", "2", "--num_machines", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "ds_fp8"]
    done = subprocess.run(
        [
            *command,
            str(EXAMPLES / "hf_trainer.py"),
            *SMALL,
            "--deepspeed",
            CONFIG,
            "--use_cpu",
            "--max_steps",
            "1",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "and not of a DeepSpeed engine" in done.stderr
