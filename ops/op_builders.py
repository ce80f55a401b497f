"""DeepSpeed's view of the kernels: op builders for its lookup and its op report.

Nothing is built ahead: the C++ kernels are compiled on first use, Triton's when they are first launched.
`load` returns the backend, whose functions our own code calls directly.
"""

from collections.abc import Callable

import torch
from deepspeed.ops.op_builder.builder import OpBuilder

from ds_fp8.ops.backend import Backend, cpu_backend, cpu_obstacle, triton_backend, triton_obstacle
from ds_fp8.ops.cpu import build


class FP8OpBuilder(OpBuilder):
    """The common part of both builders."""

    NAME: str
    _obstacle: Callable[[], str | None]
    _backend: Callable[[], Backend]

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        return f"ds_fp8.ops.{self.NAME}"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the kernels run on this machine; if not, `error_log` has the reason."""
        self.error_log = type(self)._obstacle()
        if verbose and self.error_log:
            self.warning(self.error_log)
        return self.error_log is None

    def load(self, verbose: bool = True) -> Backend:
        """The backend. Raises RuntimeError, saying why, if it cannot run."""
        if not self.is_compatible(verbose=False):
            raise RuntimeError(f"{self.NAME}: {self.error_log}")
        return type(self)._backend()


class FP8CPUBuilder(FP8OpBuilder):
    """The FP8 kernels for CPUs: blocks, reduction and the Adam sweep in C++."""

    BUILD_VAR = "DS_BUILD_FP8_CPU"
    NAME = "fp8_cpu"
    _obstacle = staticmethod(build.obstacle)
    _backend = staticmethod(cpu_backend)

    def sources(self) -> list[str]:
        return [str(path) for path in sorted(build.SOURCES.glob("*.cpp"))]

    def load(self, verbose: bool = True) -> Backend:
        """The backend, built if need be. Raises RuntimeError, saying why, if it cannot be built."""
        obstacle = cpu_obstacle(torch.device("cpu"))
        if obstacle:
            raise RuntimeError(f"{self.NAME}: {obstacle}")
        return cpu_backend()


class FP8TritonBuilder(FP8OpBuilder):
    """The FP8 kernels for NVIDIA GPUs: blocks, reduction and the Adam sweep."""

    BUILD_VAR = "DS_BUILD_FP8_TRITON"
    NAME = "fp8_triton"
    _backend = staticmethod(triton_backend)

    @staticmethod
    def _obstacle() -> str | None:
        return triton_obstacle(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def sources(self) -> list[str]:
        return []
