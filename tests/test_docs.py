"""The documentation builds, its keys are those of the section, and every command in it is run by a test."""

import ast
import dataclasses
import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ds_fp8.config.section import FP8Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
SCRIPTS = ("benchmarks", "examples")  # gpu_train.py hands options on to gpt_pretrain.py
SHELL = {"do", "done", "for", "then", "fi"}
# What a command runs -> the test that runs it.
RUN_BY = {
    "pip install": "test_packaging.py::test_is_the_one_imported",
    "make demo": "test_launch.py::test_demo",
    "-m package.train": "test_main.py::test_as_python_itself_would",
    "train.py": "test_launch.py::test_module_turns_fp8_on",
    "-m ds_fp8 --help": "test_main.py::test_help",
    "deepspeed.env_report": "test_builder.py::test_deepspeeds_own_report_through_the_launcher",
    "examples/gpt_pretrain.py": "test_gpt_pretrain.py::test_runs_without_a_launcher",
    "examples/hf_trainer.py": "test_hf_launch.py::test_trainer",
    "examples/accelerate_lora.py": "test_hf_launch.py::test_accelerate_lora",
    "ds_fp8 to-universal": "test_export.py::test_universal_files",
    "ds_fp8 export": "test_export.py::test_export",
    "ds_fp8 inspect": "test_export.py::test_inspect",
    "ds_fp8 report": "test_cli_report.py::test_it_tells_what_an_engine_does",
    "benchmarks/gpu_one.py": "test_benchmarks.py::test_gpu_one_under_the_interpreter",
    "benchmarks/gpu_products.py": "test_gpu_benchmarks.py::test_gpu_products",
    "benchmarks/gpu_many.py": "test_gpu_benchmarks.py::test_gpu_many",
    "benchmarks/gpu_train.py": "test_gpu_benchmarks.py::test_gpu_train",
    "benchmarks/adam_cpu.py": "test_benchmarks.py::test_adam_cpu",
    "benchmarks/quantize_cpu.py": "test_benchmarks.py::test_quantize_cpu",
    "benchmarks/step_cpu.py": "test_benchmarks.py::test_step_cpu",
    "benchmarks/comm_volume.py": "test_benchmarks.py::test_comm_volume",
    "benchmarks/two_hops.py": "test_benchmarks.py::test_two_hops",
    "benchmarks/gradient_scaling.py": "test_benchmarks.py::test_gradient_scaling",
    "benchmarks/overlap_cpu.py": "test_benchmarks.py::test_overlap_cpu",
    "benchmarks/update_error.py": "test_precision.py::test_update_error",
    "benchmarks/precision.py": "test_precision.py::test_precision",
    "benchmarks/precision_parallel.py": "test_precision.py::test_several_runs_at_once",
    "benchmarks/first_steps.py": "test_precision.py::test_first_steps",
    "benchmarks/parity.py": "test_launch.py::test_parity_picture",
}


def commands_of(page: Path) -> Iterator[str]:
    """The commands of a page: its shell blocks, and `python ...` between backticks."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|[A-Z_0-9]+=[^`\s]+) [^`]*)`", prose)
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines() + [" ".join(each.split()) for each in inline]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and words[0] not in SHELL:
            yield " ".join(words)


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands_of(page)})


def runner_of(command: str) -> str | None:
    return next((test for part, test in RUN_BY.items() if part in command), None)


@functools.cache
def trainer_fields() -> set[str]:
    """Options of a script whose arguments are the Trainer's."""
    from transformers import TrainingArguments

    return {each.name for each in dataclasses.fields(TrainingArguments)}


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=str)
def test_every_command_is_run_by_a_test(page: str, command: str) -> None:
    test = runner_of(command)
    assert test is not None, f"{page}: nothing runs {command}"
    file, name = test.split("::")
    assert name in functions_of(file), f"{page}: {command} is said to be run by {test}, which does not exist"
    shared = "".join(each.read_text() for folder in SCRIPTS for each in (ROOT / folder).glob("*.py"))
    for script in re.findall(rf"\b(?:{'|'.join(SCRIPTS)})/\w+\.py", command):
        fields = trainer_fields() if "TrainingArguments" in (ROOT / script).read_text() else set()
        for flag in re.findall(r" (--[a-z][\w-]*)", command.split(script, maxsplit=1)[1]):
            known = f'"{flag}"' in shared or flag[2:] in fields
            assert known, f"{page}: {script} knows no {flag}"


def leaves(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of the section by their path, with their defaults."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{path}{name}.")
        else:
            yield path + name, field.default


@pytest.mark.parametrize(("key", "default"), list(leaves(FP8Config)), ids=str)
def test_every_key_is_told(key: str, default: Any) -> None:
    """With its default, where it has one of its own."""
    row = re.search(rf"^\| `{re.escape(key)}` \|(.*)$", (ROOT / "docs/options.md").read_text(), re.MULTILINE)
    assert row, f"docs/options.md has no row of {key}"
    if default is not None:
        told = json.dumps(default).strip('"')
        assert f"| {told} |" in row.group(0), f"{key}: the default is {told}"


def test_the_pages_build(tmp_path: Path) -> None:
    """Every link leads somewhere, every page is in the menu."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "options" / "index.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files(page: Path) -> None:
    """mkdocs does not see the README, nor what lies outside docs/."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: no {target}"
