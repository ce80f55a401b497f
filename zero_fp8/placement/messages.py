"""The layout of one rank's message to one owner of a bucket, in bytes. Integers only.

Codes of the owner's blocks lie first, then their scales, then padding, so that the next message can be read
in wide words.
"""

from dataclasses import dataclass

from ds_fp8.ops.formats import Format

ALIGNMENT = 16  # bytes; a message is padded to it


@dataclass(frozen=True)
class Message:
    """The blocks that one rank sends to one owner."""

    blocks: int
    block_size: int
    format: Format
    with_scales: bool = True  # if the format has them; codes travel alone if their scales are known

    @property
    def code_bytes(self) -> int:
        return self.blocks * self.block_size * self.format.itemsize

    @property
    def scaled(self) -> bool:
        """Whether scales follow the codes."""
        return self.with_scales and self.format.scaled

    @property
    def nbytes(self) -> int:
        return -(-(self.code_bytes + self.blocks * self.scaled) // ALIGNMENT) * ALIGNMENT
