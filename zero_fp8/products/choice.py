"""Choose the weights of a model that become FP8, and give the reason for each that stays.

The weight of an exact `nn.Linear` or of Hugging Face's `Conv1D` is eligible if a product of codes is faster.
A subclass may do anything with its weight, also in C++, so its weight stays; so do weights that compute
logits or are looked up by row.
"""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Parameter

from ds_fp8.config.refusals import refusal
from ds_fp8.zero_fp8.placement.parameters import shape_of

MULTIPLE = 16  # cuBLAS requires sides that are multiples of this
CONV1D = "transformers.pytorch_utils.Conv1D"
HEADS = ("lm_head", "head", "output", "embed_out")
OTHERS = ("torchao.float8", "transformer_engine")  # packages whose modules make their own FP8 products


class Eligible(NamedTuple):
    name: str
    parameter: Parameter
    kind: str  # "Linear" or "Conv1D"


class _User(NamedTuple):
    """A module that has a parameter, under the module's own name for it."""

    module_name: str
    module: nn.Module
    attribute: str


def eligible(
    model: nn.Module,
    *,
    min_elements: int,
    exclude: Sequence[str],
    output_embeddings: bool = False,
    dtype: torch.dtype | None = torch.bfloat16,
    trained: bool = True,
    frozen: bool = False,
) -> tuple[list[Eligible], dict[str, str]]:
    """Return the weights that become FP8, and the reason for every other matrix, by name.

    Args:
        min_elements: of a weight; the square of its shorter side must be at least half of min_elements.
        exclude: patterns of names, as in `fnmatch`.
        output_embeddings: whether the model's output embedding may be one of them.
        dtype: required of a weight; None: any dtype, for a model that is yet to be cast.
        trained, frozen: whether trained weights are eligible, and frozen ones, such as the base under LoRA.

    Raises:
        ValueError: the model has modules that make their own FP8 products, or a pattern of `exclude`
            matches no name.
    """
    check_modules(model)
    check_patterns(model, exclude)
    users = _users(model)
    outputs = [] if output_embeddings else find_output_embeddings(model)
    found, reasons = [], {}
    for name, parameter in model.named_parameters():
        uses = users[id(parameter)]
        reason = (
            _reason_by_name(name, exclude)
            or _reason_by_use(uses, outputs)
            or _reason_by_values(parameter, dtype)
            or _reason_by_training(parameter, trained, frozen)
            or _reason_by_size(parameter, min_elements)
        )
        if reason is None:
            found.append(Eligible(name, parameter, kind_of(uses[0].module) or ""))
        elif len(shape_of(parameter)) == 2:
            reasons[name] = reason
    return found, reasons


def check_modules(model: nn.Module) -> None:
    """Refuse a model that has another library's FP8 products."""
    for name, module in model.named_modules():
        for each in type(module).__mro__:
            if any(_within(each.__module__, package) for package in OTHERS):
                raise ValueError(
                    f"FP8 products: received {name or 'a model'}, a {_qualified(type(module))}, which makes "
                    "its own FP8 products; allowed: nn.Linear and Conv1D"
                )


def check_patterns(model: nn.Module, exclude: Sequence[str]) -> None:
    """Refuse a pattern that matches no name."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in exclude:
        if not fnmatch.filter(names, pattern):
            allowed = f"patterns that match a name of the model, which begin with {', '.join(names[:3])}"
            raise refusal("fp8.weights.exclude", pattern, allowed)


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a module whose weight may be FP8, or None."""
    if type(module) is nn.Linear:
        return "Linear"
    return "Conv1D" if _qualified(type(module)) == CONV1D else None


def find_output_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return modules that compute logits: those that the model or a submodule declares, else by name.

    By name, a layer's `output` or `head`, as in `layers.0.attention.output`, is none unless it comes last.
    """
    methods = [getattr(each, "get_output_embeddings", None) for each in model.modules()]
    said = [method() for method in methods if callable(method)]
    if any(isinstance(each, nn.Module) for each in said):
        return [each for each in said if isinstance(each, nn.Module)]
    linears = [(name.split("."), each) for name, each in model.named_modules() if type(each) is nn.Linear]
    return [
        module
        for index, (path, module) in enumerate(linears, start=1)
        if path[-1] in HEADS and (index == len(linears) or not any(each.isdigit() for each in path))
    ]


def _users(model: nn.Module) -> dict[int, list[_User]]:
    """Return the modules that have each parameter, by the parameter's id."""
    users: dict[int, list[_User]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(_User(name, module, attribute))
    return users


def _reason_by_name(name: str, exclude: Sequence[str]) -> str | None:
    pattern = next((each for each in exclude if fnmatch.fnmatchcase(name, each)), None)
    return None if pattern is None else f"excluded by {pattern}"


def _reason_by_use(uses: list[_User], outputs: list[nn.Module]) -> str | None:
    if any(each.module is output for each in uses for output in outputs):
        return "the output embedding"
    other = next((each for each in uses if each.attribute != "weight" or not kind_of(each.module)), None)
    if other is not None:
        shared = "" if len(uses) == 1 else "shared with "
        return f"{shared}{other.attribute} of {type(other.module).__name__}"
    if len(uses) > 1:
        return f"tied: {uses[0].module_name} and {uses[1].module_name} have it"
    return None


def _reason_by_values(parameter: Parameter, dtype: torch.dtype | None) -> str | None:
    if len(shape_of(parameter)) != 2:
        return f"of {len(shape_of(parameter))} dimensions"
    if type(parameter) is not Parameter:
        return f"a {type(parameter).__name__}"
    if dtype not in (None, parameter.dtype):
        return f"of {parameter.dtype}"
    return None


def _reason_by_training(parameter: Parameter, trained: bool, frozen: bool) -> str | None:
    if parameter.requires_grad:
        return None if trained else "trained"
    return None if frozen else "frozen"


def _reason_by_size(parameter: Parameter, min_elements: int) -> str | None:
    rows, columns = shape_of(parameter)
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"{rows} x {columns}: not multiples of {MULTIPLE}"
    if rows * columns < min_elements or 2 * min(rows, columns) ** 2 < min_elements:
        return f"{rows} x {columns}: too small to gain"
    return None


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")
