"""Which parameters are trained, and checks that they can be.

Under ZeRO 3 DeepSpeed leaves a parameter empty between uses and keeps its size beside it: `shape_of` and
`numel_of` give the values of the whole parameter.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.ops.formats import E4M3
from ds_fp8.zero_fp8.placement.partition import ParameterSpec
from ds_fp8.zero_fp8.placement.ranks import Fleet


def shape_of(parameter: Tensor) -> torch.Size:
    """The parameter's shape when it is whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


def numel_of(parameter: Tensor) -> int:
    """The parameter's elements when it is whole."""
    return shape_of(parameter).numel()


def held_of(parameter: Tensor) -> Tensor:
    """This rank's values of the parameter: all of them, or its slice under ZeRO 3."""
    return getattr(parameter, "ds_tensor", parameter)


def part_of(parameter: Any) -> slice:
    """The elements of the parameter that this rank holds: all, or those of its slice under ZeRO 3."""
    held, numel = held_of(parameter).numel(), numel_of(parameter)
    first = getattr(parameter, "ds_zero_partition_rank", 0) * held
    return slice(min(first, numel), min(first + held, numel))


def is_sharded(parameter: Tensor) -> bool:
    """Whether model-parallel peers have other parts of a parameter, as DeepSpeed and Megatron mark it."""
    marks = ("tensor_model_parallel", "model_parallel")
    return any(bool(getattr(parameter, mark, False)) for mark in marks)


AUTOTP = "ds_autotp_universal_checkpoint_meta"  # DeepSpeed's attribute
PIECEWISE = ("sub_param_shape", "sub_param_sizes", "sub_param_shard_widths")


def cut_of(parameter: Tensor) -> int | None:
    """The dimension along which peers' parts of a sharded parameter follow each other; None: not known.

    As AutoTP or Megatron says of it. Fused parameters, cut in several places, are not known.
    """
    said: Mapping[str, Any] | None = getattr(parameter, AUTOTP, None)
    if said is None:
        stride = getattr(parameter, "partition_stride", 1)
        said = {"partition_dim": getattr(parameter, "partition_dim", None) if stride == 1 else None}
    reason = said.get("conversion", {}).get("unsupported_reason")
    dimension = said.get("partition_dim")
    fused = any(said.get(key) for key in PIECEWISE)
    known = isinstance(dimension, int) and 0 <= dimension < parameter.ndim
    return dimension if known and not fused and not reason else None


def trained_parameters(
    param_groups: Sequence[Mapping[str, Any]],
    names: Mapping[Parameter, str],
    fleet: Fleet,
    encoded: Collection[Parameter] = (),
    *,
    peers: bool = False,
) -> tuple[dict[int, Parameter], list[ParameterSpec]]:
    """The parameters of the groups that require a gradient and are not empty, by global index.

    encoded: those that become codes; no bucket has both. peers: whether the model is split over ranks.
    """
    codes = set(map(id, encoded))
    indices = {parameter: index for index, parameter in enumerate(names)}
    parameters: dict[int, Parameter] = {}
    specs: list[ParameterSpec] = []
    for number, group in enumerate(param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad or not numel_of(parameter):
                continue
            if parameter not in indices:
                raise ValueError(
                    f"optimizer: received a parameter of shape {list(shape_of(parameter))} that is not in "
                    "the model, allowed: parameters of the model given to deepspeed.initialize"
                )
            index = indices[parameter]
            parameters[index] = parameter
            kind = E4M3 if id(parameter) in codes else parameter.dtype
            replicated = peers and not is_sharded(parameter)
            specs.append(ParameterSpec(index, numel_of(parameter), number, kind, fleet, replicated))
    check_memory(parameters, names)
    if not specs:
        raise ValueError("optimizer: received no parameter that trains, allowed: at least one")
    return dict(sorted(parameters.items())), specs


def check_memory(parameters: Mapping[int, Parameter], names: Mapping[Parameter, str]) -> None:
    """Refuse trained parameters that share memory: each gets memory of its own, which would separate them."""
    owners: dict[int, Parameter] = {}
    for each in names:
        if each.numel() and not each.is_meta:
            owner = owners.setdefault(each.data_ptr(), each)
            shares = owner is not each and each.device == owner.device
            if shares and any(one is parameter for one in (each, owner) for parameter in parameters.values()):
                raise ValueError(
                    f"{names[each]}: received the memory of {names[owner]} as .data, allowed: its own; tie "
                    "parameters by giving both modules the same Parameter"
                )


def check_finite(weights: Mapping[int, Tensor], names: Mapping[int, str]) -> None:
    """Refuse weights with inf or NaN: a scaled master would turn their neighbours into NaN.

    weights: what this rank has of each parameter, by global index.
    """
    for index, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(
                f"weight of {names[index]}: received values that are not finite, allowed: finite ones, or "
                'fp8.optimizer.master_dtype "fp32" or "bf16"'
            )
