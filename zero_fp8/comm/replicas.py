"""Checks that parameters which model-parallel peers replicate, such as layer norms, are equal.

Nothing sends it from peer to peer: peers compute the same gradients and round them alike, since the random
bits of a parameter follow from its place in the model. So both are checked before training begins, and the
weights again when they are saved.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.config.refusals import naming
from ds_fp8.zero_fp8.comm.agreement import check_agreement, first_objection
from ds_fp8.zero_fp8.comm.collectives import max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.placement.parameters import is_sharded
from ds_fp8.zero_fp8.placement.partition import ParameterSpec

logger = logging.getLogger("ds_fp8")

CHUNK = 2**22  # bytes that are summed at once
MARK = "parameter.tensor_model_parallel = True marks one of which each rank has a part"


def check_replicated(names: Mapping[Parameter, str], specs: Sequence[ParameterSpec], ranks: Ranks) -> None:
    """Raises ValueError, on every rank, if parameters that peers should hold alike differ between them.

    names: of every parameter, in the model's order. specs: of those that are trained.
    """
    assert ranks.peers is not None
    whole = [each for each in names if not is_sharded(each) and each.numel()]
    groups = {each.index: each.group for each in specs if each.replicated}
    device = next(iter(names)).device
    facts = [
        f"{names[each]}: position {index}, {list(each.shape)}, {each.dtype}, param group {groups.get(index)}"
        for index, each in enumerate(names)
        if not is_sharded(each)
    ]
    subject = f"parameters that model-parallel ranks hold alike ({MARK})"
    check_agreement(subject, facts, device, ranks.peers)
    differ = [names[each] for each in whole if _differs(each.detach(), ranks.peers)]
    objection = None
    if differ:
        objection = (
            f"{naming(differ)}: received other values than on the first model-parallel rank, allowed: the "
            f"same (as of one seed) in parameters that are not split; {MARK}"
        )
    objection = first_objection(objection, ranks)
    if objection is not None:
        raise ValueError(objection)


def warn_if_parted(names: Mapping[Parameter, str], ranks: Ranks) -> None:
    """Log the parameters that are no longer equal on all peers, before a save. Collective."""
    whole = [each for each in names if not is_sharded(each) and each.numel()]
    if ranks.peers is None or not whole:
        return
    sums = torch.stack([_weighed_bytes(each.detach()) for each in whole])
    largest, smallest = sums.clone(), -sums
    for each in (largest, smallest):
        max_over_ranks(each, ranks.peers)
    apart = (largest != -smallest).tolist()
    parted = [names[each] for each, differs in zip(whole, apart, strict=True) if differs]
    if parted and ranks.part == 0:
        logger.warning(
            "parameters that model-parallel ranks should hold alike differ: %s; each is saved with "
            "its own, and `ds_fp8 export` takes those of the first rank",
            naming(parted),
        )


def _weighed_bytes(tensor: Tensor) -> Tensor:
    """Sum a tensor's bytes, each times its place, modulo 2^64: rows that are swapped change it."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, len(flat), CHUNK):
        part = flat[first : first + CHUNK]
        total += (part * torch.arange(first + 1, first + len(part) + 1, device=flat.device)).sum()
    return total


def _differs(own: Tensor, peers: ProcessGroup) -> bool:
    """Whether a tensor has other bits on any rank than on the first."""
    flat = own.contiguous().view(-1).view(torch.uint8)
    first = flat.clone()
    source = torch.distributed.get_process_group_ranks(peers)[0]
    torch.distributed.broadcast(first, source, group=peers)
    flag = torch.tensor(not torch.equal(flat, first), dtype=torch.uint8, device=own.device)
    max_over_ranks(flag, peers)
    return bool(flag)
