"""What DeepSpeed's engine calls under ZeRO 1 and 2.

In this order: the backward prologue and epilogue, `overlapping_partition_...` (ZeRO 2, every micro-step) or
`reduce_gradients` (ZeRO 1, at the boundary), `step`, `zero_grad`.
"""

from torch.nn import Parameter

from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer


class Stage12Optimizer(FP8ZeROOptimizer):
    """ZeRO 1 and 2: every rank holds all weights."""

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """ZeRO 2, after every micro-step: what backward has not sent yet."""
        self.gradients.finish()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """ZeRO 1, at the accumulation boundary."""
        self.gradients.finish()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """If the caller owns the boundary: every backward has reduced already (ZeRO 2)."""

    @property
    def round_robin_bit16_groups(self) -> list[list[Parameter]]:
        """Parameters in the order in which a checkpoint's FP32 view holds them."""
        return [[self.parameters[slot.parameter] for slot in bucket.slots] for bucket in self.parts.buckets]
