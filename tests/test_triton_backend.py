"""Which kernels run: by device, by DS_FP8_BACKEND, and what is refused in words that help."""

import importlib.util

import pytest
import torch
from kernel_support import needs_compiler

from ds_fp8.ops.backend import BUILT, REFERENCE, VARIABLE, choose, cpu_backend, triton_backend
from ds_fp8.ops.triton import adam as adam_triton
from ds_fp8.ops.triton import blocks as blocks_triton
from ds_fp8.ops.triton import quantize_many as quantize_many_triton
from ds_fp8.ops.triton import reduction as reduction_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU and without environment variables of ours."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def give_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@needs_compiler
@pytest.mark.parametrize("interpreted", [False, True])
def test_a_cpu_has_the_cpp_kernels(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU) == cpu_backend()
    assert choose(CPU).name == "cpu"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_gpu_has_the_kernels(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    give_gpu(monkeypatch, capability)
    assert choose(CUDA) == triton_backend()
    assert choose(CUDA).name == "triton"


def test_the_kernels_are_those_of_the_modules() -> None:
    backend = triton_backend()
    assert backend.quantize is blocks_triton.quantize
    assert backend.dequantize is blocks_triton.dequantize
    assert backend.accumulate is reduction_triton.accumulate
    assert backend.plan is adam_triton.plan
    assert backend.adam_step is adam_triton.adam_step
    assert backend.quantize_together is quantize_many_triton.quantize_vectors


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("gpu", [True, False])
def test_the_reference_runs_wherever_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, gpu: bool
) -> None:
    monkeypatch.setenv(VARIABLE, "reference")
    if gpu:
        give_gpu(monkeypatch, (9, 0))
    assert choose(device) is REFERENCE


def test_interpreted_kernels_run_on_a_cpu_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU) == triton_backend()


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("value", ["cutlass", "Triton", "", "triton "])
def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, device: torch.device) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match="allowed") as caught:
        choose(device)
    assert str(caught.value) == f"DS_FP8_BACKEND: received {value!r}, allowed: reference, {', '.join(BUILT)}"


@pytest.mark.parametrize("interpret", [None, "0"])
def test_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, interpret: str | None) -> None:
    """Where it is not interpreted; a GPU elsewhere in the machine does not help."""
    monkeypatch.setenv(VARIABLE, "triton")
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    give_gpu(monkeypatch, (9, 0))
    message = (
        r"DS_FP8_BACKEND: received 'triton', which cannot run on cpu: .* NVIDIA GPU .*TRITON_INTERPRET=1"
    )
    with pytest.raises(ValueError, match=message):
        choose(CPU)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    give_gpu(monkeypatch, capability)
    with pytest.raises(RuntimeError, match=r"DS_FP8_BACKEND=reference") as caught:
        choose(CUDA)
    assert "no ds_fp8 kernel for cuda" in str(caught.value)
    assert f"compute capability is {capability[0]}.{capability[1]}, needed is 8.0" in str(caught.value)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"cannot run on cuda: its compute capability is 7\."):
        choose(CUDA)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"NVIDIA GPU.*DS_FP8_BACKEND=reference"):
        choose(CUDA)


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"triton is not installed.*DS_FP8_BACKEND=reference"):
        choose(CUDA)
