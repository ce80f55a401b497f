"""Which weights of a model become FP8, and why the others stay.

Eligible is the weight of an exact `nn.Linear` or of Hugging Face's `Conv1D` that a product of codes makes
faster. A subclass may do anything with its weight, also in C++, so that it stays; so does what computes
logits or looks up rows.
"""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Parameter

from ds_fp8.config.refusals import refusal
from ds_fp8.zero_fp8.placement.parameters import shape_of

MULTIPLE = 16  # cuBLAS takes sides of so many elements
CONV1D = "transformers.pytorch_utils.Conv1D"
HEADS = ("lm_head", "head", "output", "embed_out")
OTHERS = ("torchao.float8", "transformer_engine")  # packages whose modules make FP8 products of their own


class Eligible(NamedTuple):
    name: str
    parameter: Parameter
    kind: str  # "Linear" or "Conv1D"


class _User(NamedTuple):
    """A module that has a parameter, under a name of its own."""

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
    """The weights that become FP8, and the reason of every other matrix, by name.

    Args:
        min_elements: of a weight; the shorter side squared may be half as many at least.
        exclude: patterns of names, as `fnmatch` has them.
        output_embeddings: whether the model's output embedding may be one of them.
        dtype: that a weight must have; None: any, of a model that is yet to be cast.
        trained, frozen: whether weights may be that train, and such that do not, as the base under LoRA.

    Raises:
        ValueError: the model has modules that make FP8 products of their own, or no name that a pattern of
            `exclude` matches.
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
    """Refuse a model that another library makes FP8 products with."""
    for name, module in model.named_modules():
        for each in type(module).__mro__:
            if any(_within(each.__module__, package) for package in OTHERS):
                raise ValueError(
                    f"FP8 products: received {name or 'a model'}, a {_qualified(type(module))}, which makes "
                    "FP8 products of its own; allowed: nn.Linear and Conv1D"
                )


def check_patterns(model: nn.Module, exclude: Sequence[str]) -> None:
    """Refuse a pattern that keeps nothing: it was meant for something."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in exclude:
        if not fnmatch.filter(names, pattern):
            allowed = f"patterns that match a name of the model, which begin with {', '.join(names[:3])}"
            raise refusal("fp8.weights.exclude", pattern, allowed)


def kind_of(module: nn.Module) -> str | None:
    """Of the modules whose weight may be FP8."""
    if type(module) is nn.Linear:
        return "Linear"
    return "Conv1D" if _qualified(type(module)) == CONV1D else None


def find_output_embeddings(model: nn.Module) -> list[nn.Module]:
    """What computes logits: as the model or one in it says, else the last Linear if its name does."""
    methods = [getattr(each, "get_output_embeddings", None) for each in model.modules()]
    said = [method() for method in methods if callable(method)]
    if any(isinstance(each, nn.Module) for each in said):
        return [each for each in said if isinstance(each, nn.Module)]
    last = [each for each in model.named_modules() if type(each[1]) is nn.Linear][-1:]
    return [module for name, module in last if name.rpartition(".")[2] in HEADS]


def _users(model: nn.Module) -> dict[int, list[_User]]:
    """By parameter, the modules that have it."""
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
