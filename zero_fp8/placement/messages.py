"""What one rank sends to one owner, in bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    def scaled(self) -> bool:
        """Whether scales follow the codes."""
        return self.format.scaled

    @property
    def nbytes(self) -> int:
        return -(-(self.code_bytes + self.blocks * self.scaled) // ALIGNMENT) * ALIGNMENT

    def buffer(self, messages: int, device: torch.device) -> Tensor:
        """Room for as many messages, [messages, nbytes] uint8, not initialised."""
        return torch.empty(messages, self.nbytes, dtype=torch.uint8, device=device)

    def blocks_of(self, message: Tensor) -> Blocks:
        """A message, [nbytes] uint8, seen as blocks."""
        codes = message[: self.code_bytes].view(self.format.dtype).view(self.blocks, self.block_size)
        scales = message[self.code_bytes :][: self.blocks] if self.scaled else None
        return Blocks(codes, scales, self.format)


class CodeMessage(Message):
    """Codes alone: their scales are known."""

    @property
    def scaled(self) -> bool:
        return False
