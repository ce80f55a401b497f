"""Packs a bucket's gradients into one message per owner and starts the exchange.

If blocks have scales, every owner gets a message of one length. If tensors have them, a message is as long as
what its owner has of the bucket. The paper's sum in FP8 packs otherwise: `fp8_sum`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.gradients.exchange import Exchange, Launch, blocks_in
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.messages import Message
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.placement.ranks import Fleet

Gradients = dict[int, Tensor | None]  # vectors by global parameter index; None if this rank has none
Write = tuple[Piece, Tensor, Blocks]  # what of a gradient goes into which rows of a message


class Packer(Protocol):
    """Packs and launches buckets."""

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        """Launch a bucket. Lets go of its gradients before there is room for what arrives."""


class ScaledPacker:
    """Codes with their scales."""

    def __init__(
        self,
        fmt: Format,
        fleets: Mapping[Fleet, Nodes],
        device: torch.device,
        backend: Backend,
        launch: Launch,
    ) -> None:
        self._format = fmt
        self._fleets = fleets
        self._device = device
        self._backend = backend
        self._launch = launch

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        buffer = self.pack(bucket, gradients, counts)
        gradients.clear()
        return self._launch(buffer, self._messages(bucket), self._fleets[bucket.fleet])

    def pack(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Tensor:
        """The bucket's messages side by side, uint8."""
        owners = self._fleets[bucket.fleet].layout.owners
        buffer, writes = lay_out(bucket, gradients, owners, self._messages(bucket), self._device)
        vectors = [gradient[piece.elements] for piece, gradient, _ in writes]
        counted = counts.of_gradient(sum(vector.numel() for vector in vectors))
        self._backend.quantize_vectors(vectors, [rows for _, _, rows in writes], counted)
        return buffer

    def _messages(self, bucket: Bucket) -> list[Message]:
        owners = self._fleets[bucket.fleet].layout.owners
        return [Message(bucket.blocks_of(owner), bucket.block_size, self._format) for owner in owners]


def lay_out(
    bucket: Bucket,
    gradients: Gradients,
    owners: Sequence[int],
    messages: Sequence[Message],
    device: torch.device,
) -> tuple[Tensor, list[Write]]:
    """Messages side by side, zeros where there is no gradient, and what is to be written into them."""
    sizes = [message.nbytes for message in messages]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    writes: list[Write] = []
    for owner, message, part in zip(owners, messages, torch.split(buffer, sizes), strict=True):
        blocks, end = blocks_in(part, message), 0
        for piece in bucket.pieces(owner):
            if piece.first_row > end:
                blocks[end : piece.first_row].zero_()
            gradient = gradients[piece.slot.parameter]
            if gradient is not None:
                writes.append((piece, gradient, blocks[piece.rows]))
            else:
                blocks[piece.rows].zero_()
            end = piece.rows.stop
        if end < len(blocks):
            blocks[end:].zero_()
    return buffer, writes
