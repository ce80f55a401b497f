"""What DeepSpeed's engine calls under ZeRO 1 and 2.

In this order: the backward prologue and epilogue, `overlapping_partition_...` (ZeRO 2, every micro-step) or
`reduce_gradients` (ZeRO 1, at the boundary), `step`, `zero_grad`.
"""

from torch.nn import Parameter

from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer


class Stage12Optimizer(FP8ZeROOptimizer):
    """ZeRO 1 and 2: every rank holds all weights."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """ZeRO 1, at the accumulation boundary."""
        self.gradients.finish()

    @property
    def round_robin_bit16_groups(self) -> list[list[Parameter]]:
        """`parameters_by_bucket`, as DeepSpeed's utilities ask for them under ZeRO 1 and 2."""
        return self.parameters_by_bucket
