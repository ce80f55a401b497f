"""The collectives: FP8 gradients to their owners, weights to everybody, four figures to all.

Gradients go by one all-to-all of bytes a bucket, codes and scales of a destination side by side in
one message. Not a reduce-scatter: that would add inside the collective, in FP8 and without scales.
Float8 tensors are never handed to a collective (gloo refuses them), their bytes are.
"""

from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format

ALIGNMENT = 16  # bytes; a message is padded to it, so that the next one can be read in wide words


@dataclass(frozen=True)
class Message:
    """The bytes one rank sends to one owner: the codes of its blocks, then their scales."""

    blocks: int
    block_size: int
    format: Format

    @property
    def code_bytes(self) -> int:
        return self.blocks * self.block_size * self.format.itemsize

    @property
    def nbytes(self) -> int:
        scale_bytes = self.blocks if self.format.scaled else 0
        return -(-(self.code_bytes + scale_bytes) // ALIGNMENT) * ALIGNMENT

    def buffer(self, ranks: int, device: torch.device) -> Tensor:
        """Room for one message a rank, [ranks, nbytes] uint8."""
        return torch.zeros(ranks, self.nbytes, dtype=torch.uint8, device=device)

    def blocks_of(self, message: Tensor) -> Blocks:
        """A message, [nbytes] uint8, seen as blocks."""
        codes = message[: self.code_bytes].view(self.format.dtype).view(self.blocks, self.block_size)
        scales = message[self.code_bytes :][: self.blocks] if self.format.scaled else None
        return Blocks(codes, scales, self.format)


def exchange(messages: Tensor, group: ProcessGroup) -> Tensor:
    """Row r of `messages` goes to rank r; row r of the result came from rank r."""
    received = torch.empty_like(messages)
    dist.all_to_all_single(received, messages, group=group)
    return received


def gather(buffer: Tensor, group: ProcessGroup) -> None:
    """Fill the flat buffer, of which each rank has written its own even part, in place."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dist.all_gather_into_tensor(buffer, buffer.view(ranks, -1)[rank], group=group)


def sum_over_ranks(figures: Tensor, group: ProcessGroup) -> None:
    """Add a tensor over the ranks, in place."""
    dist.all_reduce(figures, op=dist.ReduceOp.SUM, group=group)


def max_over_ranks(figures: Tensor, group: ProcessGroup) -> None:
    """Largest of each figure over the ranks, in place."""
    dist.all_reduce(figures, op=dist.ReduceOp.MAX, group=group)
