"""What travels of a bucket's gradients, and in which form: messages are written, and launched.

Where blocks have scales, every owner gets a message of one length. Where tensors have them, it is as long as
what the owner has of the bucket.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ds_fp8.ops import ring
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.zero_fp8.autoscale import Autoscale
from ds_fp8.zero_fp8.comm import CodeMessage, Message, Nodes, max_over_ranks
from ds_fp8.zero_fp8.exchange import EvenExchange, Exchange, RingExchange, UnevenExchange
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.partition import Bucket, Piece
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.shard import RingShard, Shard

Names = Mapping[int, str]  # global parameter index -> name in the module
Gradients = Mapping[int, Tensor | None]  # vectors by parameter; None where this rank has none


class BlockWire:
    """Codes and scales of blocks."""

    def __init__(
        self, recipe: Recipe, nodes: Nodes, backend: Backend, parameters: Mapping[int, Tensor]
    ) -> None:
        """parameters: all that are trained, by global index."""
        self._recipe = recipe
        self._nodes = nodes
        self._backend = backend
        self._device = next(iter(parameters.values())).device

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        """Launch a bucket. Zero bytes decode to zeros."""
        messages = self._messages(bucket, Message)
        buffer = self._buffer(messages)
        for piece, rows in self._places(bucket, messages, buffer):
            gradient = gradients[piece.slot.parameter]
            if gradient is not None:
                self._backend.quantize(gradient[piece.elements], rows, counts.of_gradient(piece.numel))
        return self._launch(buffer, messages)

    def settle(self, shards: Sequence[Shard]) -> None:
        """A step has been taken."""

    def figures(self) -> dict[str, float]:
        """What there is to say of the last step, for health."""
        return {}

    def state(self, names: Names) -> dict[str, float]:
        """What a checkpoint keeps, by parameter name."""
        return {}

    def restore(self, saved: Mapping[str, float], names: Names) -> None:
        """Go on from what `state` gave."""

    def _messages(self, bucket: Bucket, kind: type[Message]) -> list[Message]:
        """One for each owner."""
        size, fmt = bucket.block_size, self._recipe.wire
        return [kind(bucket.blocks_of(owner), size, fmt) for owner in self._nodes.owners]

    def _buffer(self, messages: Sequence[Message]) -> Tensor:
        return torch.zeros(sum(each.nbytes for each in messages), dtype=torch.uint8, device=self._device)

    def _places(
        self, bucket: Bucket, messages: Sequence[Message], buffer: Tensor
    ) -> Iterator[tuple[Piece, Blocks]]:
        """Every piece of the bucket, and its rows in the message to its owner."""
        parts = torch.split(buffer, [each.nbytes for each in messages])
        for owner, message, part in zip(self._nodes.owners, messages, parts, strict=True):
            blocks = message.blocks_of(part)
            for piece in bucket.pieces(owner):
                yield piece, blocks[piece.rows]

    def _launch(self, buffer: Tensor, messages: Sequence[Message]) -> Exchange:
        rows = buffer.view(len(messages), -1)
        return EvenExchange(rows, messages[0], self._recipe.between_nodes, self._nodes, self._backend)


class TensorWire(BlockWire):
    """Codes and scales of whole tensors, in one hop."""

    def _launch(self, buffer: Tensor, messages: Sequence[Message]) -> Exchange:
        return UnevenExchange(buffer, messages, self._nodes)


class RingWire(BlockWire):
    """Codes of whole tensors, with a scale that the ranks agree on first: one small all-reduce a bucket."""

    def __init__(
        self, recipe: Recipe, nodes: Nodes, backend: Backend, parameters: Mapping[int, Tensor]
    ) -> None:
        super().__init__(recipe, nodes, backend, parameters)
        sizes = {index: each.numel() for index, each in parameters.items()}
        assert recipe.autoscale is not None
        self._autoscale = Autoscale(recipe.autoscale, sizes, nodes.size, self._device)

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        indices = [slot.parameter for slot in bucket.slots]
        amax = torch.zeros(len(indices), device=self._device)
        for number, index in enumerate(indices):
            gradient = gradients[index]
            if gradient is not None:
                amax[number] = ring.largest(gradient)
        max_over_ranks(amax, self._nodes.everybody)
        vector = ring.inverse_scales(amax, self._autoscale.of(indices), self._recipe.wire)
        inverse = dict(zip(indices, vector, strict=True))
        messages = self._messages(bucket, CodeMessage)
        buffer = self._buffer(messages)
        for piece, rows in self._places(bucket, messages, buffer):
            index = piece.slot.parameter
            gradient = gradients[index]
            if gradient is not None:
                ring.quantize(gradient, inverse[index], rows, counts.of_gradient(piece.numel))
        return RingExchange(buffer, messages, self._nodes, self._own_scales(bucket, inverse))

    def _own_scales(self, bucket: Bucket, inverse: Mapping[int, Tensor]) -> Tensor:
        """Of this rank's rows, [blocks] float32."""
        rank = self._nodes.place
        scales = torch.ones(bucket.blocks_of(rank), device=self._device)
        for piece in bucket.pieces(rank):
            scales[piece.rows] = 1 / inverse[piece.slot.parameter]
        return scales

    def settle(self, shards: Sequence[Shard]) -> None:
        saturated = [each for shard in shards if isinstance(shard, RingShard) for each in shard.saturated]
        self._autoscale.settle(saturated, self._nodes.everybody)

    def figures(self) -> dict[str, float]:
        return self._autoscale.figures()

    def state(self, names: Names) -> dict[str, float]:
        return self._autoscale.state(names)

    def restore(self, saved: Mapping[str, float], names: Names) -> None:
        self._autoscale.restore(saved, names)
