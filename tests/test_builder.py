"""DeepSpeed finds the builders by name and in its op report, with status and reason."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.env_report import op_report
from kernel_support import needs_compiler

import ds_fp8
from ds_fp8.compat import ALL_OPS
from ds_fp8.ops.cpu import build, kernels
from ds_fp8.ops.op_builders import FP8CPUBuilder, FP8TritonBuilder


@pytest.fixture
def registered() -> Iterator[None]:
    ds_fp8.register()
    yield
    ds_fp8.unregister()


def report() -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        op_report()
    return printed.getvalue()


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("builder", [FP8CPUBuilder, FP8TritonBuilder])
def test_found_by_class_name(registered: None, builder: type) -> None:
    assert get_accelerator().get_op_builder(builder.__name__) is builder
    assert isinstance(get_accelerator().create_op_builder(builder.__name__), builder)


def test_other_builders_are_found_as_ever(registered: None) -> None:
    ours = get_accelerator().get_op_builder("FusedAdamBuilder")
    ds_fp8.unregister()
    assert get_accelerator().get_op_builder("FusedAdamBuilder") is ours


def test_unregister_takes_it_out() -> None:
    before = dict(ALL_OPS)
    lookup = type(get_accelerator()).get_op_builder
    ds_fp8.register()
    assert before != ALL_OPS
    ds_fp8.unregister()
    assert before == ALL_OPS
    assert type(get_accelerator()).get_op_builder is lookup
    assert get_accelerator().get_op_builder("FP8TritonBuilder") is not FP8TritonBuilder


def test_report_lists_it_as_compatible(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "OKAY" in line_of(report(), "fp8_triton")


def test_report_says_why_not(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = report()
    assert "NO" in line_of(text, "fp8_triton").split()[-1]
    assert "Triton needs an NVIDIA GPU" in text


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    builder = FP8TritonBuilder()
    assert not builder.is_compatible()
    assert "7.5" in builder.error_log
    with pytest.raises(RuntimeError, match=r"compute capability is 7\.5"):
        builder.load()


def test_load_returns_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert FP8TritonBuilder().load().name == "triton"


@needs_compiler
def test_cpu_kernels_are_reported_without_building(
    registered: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "OKAY" in line_of(report(), "fp8_cpu")
    assert list(tmp_path.iterdir()) == []


def test_report_says_that_a_compiler_is_missing(
    registered: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(
        kernels, "_library", kernels._library.__wrapped__
    )  # what has been loaded does not count
    monkeypatch.setattr(kernels, "kernels", kernels.kernels.__wrapped__)
    text = report()
    assert "NO" in line_of(text, "fp8_cpu").split()[-1]
    assert "install g++" in text
    with pytest.raises(RuntimeError, match=r"fp8_cpu: no C\+\+ compiler"):
        FP8CPUBuilder().load()


@needs_compiler
def test_load_builds_the_cpu_kernels() -> None:
    assert FP8CPUBuilder().load().name == "cpu"
    assert all(Path(each).is_absolute() for each in FP8CPUBuilder().sources())


def test_deepspeeds_own_report_through_the_launcher() -> None:
    """`python -m ds_fp8 -m deepspeed.env_report`: the op report of a process that has registered."""
    command = [sys.executable, "-m", "ds_fp8", "-m", "deepspeed.env_report"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "fp8_triton" in done.stdout, done.stderr
    assert "fp8_cpu" in done.stdout, done.stderr
