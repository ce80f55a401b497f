"""Weights that a user edits between two steps of FP8AdamW without DeepSpeed, and masters that follow them.

A loaded state dict, a clamp, a mask or `parameter.data = ...` changes a weight, and torch's optimizers go on
from it. Here the step goes on from the master, so the master takes such an edit over first. Comparing every
weight with its master at every step would cost a sweep of its own. So a mark is remembered of how a step left
a parameter, and only one whose mark is another, or which has none, is compared. An edit in place through
`parameter.data` changes no mark: torch does not count it either.

Of a split master the weight is the upper half, and nothing need follow.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ds_fp8.ops.blocks import Blocks, chunks, decode, encode, padded
from ds_fp8.ops.masters import write_weights


class Mark(NamedTuple):
    """How a step has left a parameter; equal as long as no write to it was seen."""

    version: int  # autograd's count of writes in place
    address: int
    strides: tuple[int, ...]
    storage: Any  # a StorageWeakRef: addresses are given out again, this one not while it is remembered


def mark_of(parameter: Tensor) -> Mark | None:
    """None where writes are not counted, as in inference mode."""
    if parameter.is_inference():
        return None
    storage = StorageWeakRef(parameter.untyped_storage())  # type: ignore[no-untyped-call]
    return Mark(parameter._version, parameter.data_ptr(), parameter.stride(), storage)


def follow(master: Blocks, weights: Tensor) -> None:
    """Round weights, [n], that are other than their masters give into the masters, to nearest.

    Blocks without such a weight keep their bytes, and the others what was not edited, as far as the scale of
    the edit allows.
    """
    for part, values, edited in _edits(master, weights):
        rows = edited.any(dim=1)
        if rows.any():
            before = master[part]
            after = Blocks.zeros(len(before), master.block_size, master.format, weights.device)
            encode(values, after)
            _put(after.codes.view(torch.uint8), before.codes.view(torch.uint8), rows[:, None])
            if before.scales is not None and after.scales is not None:
                _put(after.scales, before.scales, rows)


def brings_in_non_finite(master: Blocks, weights: Tensor) -> bool:
    """Whether a weight, of [n], was edited to inf or NaN; one that its master gives was not."""
    if weights.isfinite().all():
        return False
    return any(bool((edited & ~values.isfinite()).any()) for _, values, edited in _edits(master, weights))


def _edits(master: Blocks, weights: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk rows, masters with edits taken over (float32), and where those are."""
    size = master.block_size
    for part in chunks(len(master), size):
        piece = weights[part.start * size : part.stop * size]
        given = padded(piece, part.stop - part.start, size)
        values = decode(master[part])
        values.view(-1)[piece.numel() :] = 0  # in a block that is not finite they are not
        rounded = torch.empty_like(given)
        write_weights(values, rounded)
        edited = _bits(rounded).ne(_bits(given)) & ~(rounded.isnan() & given.isnan())
        yield part, torch.where(edited, given.to(torch.float32), values), edited


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.itemsize == 4 else torch.int16)


def _put(source: Tensor, target: Tensor, where: Tensor) -> None:
    target.copy_(torch.where(where, source, target))
