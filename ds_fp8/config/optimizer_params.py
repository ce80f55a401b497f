"""The "params" of a ds_config's "optimizer" section."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ds_fp8.config.refusals import validate


class OptimizerParams(BaseModel):
    """The "params" of the "optimizer" section."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    lr: float = Field(default=1e-3, ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    bias_correction: bool = True
    adam_w_mode: bool = True
    torch_adam: bool = False
    amsgrad: Literal[False] = False


def optimizer_params(params: Mapping[str, Any]) -> OptimizerParams:
    """Checked hyperparameters of ds_config's optimizer. Raises ValueError."""
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in params.items()}
    return validate(OptimizerParams, known, "optimizer.params")
