"""AdamW whose states are rounded to nearest as if they were stored with one scale per tensor.

FP8-LM (arXiv 2310.18313) stores its states so, and shows in Table 6 which of them tolerate it; Transformer
Engine's FusedAdam has one scale per tensor, too. ds_fp8 offers neither, so both are simulated here: the
arithmetic is torch's in FP32, and the resulting states are rounded and decoded in place.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_fp8.ops.formats import Format


def round_tensor(values: Tensor, fmt: Format) -> None:
    """Round FP32 values in place to a format whose largest code stands for the tensor's largest value."""
    scale = values.abs().amax() / fmt.max
    if scale > 0:
        values.copy_((values / scale).to(fmt.dtype).to(torch.float32) * scale)


class RoundedAdamW(torch.optim.AdamW):
    """torch's AdamW over FP32 parameters, which are the masters; a state without a format stays FP32."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        master: Format | None = None,
        exp_avg: Format | None = None,
        exp_avg_sq: Format | None = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__(params, **hyperparameters)
        self._master = master
        self._formats = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter, state in self.state.items():
            if self._master:
                round_tensor(parameter, self._master)
            for name, fmt in self._formats.items():
                if fmt:
                    round_tensor(state[name], fmt)
        return loss


class MixedPrecision:
    """The part of a DeepSpeed engine that training needs: a BF16 model beside FP32 masters."""

    def __init__(self, model: nn.Module, optimizer: Callable[[list[Tensor]], Any], clipping: float) -> None:
        """optimizer: called with the masters."""
        self.module = model.to(torch.bfloat16)
        self.device = next(model.parameters()).device
        self._weights = list(model.parameters())
        self._masters = [nn.Parameter(weight.detach().to(torch.float32)) for weight in self._weights]
        self._clipping = clipping
        self.optimizer = optimizer(self._masters)
        self.train, self.eval = model.train, model.eval

    def __call__(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def gradient_accumulation_steps(self) -> int:
        return 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.to(torch.float32), None
        nn.utils.clip_grad_norm_(self._masters, self._clipping)
        self.optimizer.step()
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)

    def destroy(self) -> None:
        self._weights, self._masters = [], []
