"""Chooses the kernels that run; no other module does.

Every backend holds the same functions, whose contracts are those of `ops.blocks`, `ops.reduction` and
`ops.adam`. The device decides: C++ on a CPU, Triton on a GPU; DS_FP8_BACKEND overrides it. A GPU without a
usable kernel is refused: the reference gives the same bits there, but more slowly than no FP8 at all. On a
CPU without a compiler the reference runs, and says so.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops import adam, blocks, per_tensor, reduction
from ds_fp8.ops.cpu.build import BuildError
from ds_fp8.ops.cpu.threads import on_threads

VARIABLE = "DS_FP8_BACKEND"
OLDEST_GPU = (8, 0)  # compute capability: BF16 and 16-byte asynchronous loads


@dataclass(frozen=True)
class Backend:
    """The ops of one implementation."""

    name: str
    quantize: Callable[..., None]
    dequantize: Callable[[blocks.Blocks, Tensor], None]  # for tests and benchmarks; no step calls it
    accumulate: Callable[..., Tensor]
    plan: Callable[..., Any]
    adam_step: Callable[[adam.Sweep], None]
    quantize_together: Callable[..., None] | None = None  # `quantize_vectors` in fewer launches
    instead: str | None = None  # why this backend runs although a faster one was wanted

    def quantize_vectors(
        self, vectors: Sequence[Tensor], outs: Sequence[blocks.Blocks], counts: Tensor | None = None
    ) -> None:
        """`quantize` each vector into its blocks in `outs`, which have one format and block size."""
        if self.quantize_together is not None:
            self.quantize_together(vectors, outs, counts)
            return
        for vector, out in zip(vectors, outs, strict=True):
            self.quantize(vector, out, counts)


REFERENCE = Backend(
    name="reference",
    quantize=blocks.quantize,
    dequantize=blocks.dequantize,
    accumulate=reduction.accumulate,
    plan=adam.plan,
    adam_step=adam.adam_step,
)

TENSOR_REFERENCE = Backend(
    name="reference",
    quantize=per_tensor.quantize,
    dequantize=blocks.dequantize,
    accumulate=per_tensor.accumulate,
    plan=adam.plan,
    adam_step=per_tensor.adam_step,
)


def choose(device: torch.device) -> Backend:
    """The backend for tensors on this device.

    Raises ValueError if DS_FP8_BACKEND names a backend that does not exist or cannot run, RuntimeError if the
    device is a GPU and Triton cannot be used on it.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in (REFERENCE.name, *BUILT):
        allowed = ", ".join((REFERENCE.name, *BUILT))
        raise ValueError(f"{VARIABLE}: received {wanted!r}, allowed: {allowed}")
    name = wanted or ("cpu" if device.type == "cpu" else "triton")
    if name == REFERENCE.name:
        return REFERENCE
    obstacle_of, load = BUILT[name]
    obstacle = obstacle_of(device)
    if obstacle is None:
        return load()
    if wanted is not None:
        raise ValueError(f"{VARIABLE}: received {wanted!r}, which cannot run on {device}: {obstacle}")
    if device.type == "cpu":
        return replace(REFERENCE, instead=obstacle)
    raise RuntimeError(
        f"no ds_fp8 kernel for {device}: {obstacle}. {VARIABLE}=reference runs on plain PyTorch, slowly"
    )


def choose_for_tensors(device: torch.device) -> Backend:
    """The backend for tensors with one scale each. Raises as `choose` does."""
    chosen = choose(device)
    if chosen.name == REFERENCE.name:
        return replace(TENSOR_REFERENCE, instead=chosen.instead)
    return FOR_TENSORS[chosen.name]()


def choose_for_host(threads: int) -> Backend:
    """The backend for states in host memory beside any device, with `threads` threads.

    Raises RuntimeError if the C++ kernels cannot be built: the reference is asked for by DS_FP8_BACKEND only.
    """
    if os.environ.get(VARIABLE) == REFERENCE.name:
        return REFERENCE
    obstacle = cpu_obstacle(torch.device("cpu"))
    if obstacle is not None:
        raise RuntimeError(obstacle)
    cpp = cpu_backend()
    return replace(
        cpp,
        adam_step=_on_threads(threads, cpp.adam_step),
        accumulate=_on_threads(threads, cpp.accumulate),
    )


def _on_threads(threads: int, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        with on_threads(threads):
            return function(*arguments, **named)

    return run


def cpu_obstacle(device: torch.device) -> str | None:
    """Why the C++ kernels cannot run on this device; None if they can. Builds them."""
    from ds_fp8.ops.cpu import kernels

    if device.type != "cpu":
        return "they need tensors in the host's memory"
    try:
        kernels.load()
    except BuildError as error:
        return str(error)
    return None


def cpu_backend() -> Backend:
    """The C++ kernels."""
    from ds_fp8.ops.cpu import kernels

    return Backend(
        name="cpu",
        quantize=kernels.quantize,
        dequantize=kernels.dequantize,
        accumulate=kernels.accumulate,
        plan=kernels.plan,
        adam_step=kernels.adam_step,
    )


def cpu_tensor_backend() -> Backend:
    """The C++ kernels that write one scale per tensor."""
    from ds_fp8.ops.cpu import kernels

    return Backend(
        name="cpu",
        quantize=kernels.quantize_tensor,
        dequantize=kernels.dequantize,
        accumulate=kernels.accumulate_tensor,
        plan=kernels.plan,
        adam_step=kernels.step_tensors,
    )


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        return "Triton needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests)"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"its compute capability is {capability[0]}.{capability[1]}, needed is 8.0 (A100) or later"
    return None


def triton_backend() -> Backend:
    """The Triton kernels; Triton is imported only here, so that other backends do without."""
    from ds_fp8.ops.triton import adam as adam_triton
    from ds_fp8.ops.triton import blocks as blocks_triton
    from ds_fp8.ops.triton import quantize_many as quantize_many_triton
    from ds_fp8.ops.triton import reduction as reduction_triton

    return Backend(
        name="triton",
        quantize=blocks_triton.quantize,
        dequantize=blocks_triton.dequantize,
        accumulate=reduction_triton.accumulate,
        plan=adam_triton.plan,
        adam_step=adam_triton.adam_step,
        quantize_together=quantize_many_triton.quantize_vectors,
    )


def triton_tensor_backend() -> Backend:
    """The Triton kernels that write one scale per tensor."""
    from ds_fp8.ops.triton import blocks as blocks_triton
    from ds_fp8.ops.triton import per_tensor as per_tensor_triton

    return Backend(
        name="triton",
        quantize=per_tensor_triton.quantize,
        dequantize=blocks_triton.dequantize,
        accumulate=per_tensor_triton.accumulate,
        plan=per_tensor_triton.plan,
        adam_step=per_tensor_triton.adam_step,
    )


FOR_TENSORS: dict[str, Callable[[], Backend]] = {"cpu": cpu_tensor_backend, "triton": triton_tensor_backend}
BUILT: dict[str, tuple[Callable[[torch.device], str | None], Callable[[], Backend]]] = {
    "cpu": (cpu_obstacle, cpu_backend),
    "triton": (triton_obstacle, triton_backend),
}
