"""The ZeRO 1 and 2 optimizer that DeepSpeed's engine calls.

Order of calls: the backward prologue and epilogue, `overlapping_partition_...` (ZeRO 2, every micro-step) or
`reduce_gradients` (ZeRO 1, at the boundary), `step`, `zero_grad`.
"""

from torch.nn import Parameter

from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer


class Stage12Optimizer(FP8ZeROOptimizer):
    """ZeRO 1 and 2: every rank holds all weights."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Reduce gradients at the accumulation boundary (ZeRO 1)."""
        self.gradients.finish()

    @property
    def round_robin_bit16_groups(self) -> list[list[Parameter]]:
        """`parameters_by_bucket`, under the name that DeepSpeed's utilities use with ZeRO 1 and 2."""
        return self.parameters_by_bucket
