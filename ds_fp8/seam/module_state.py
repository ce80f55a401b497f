"""The state_dict of an engine's module, as save_checkpoint and save_16bit_model write it."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ds_fp8.seam.status import is_active

Method = Callable[..., Any]


def module_state_dict(original: Method) -> Method:
    """DeepSpeedEngine.module_state_dict: FP8 weights as plain BF16 tensors in host memory."""

    @functools.wraps(original)
    def method(
        self: Any,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        if keep_vars or not is_active(self) or not self.optimizer.saved.model_weights.exist:
            return original(self, destination, prefix, keep_vars, exclude_frozen_parameters)
        state = original(self, destination, prefix, True, exclude_frozen_parameters)
        self.optimizer.saved.model_weights.make_plain(state, writes=self.save_non_zero_checkpoint)
        for name, value in state.items():
            state[name] = value.detach() if isinstance(value, Tensor) else value
        return state

    return method
