"""Access to a ZeRO 3 parameter by DeepSpeed's utilities: whole FP32 tensors, and this rank's part of them.

`safe_get_full_*`, `safe_set_full_*`, their `local` counterparts and `safe_update_full_grad_vectorized` call
the object that is the parameter's `_z3_optimizer`, with the parameter. A local tensor is as long as the slice
that DeepSpeed keeps in `ds_tensor`: zeros follow after the parameter's end. For a parameter that is not
trained, the result is None.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.handlers.full_tensors import FullTensors

ATTRIBUTE = "_z3_optimizer"


class Trained(NamedTuple):
    """The states of a trained parameter."""

    full: FullTensors
    parameter: int  # global index


class SliceAccess:
    """Access by parameter, under the names that DeepSpeed's utilities call."""

    def __init__(
        self, full_tensors: FullTensors, parameters: Mapping[int, Parameter], on_written: Callable[[], None]
    ) -> None:
        """parameters: those that are trained, by global index. on_written: called after slices were set."""
        self._on_written = on_written
        self._trained = {each: Trained(full_tensors, index) for index, each in parameters.items()}

    def attach(self, parameters: Iterable[Parameter]) -> None:
        """Set `_z3_optimizer`, which DeepSpeed asks of all of a model's parameters."""
        for each in parameters:
            setattr(each, ATTRIBUTE, self)

    def detach(self) -> None:
        """Forget the trained parameters."""
        self._trained.clear()

    # Whole tensors

    def get_full_hp_param(self, param: Parameter, optim_state_key: str | None = None) -> Tensor | None:
        """Return the master weight, or the named state. Collective."""
        known = self._trained.get(param)
        return known and known.full.get_state(known.parameter, param, optim_state_key)

    def set_full_hp_param(self, value: Tensor, param: Parameter, optim_state_key: str | None = None) -> None:
        """Round a value, the same on every rank, into the master weight and the weight, or into a state."""
        known = self._trained.get(param)
        if known:
            known.full.set_state(known.parameter, param, value, optim_state_key)
            self._on_written()

    def get_fp32_grad_for_param(self, param: Parameter) -> Tensor | None:
        """Return the mean gradient. Collective. Raises ValueError outside backward .. step."""
        known = self._trained.get(param)
        return known and known.full.get_gradient(known.parameter, param)

    def set_fp32_grad_for_param(self, value: Tensor, param: Parameter) -> None:
        """Round a mean gradient, the same on every rank, into the reduced one."""
        known = self._trained.get(param)
        if known:
            known.full.set_gradient(known.parameter, param, value)

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[[Tensor, Parameter], Tensor], param_list: Iterable[Parameter]
    ) -> None:
        """Replace each mean gradient by the result of a function. Collective."""
        for param in param_list:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update_func(gradient, param), param)

    def get_hp_param_device(
        self, param: Parameter, optim_state_key: str | None = None
    ) -> torch.device | None:
        """Return the device of the master weight, or of the named state."""
        return param.device if param in self._trained else None

    # This rank's part

    def get_local_fp32_param(self, param: Any, optim_state_key: str | None = None) -> Tensor | None:
        """Return this rank's part of the master weight or named state, [elements of ds_tensor] float32."""
        known = self._trained.get(param)
        return known and known.full.get_own_state(known.parameter, param.ds_tensor, optim_state_key)

    def set_local_hp_param(self, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """Round this rank's part into the master weight and the weight, or into a state.

        A rank's whole copy of a persistent parameter follows at the next step.
        """
        known = self._trained.get(param)
        if known:
            known.full.set_own_state(known.parameter, param.ds_tensor, value, optim_state_key)
            self._on_written()

    def get_local_fp32_grad_for_param(self, param: Any) -> Tensor | None:
        """Return this rank's mean gradient, [elements of ds_tensor] float32. ValueError if there is none."""
        known = self._trained.get(param)
        return known and known.full.get_own_gradient(known.parameter, param.ds_tensor)

    def set_local_grad_for_param(self, value: Tensor, param: Any) -> None:
        """Round this rank's part of a mean gradient into the reduced one."""
        known = self._trained.get(param)
        if known:
            known.full.set_own_gradient(known.parameter, param.ds_tensor, value)
