"""The documentation builds, its keys are those of the section, and every command in it is run by a test."""

import ast
import dataclasses
import functools
import inspect
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import ds_fp8
from ds_fp8.config.section import FP8Config
from ds_fp8.estimate.methods import STOCK, largest, levels
from ds_fp8.estimate.runs import model_of_size, run_at_defaults
from ds_fp8.zero_fp8.recipe import Offload

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
    "benchmarks/zero3_bits.py": "test_gpu_benchmarks.py::test_zero3_bits",
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


README = ROOT / "README.md"
GPU = ROOT / "benchmarks" / "gpu"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 900


def figures(file: str, config: str) -> tuple[str, str]:
    """Milliseconds per step and peak GB of the runs of one config, as the README writes them."""
    found = json.loads((GPU / f"{file}.json").read_text())
    runs = [each for each in found.get("runs", [found]) if each.get("config", config) == config]
    times = [ms for each in runs for ms in each.get("milliseconds") or [each["milliseconds_a_step"]]]
    time, peak = statistics.median(times), max(each["peak_bytes_allocated"] for each in runs) / 10**9
    return f"{time:,.0f}" if time > 1000 else f"{time:.1f}", f"{peak:.1f}"


@pytest.mark.parametrize(
    ("row", "stock", "ours"),
    [
        ("GPT-1.3B, `O2+`, ZeRO 2, two H100s", ("train_h100", "bf16"), ("train_h100", "o2plus")),
        (
            "Llama 7B, `O3`, ZeRO 3, two H200s",
            ("zero3_o3_h200", "zero3_bf16_torch"),
            ("zero3_o3_h200", "zero3_o3"),
        ),
        (
            "Llama 7B, `O3`, compiled, ZeRO 2, two H200s",
            ("equal_batch_7B_h200", "bf16_torch_overlap"),
            ("equal_batch_7B_h200", "o3_overlap"),
        ),
        (
            "GPT-125M, `O2`, one H100, 3,000 steps",
            ("125M_bf16_beta2_999_h100", ""),
            ("125M_o2_beta2_999_h100", ""),
        ),
    ],
)
def test_results_of_the_readme_are_committed_figures(
    row: str, stock: tuple[str, str], ours: tuple[str, str]
) -> None:
    (time, peak), (our_time, our_peak) = figures(*stock), figures(*ours)
    assert f"| {row} | {time}, {our_time} | {peak}, {our_peak} |" in README.read_text()


PYTHON = [
    (page, block)
    for page in ("README.md", "docs/fp8adamw.md")
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[page for page, _ in PYTHON])
def test_python_runs_as_it_stands(page: str, block: str) -> None:
    """And the optimizer that it makes takes a step."""
    names: dict[str, Any] = {}
    exec(compile(block, page, "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    before = model.weight.detach().clone()
    model(before[:1]).square().sum().backward()
    optimizer.step()
    assert not model.weight.equal(before)


RATE = re.compile(
    r"\b(bytes|steps?|ms|launch|scales?|rows?|figures?)(?: |\n[ #]*)an?(?: |\n[ #]*)"
    r"(parameter|element|step|rank|block|bucket|tensor|GPU|layer)\b"
)
WRITTEN = (
    "ds_fp8",
    "ops",
    "zero_fp8",
    "docs",
    "tests",
    "benchmarks",
    "examples",
)  # ds_fp8 links the next two


def test_rates_are_written_with_per() -> None:
    """ "bytes per parameter": the same words with "a" are read as something else."""
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for folder in WRITTEN
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in {".py", ".md", ".cpp", ".h"}
        for match in RATE.finditer(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize("name", ds_fp8.__all__)
def test_public_names_have_a_whole_docstring(name: str) -> None:
    """What goes in, what comes out, what is raised: a tooltip has it."""
    exported = getattr(ds_fp8, name)
    text = inspect.getdoc(exported) or ""
    signature = inspect.signature(exported)
    if signature.parameters:
        assert "Args:" in text
    if inspect.isfunction(exported) and signature.return_annotation not in (None, "None"):
        assert "Returns:" in text
    assert "Raises" in text or name == "is_active"


def test_the_number_of_the_readme_is_the_estimate() -> None:
    """What one 80 GB GPU holds, and bytes per parameter without buffers."""
    here, away, run = levels(), levels(Offload("stream")), run_at_defaults(1, 2)
    stock, o2plus, offloaded = (
        f"{largest(method, run, 80 * 10**9) / 10**9:.3g}" for method in (STOCK, here["O2+"], away["O2+"])
    )
    text = " ".join(README.read_text().split())
    assert f"{float(stock):.1f} billion parameters with stock DeepSpeed, {o2plus} billion at `O2+`" in text
    assert f"and {float(offloaded):.0f} billion with states in host memory" in text
    model = model_of_size(10**11, run)
    held = [method.held(model, run) for method in (STOCK, here["O2+"], here["O3"])]
    rates = [(each.weights + each.states + each.gradients) / model.parameters for each in held]
    assert [round(rate) for rate in rates] == [16, 7, 6]
    assert "16 bytes per parameter with BF16, 7 at `O2+`, 6 at `O3`" in text
