"""The parameters of an optimizer, with a name for messages, and whether their memory is their own."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from ds_fp8.zero_fp8.plain_tensors import flaw_of


class Member(NamedTuple):
    """A parameter of an optimizer."""

    number: int  # among all of them
    name: str  # for messages
    group: dict[str, Any]
    parameter: Tensor


def members_of(param_groups: list[dict[str, Any]]) -> Iterator[Member]:
    """Every parameter with its place."""
    number = 0
    for group_number, group in enumerate(param_groups):
        names = group.get("param_names")
        for place, parameter in enumerate(group["params"]):
            named = f", {names[place]!r}" if names else ""
            yield Member(number, f"parameter {number} (param group {group_number}{named})", group, parameter)
            number += 1


def check_apart(members: Iterable[Member]) -> None:
    """Refuse parameters that share memory, by a ValueError: a step of one would edit the other."""
    in_memory = [each for each in members if flaw_of(each.parameter) is None and each.parameter.numel()]
    in_memory.sort(key=lambda each: (str(each.parameter.device), each.parameter.data_ptr(), each.number))
    for one, other in pairwise(in_memory):
        begin = one.parameter.data_ptr()
        whole = one.parameter.is_contiguous() and other.parameter.is_contiguous()
        end = begin + (one.parameter.nbytes if whole else 1)  # strided ones may lie between each other
        if one.parameter.device == other.parameter.device and begin <= other.parameter.data_ptr() < end:
            raise ValueError(
                f"FP8AdamW, {one.name} and {other.name}: received parameters that share memory, allowed: one "
                "and the same Parameter in both places, or memory of its own for each"
            )
