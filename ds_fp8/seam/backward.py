"""The seam around a backward: DeepSpeed's engine counts them, and here it counts as PyTorch does.

`gradients.backwards` says what counts. DeepSpeed's own engine takes every gradient that reaches an output of
a forward for a backward, a call of `torch.autograd.grad` among them, divides it there, and begins anew with
each forward of a loss that needs several.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ds_fp8.compat import is_functorch_transforming
from ds_fp8.seam.status import is_active
from ds_fp8.zero_fp8.gradients.backwards import ENGINE_BACKWARDS

Method = Callable[..., Any]


def backward(original: Method) -> Method:
    """DeepSpeedEngine.backward: while one runs, of any engine, the loss has been divided.

    DeepSpeed before 0.19.8 divides at the outputs of the forward here, too.
    """

    @functools.wraps(original)
    def method(self: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        if is_active(self) and scale_wrt_gas and isinstance(loss, Tensor):
            loss, scale_wrt_gas = loss / self.gradient_accumulation_steps(), False
        if is_active(self):
            self.optimizer.clear_backward_seen_flag()  # a loss need not come from a forward of the engine
        with ENGINE_BACKWARDS.one():
            return original(self, loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    return method


def backward_prologue(original: Method) -> Method:
    """DeepSpeedEngine._backward_prologue, called by an output of each forward: once per backward."""

    @functools.wraps(original)
    def method(self: Any) -> None:
        if not is_active(self) or is_functorch_transforming() or self.optimizer.opens_backward():
            original(self)

    return method


def backward_prologue_per_tensor(original: Method) -> Method:
    """DeepSpeedEngine._backward_prologue_per_tensor, called by every output in every backward.

    Gradients are divided where they arrive instead. An output calls the prologue in its first backward only,
    so a second one over a retained graph, or one after torch.autograd.grad, has its prologue from here.
    """

    @functools.wraps(original)
    def method(self: Any, grad: Any) -> Any:
        if not is_active(self):
            return original(self, grad)
        self._backward_prologue()
        return grad

    return method


def backward_epilogue(original: Method) -> Method:
    """DeepSpeedEngine._backward_epilogue: a loss that went through no output has had no prologue yet."""

    @functools.wraps(original)
    def method(self: Any) -> None:
        if is_active(self) and not self.optimizer.in_backward:
            self._backward_prologue()
        original(self)

    return method


def zero_grad(original: Method) -> Method:
    """DeepSpeedEngine.zero_grad: reduced gradients go, too."""

    @functools.wraps(original)
    def method(self: Any) -> None:
        original(self)
        if is_active(self):
            self.optimizer.zero_grad()

    return method


def divisor(engine: Any) -> float:
    """The divisor of a gradient in a backward that is not the engine's.

    Raises RuntimeError if its loss lacks the loss scale.
    """
    if engine.optimizer.needs_scaler() and not engine._manual_backward_expected:
        raise RuntimeError(
            "loss.backward(): received a loss without the loss scale, allowed with fp16 enabled: "
            "engine.backward(loss), or engine.scale(loss).backward()"
        )
    return float(engine.gradient_accumulation_steps())
