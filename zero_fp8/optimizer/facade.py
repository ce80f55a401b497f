"""Attributes that DeepSpeed, schedulers and Hugging Face read of an optimizer, passed on to the handler's."""

from collections.abc import Mapping
from typing import Any

from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW


class Facade:
    """Answers for `optimizer` and `loss_scaler`, which is DeepSpeed's."""

    optimizer: FP8AdamW
    loss_scaler: Any

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Raise ValueError: shards are made once."""
        self.optimizer.add_param_group(dict(param_group))

    @property
    def state(self) -> Mapping[Any, Any]:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        return float(self.loss_scaler.loss_scale)

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return bool(self.loss_scaler.dynamic)
