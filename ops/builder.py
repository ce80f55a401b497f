"""DeepSpeed's view of the kernels: op builders for its lookup and its op report.

There is nothing to build ahead: Triton compiles a kernel when it is first launched. `load` returns the
backend, whose functions our own code calls directly.
"""

import torch
from deepspeed.ops.op_builder.builder import OpBuilder

from ds_fp8.ops.backend import Backend, triton_backend, triton_obstacle


class FP8TritonBuilder(OpBuilder):
    """The FP8 kernels for NVIDIA GPUs: blocks, reduction and the Adam sweep."""

    BUILD_VAR = "DS_BUILD_FP8_TRITON"
    NAME = "fp8_triton"

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        return f"ds_fp8.ops.{self.NAME}"

    def sources(self) -> list[str]:
        return []

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the kernels run on this machine's device; what is in the way is `error_log`."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.error_log = triton_obstacle(device)
        if verbose and self.error_log:
            self.warning(self.error_log)
        return self.error_log is None

    def load(self, verbose: bool = True) -> Backend:
        """The backend. Raises RuntimeError, saying why, where it cannot run."""
        if not self.is_compatible(verbose=False):
            raise RuntimeError(f"{self.NAME}: {self.error_log}")
        return triton_backend()
