"""Raise the same error on every rank if config or model differ, instead of deadlocking in a collective."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup

from ds_fp8.config.refusals import where_they_differ
from ds_fp8.zero_fp8.comm.groups import Ranks, groups_of

AnyRanks = ProcessGroup | Ranks


def check_agreement(subject: str, facts: Sequence[str], device: torch.device, ranks: AnyRanks) -> None:
    """Compare facts over ranks: one gather of 32 bytes where they are the same.

    Raises ValueError, on every rank, with the first fact that differs from rank 0's.
    """
    digest = hashlib.sha256("\n".join(facts).encode()).digest()
    digests = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)[None]
    for group in groups_of(ranks):
        own = digests
        parts = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather_into_tensor(parts.view(-1), own.view(-1), group=group)
        digests = parts.flatten(0, 1)
    if bool((digests == digests[0]).all()):
        return
    expected, *others = gather_objects(list(facts), ranks)
    first_rank, *numbers = _numbers(ranks, 1 + len(others))
    for rank, theirs in zip(numbers, others, strict=True):
        if theirs != expected:
            first, other = where_they_differ(*first_difference(expected, theirs))
            raise ValueError(
                f"ranks disagree about {subject}: rank {first_rank} has {first}, rank {rank} has {other}"
            )


def first_objection(objection: str | None, ranks: AnyRanks) -> str | None:
    """The objection of the first rank that has one, on every rank."""
    objections = gather_objects(objection, ranks)
    told = zip(_numbers(ranks, len(objections)), objections, strict=True)
    return next((f"rank {rank}: {each}" for rank, each in told if each), None)


def _numbers(ranks: AnyRanks, count: int) -> Sequence[int]:
    """Numbers of the ranks, for messages."""
    return ranks.numbers if isinstance(ranks, Ranks) else range(count)


T = TypeVar("T")


def agreed(act: Callable[[], T], ranks: AnyRanks, about: object = "") -> T:
    """Return what `act` returns on this rank, once it has succeeded on every rank.

    Raises the same ValueError on every rank if `act` raises any exception on any rank; on that rank the
    exception is the error's cause. about: the file or folder that the message names in any case.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    objection = first_objection(None if failure is None else explain(failure, about), ranks)
    if objection is not None:
        raise ValueError(objection) from failure
    return result  # type: ignore[return-value]


def explain(error: Exception, about: object = "") -> str:
    """The text of an exception, after the name of its type unless the text is written for users."""
    text = str(error) if isinstance(error, ValueError | OSError) else ""
    text = text or f"{type(error).__name__}: {error}"
    return text if str(about) in text else f"{about}: {text}"


def gather_objects(value: T, ranks: AnyRanks) -> list[T]:
    """The ranks' values, in rank order."""
    values = [value]
    for group in groups_of(ranks):
        # Not DeepSpeed's, which ends the process where its comms logger is on.
        parts: list[list[T]] = [values for _ in range(dist.get_world_size(group))]
        torch.distributed.all_gather_object(parts, values, group=group)
        values = [each for part in parts for each in part]
    return values


def first_difference(facts: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """The first pair of facts that differ; "nothing more" where one side has ended."""
    for mine, other in zip(facts, theirs, strict=False):
        if mine != other:
            return mine, other
    shorter = min(len(facts), len(theirs))
    return tuple((*each[shorter:], "nothing more")[0] for each in (facts, theirs))  # type: ignore[return-value]
