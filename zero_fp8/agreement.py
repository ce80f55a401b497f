"""Ranks that disagree about config or model are told so, before they wait for each other for ever."""

import hashlib
from collections.abc import Sequence

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup


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
    everybody: list[Sequence[str]] = [()] * ranks
    torch.distributed.all_gather_object(everybody, list(facts), group=group)
    for rank, theirs in enumerate(everybody):
        if list(theirs) != list(everybody[0]):
            first, other = first_difference(everybody[0], theirs)
            raise ValueError(f"ranks disagree about {subject}: rank 0 has {first}, rank {rank} has {other}")


def first_objection(objection: str | None, group: ProcessGroup) -> str | None:
    """The objection of the first rank that has one, on every rank."""
    # Not DeepSpeed's, which ends the process where its comms logger is on.
    everybody: list[str | None] = [None] * dist.get_world_size(group)
    torch.distributed.all_gather_object(everybody, objection, group=group)
    return next((f"rank {rank}: {each}" for rank, each in enumerate(everybody) if each), None)


def first_difference(facts: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """The first pair of facts that differ; "nothing more" where one side has ended."""
    for mine, other in zip(facts, theirs, strict=False):
        if mine != other:
            return mine, other
    shorter = min(len(facts), len(theirs))
    return tuple((*each[shorter:], "nothing more")[0] for each in (facts, theirs))  # type: ignore[return-value]
