"""This rank's gradients that have not travelled.

They lie in `.grad`, or are held since a backward that exchanged nothing. Under ZeRO 1 micro-steps add up in
`.grad`, in FP32 if the config asks for it. With one micro-step per step it stays as the model, until a
backward has ended that is not the last before a step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.gradients.packing import Gradients
from ds_fp8.zero_fp8.placement.partition import Bucket, Slot
from ds_fp8.zero_fp8.plain_tensors import flaw_of


class PendingGradients:
    """Takes gradients off their parameters when their bucket travels."""

    def __init__(
        self, parameters: Mapping[int, Parameter], *, adds_in_fp32: bool = False, micro_steps: int = 1
    ) -> None:
        """parameters: that are trained, by global index. adds_in_fp32: what `.grad` keeps, of micro_steps."""
        self.parameters = parameters
        self._device = next(iter(parameters.values())).device
        self._dtypes = {index: each.dtype for index, each in parameters.items()}
        self._adds_in_fp32 = adds_in_fp32
        self._is_wide = False  # `.grad` is FP32, whatever the parameter's dtype
        if adds_in_fp32 and micro_steps > 1:
            self._widen()
        self._held: dict[int, Tensor] = {}
        self.drop()

    def drop(self) -> None:
        """Forget what is held, and what was taken."""
        self._held.clear()
        self._unfit: tuple[int, str] | None = None  # the first parameter whose gradient was refused, and why
        self.received = 0  # gradients that have been taken

    def keep(self) -> None:
        """Leave what a backward has left in `.grad`; the next one is added to it."""
        if self._adds_in_fp32 and not self._is_wide and self.late:
            self._widen()

    def _widen(self) -> None:
        self._is_wide = True
        for index, parameter in self.parameters.items():
            self._dtypes[index] = _add_up_in(torch.float32, parameter)

    def let_go(self) -> None:
        """Have autograd accumulate gradients in the parameters' own dtype again."""
        if self._is_wide:
            self._is_wide = False
            for index, parameter in self.parameters.items():
                self._dtypes[index] = _add_up_in(parameter.dtype, parameter)

    def hold(self) -> None:
        """Take all gradients off their parameters, and keep them."""
        for index in self.parameters:
            gradient = self._take(index)
            if gradient is not None:
                self._held[index] = gradient

    def take(self, bucket: Bucket) -> Gradients:
        """The bucket's gradients as vectors, taken off their parameters."""
        vectors: Gradients = {}
        for slot in bucket.slots:
            gradient = self._take(slot.parameter)
            self.received += gradient is not None
            fits = gradient is not None and self._fits(gradient, slot)
            vectors[slot.parameter] = gradient.reshape(-1) if gradient is not None and fits else None
        return vectors

    @property
    def late(self) -> int:
        """Parameters with a gradient that has not travelled."""
        return sum(map(self._waits, self.parameters))

    def in_bucket(self, bucket: Bucket) -> bool:
        """Whether a gradient of one of the bucket's parameters waits."""
        return any(self._waits(slot.parameter) for slot in bucket.slots)

    def objection(self, names: Mapping[int, str]) -> str | None:
        """To a gradient that was taken and refused, if there is one."""
        return None if self._unfit is None else f"gradient of {names[self._unfit[0]]}: {self._unfit[1]}"

    def _waits(self, index: int) -> bool:
        return index in self._held or self.parameters[index].grad is not None

    def _take(self, index: int) -> Tensor | None:
        """A parameter's gradient, taken off it, with what came before outside a round."""
        parameter, held = self.parameters[index], self._held.pop(index, None)
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and gradient.is_neg():
            gradient = gradient.resolve_neg()
        return gradient if held is None else held if gradient is None else held + gradient

    def _fits(self, gradient: Tensor, slot: Slot) -> bool:
        """Whether a gradient is what the kernels expect; the step objects to one that is not."""
        dtype, device = self._dtypes[slot.parameter], self._device
        flaw, alike = flaw_of(gradient), gradient.dtype is dtype and gradient.device == device
        fits = flaw is None and alike and gradient.numel() == slot.numel
        if not fits and self._unfit is None:
            received = flaw or f"{list(gradient.shape)} of {gradient.dtype} on {gradient.device}"
            allowed = f"{slot.numel} elements of {dtype} on {device}"
            self._unfit = slot.parameter, f"received {received}, allowed: {allowed}"
        return fits


def _add_up_in(dtype: torch.dtype, parameter: Parameter) -> torch.dtype:
    """Have autograd add up a parameter's gradients in this dtype, what is there among them; returns it."""
    gradient, parameter.grad = parameter.grad, None
    parameter.grad_dtype = dtype
    parameter.grad = None if gradient is None else gradient.to(dtype)
    return dtype
