"""This rank's gradients that have not travelled.

They lie in `.grad`, or are held since a backward that exchanged nothing.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.gradients.packing import Gradients
from ds_fp8.zero_fp8.placement.partition import Bucket, Slot
from ds_fp8.zero_fp8.plain_tensors import flaw_of


class PendingGradients:
    """Takes gradients off their parameters when their bucket travels."""

    def __init__(self, parameters: Mapping[int, Parameter]) -> None:
        """parameters: that are trained, by global index."""
        self._parameters = parameters
        self._kinds = {index: (each.dtype, each.device) for index, each in parameters.items()}
        self._held: dict[int, Tensor] = {}
        self.drop()

    def drop(self) -> None:
        """Forget what is held, and what was taken."""
        self._held.clear()
        self._unfit: tuple[int, str] | None = None  # the first parameter whose gradient was refused, and why
        self.received = 0  # gradients that have been taken

    def hold(self) -> None:
        """Take all gradients off their parameters, and keep them."""
        for index in self._parameters:
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
        return sum(map(self._waits, self._parameters))

    def in_bucket(self, bucket: Bucket) -> bool:
        """Whether a gradient of one of the bucket's parameters waits."""
        return any(self._waits(slot.parameter) for slot in bucket.slots)

    def objection(self, names: Mapping[int, str]) -> str | None:
        """To a gradient that was taken and refused, if there is one."""
        return None if self._unfit is None else f"gradient of {names[self._unfit[0]]}: {self._unfit[1]}"

    def _waits(self, index: int) -> bool:
        return index in self._held or self._parameters[index].grad is not None

    def _take(self, index: int) -> Tensor | None:
        """A parameter's gradient, taken off it, with what came before outside a round."""
        parameter, held = self._parameters[index], self._held.pop(index, None)
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and gradient.is_neg():
            gradient = gradient.resolve_neg()
        return gradient if held is None else held if gradient is None else held + gradient

    def _fits(self, gradient: Tensor, slot: Slot) -> bool:
        """Whether a gradient is what the kernels expect; the step objects to one that is not."""
        dtype, device = self._kinds[slot.parameter]
        flaw, alike = flaw_of(gradient), gradient.dtype is dtype and gradient.device == device
        fits = flaw is None and alike and gradient.numel() == slot.numel
        if not fits and self._unfit is None:
            received = flaw or f"{list(gradient.shape)} of {gradient.dtype} on {gradient.device}"
            allowed = f"{slot.numel} elements of {dtype} on {device}"
            self._unfit = slot.parameter, f"received {received}, allowed: {allowed}"
        return fits
