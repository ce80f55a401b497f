"""Which parameters are trained, and whether they can be."""

from collections.abc import Mapping

from torch.nn import Parameter

from ds_fp8.zero_fp8.optimizer import FP8AdamW
from ds_fp8.zero_fp8.partition import ParameterSpec


def trained_parameters(
    optimizer: FP8AdamW, names: Mapping[Parameter, str]
) -> tuple[dict[int, Parameter], list[ParameterSpec]]:
    """The optimizer's parameters that require a gradient and are not empty, by global index."""
    indices = {parameter: index for index, parameter in enumerate(names)}
    parameters: dict[int, Parameter] = {}
    specs: list[ParameterSpec] = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad or not parameter.numel():
                continue
            if parameter not in indices:
                raise ValueError(
                    f"optimizer: received a parameter of shape {list(parameter.shape)} that is not in the "
                    "model, allowed: parameters of the model given to deepspeed.initialize"
                )
            index = indices[parameter]
            parameters[index] = parameter
            specs.append(ParameterSpec(index, parameter.numel(), number, parameter.dtype))
    if not specs:
        raise ValueError("optimizer: received no parameter that trains, allowed: at least one")
    return dict(sorted(parameters.items())), specs


def check_finite(parameters: Mapping[int, Parameter], names: Mapping[int, str]) -> None:
    """A scaled master would turn the neighbours of a value that is not finite into NaN."""
    for index, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise ValueError(
                f"weight of {names[index]}: received values that are not finite, allowed: finite ones, or "
                'fp8.optimizer.master_dtype "fp32" or "bf16"'
            )
