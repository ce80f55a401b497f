"""What travels of a bucket's gradients, and in which form: messages are written, and launched.

Where blocks have scales, every owner gets a message of one length. Where tensors have them, it is as long as
what the owner has of the bucket.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_fp8.ops.backend import Backend
from ds_fp8.zero_fp8.comm import Message, Nodes
from ds_fp8.zero_fp8.exchange import EvenExchange, Exchange, UnevenExchange
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.partition import Bucket
from ds_fp8.zero_fp8.recipe import Recipe

Gradients = Mapping[int, Tensor | None]  # vectors by parameter; None where this rank has none


class BlockWire:
    """Codes and scales of blocks."""

    def __init__(self, recipe: Recipe, nodes: Nodes, backend: Backend, device: torch.device) -> None:
        self._recipe = recipe
        self._nodes = nodes
        self._backend = backend
        self._device = device

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        """Launch a bucket. Zero bytes decode to zeros."""
        owners = self._nodes.owners
        messages = [
            Message(bucket.blocks_of(owner), bucket.block_size, self._recipe.wire) for owner in owners
        ]
        sizes = [each.nbytes for each in messages]
        buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=self._device)
        for owner, message, part in zip(owners, messages, torch.split(buffer, sizes), strict=True):
            blocks = message.blocks_of(part)
            for piece in bucket.pieces(owner):
                gradient = gradients[piece.slot.parameter]
                if gradient is not None:
                    values, rows = gradient[piece.elements], blocks[piece.rows]
                    self._backend.quantize(values, rows, counts.of_gradient(piece.numel))
        return self._launch(buffer, messages)

    def _launch(self, buffer: Tensor, messages: Sequence[Message]) -> Exchange:
        rows = buffer.view(len(messages), -1)
        return EvenExchange(rows, messages[0], self._recipe.between_nodes, self._nodes, self._backend)


class TensorWire(BlockWire):
    """Codes and scales of whole tensors, in one hop."""

    def _launch(self, buffer: Tensor, messages: Sequence[Message]) -> Exchange:
        return UnevenExchange(buffer, messages, self._nodes)
