"""Ranks that disagree about config or model are told so, before they wait for each other for ever."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup

from ds_fp8.config.refusals import where_they_differ


def check_agreement(subject: str, facts: Sequence[str], device: torch.device, group: ProcessGroup) -> None:
    """Compare facts over the ranks of a group: one gather of 32 bytes where they are the same.

    Raises ValueError, on every rank, with the first fact that differs from rank 0's.
    """
    digest = hashlib.sha256("\n".join(facts).encode()).digest()
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
    ranks = dist.get_world_size(group)
    found = torch.empty(ranks, len(digest), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(found.view(-1), own, group=group)
    if bool((found == found[0]).all()):
        return
    told = everybody(list(facts), group)
    for rank, theirs in enumerate(told):
        if theirs != told[0]:
            first, other = where_they_differ(*first_difference(told[0], theirs))
            raise ValueError(f"ranks disagree about {subject}: rank 0 has {first}, rank {rank} has {other}")


def first_objection(objection: str | None, group: ProcessGroup) -> str | None:
    """The objection of the first rank that has one, on every rank."""
    objections = everybody(objection, group)
    return next((f"rank {rank}: {each}" for rank, each in enumerate(objections) if each), None)


T = TypeVar("T")


def agreed(act: Callable[[], T], group: ProcessGroup, about: object = "") -> T:
    """What `act` returns on this rank, once it has succeeded on every rank.

    Raises the same ValueError on all of them if it raises any exception on any of them; on the rank that
    raised, the exception is its cause. about: the file or folder that the message names in any case.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    objection = first_objection(None if failure is None else explain(failure, about), group)
    if objection is not None:
        raise ValueError(objection) from failure
    return result  # type: ignore[return-value]


def explain(error: Exception, about: object = "") -> str:
    """An exception in words: its own if they are written for users, else after the name of its type."""
    text = str(error) if isinstance(error, ValueError | OSError) else ""
    text = text or f"{type(error).__name__}: {error}"
    return text if str(about) in text else f"{about}: {text}"


def everybody(value: T, group: ProcessGroup) -> list[T]:
    """The ranks' values, in rank order."""
    # Not DeepSpeed's, which ends the process where its comms logger is on.
    values: list[T] = [value] * dist.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def first_difference(facts: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """The first pair of facts that differ; "nothing more" where one side has ended."""
    for mine, other in zip(facts, theirs, strict=False):
        if mine != other:
            return mine, other
    shorter = min(len(facts), len(theirs))
    return tuple((*each[shorter:], "nothing more")[0] for each in (facts, theirs))  # type: ignore[return-value]
