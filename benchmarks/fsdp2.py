"""Plain PyTorch's sharded training, with the part of a DeepSpeed engine's interface that benchmarks call.

FSDP2 with BF16 compute, gradients reduced in FP32, FP32 masters and torch's fused AdamW: what a user without
DeepSpeed has. Weights stay gathered from forward to backward, as with ZeRO 2.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}  # as gpu/*.json
CLIPPING = 1.0
BYTES = 16  # per parameter, over all ranks: master, gradient, two moments, in FP32


class Fsdp2:
    """A model that FSDP2 shards, and its optimizer.

    layers: modules that are gathered one by one. micro_steps: backwards per optimizer step.
    """

    sequence_parallel_size = 1

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], micro_steps: int) -> None:
        self.module = model
        self._micro_steps, self._done = micro_steps, 0
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for each in (*layers, model):
            fully_shard(each, mp_policy=policy, reshard_after_forward=False)
        options: dict[str, Any] = {**ADAMW, "fused": next(model.parameters()).device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(model.parameters(), **options)
        self._norm: Tensor | None = None

    def __call__(self, **batch: Tensor) -> Any:
        return self.module(**batch)

    def gradient_accumulation_steps(self) -> int:
        return self._micro_steps

    def backward(self, loss: Tensor) -> None:
        (loss / self._micro_steps).backward()

    def step(self) -> None:
        self._done += 1
        if self._done % self._micro_steps:
            return
        norm = clip_grad_norm_(self.module.parameters(), CLIPPING)
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> Tensor | None:
        return self._norm
