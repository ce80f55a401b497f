"""What travels of a bucket's gradients, and in which form: messages are written, and launched.

Where blocks have scales, every owner gets a message of one length. Where tensors have them, it is as long as
what the owner has of the bucket.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_fp8.ops import fp8_sum
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.zero_fp8.comm.collectives import max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.gradients.autoscale import Autoscale
from ds_fp8.zero_fp8.gradients.exchange import EvenExchange, Exchange, RingExchange, UnevenExchange
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.messages import CodeMessage, Message
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.states.shard import RingShard, Shard

Names = Mapping[int, str]  # global parameter index -> name in the module
Gradients = dict[int, Tensor | None]  # vectors by parameter; None where this rank has none
Write = tuple[Piece, Tensor, Blocks]  # what of a gradient goes into which rows of a message


class BlockWire:
    """Codes and scales of blocks."""

    message = Message

    def __init__(
        self, recipe: Recipe, nodes: Nodes, backend: Backend, parameters: Mapping[int, Tensor]
    ) -> None:
        """parameters: all that are trained, by global index."""
        self._recipe = recipe
        self._nodes = nodes
        self._backend = backend
        self._device = next(iter(parameters.values())).device

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        """Launch a bucket. Lets go of its gradients before there is room for what arrives."""
        buffer = self.pack(bucket, gradients, counts)
        gradients.clear()
        return self._launch(buffer, self._messages(bucket))

    def pack(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Tensor:
        """The bucket's messages side by side, uint8."""
        buffer, writes = self._lay_out(bucket, gradients)
        vectors = [gradient[piece.elements] for piece, gradient, _ in writes]
        counted = counts.of_gradient(sum(each.numel() for each in vectors))
        self._backend.quantize_vectors(vectors, [rows for _, _, rows in writes], counted)
        return buffer

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

    def _messages(self, bucket: Bucket) -> list[Message]:
        """One for each owner."""
        size, fmt = bucket.block_size, self._recipe.wire
        return [self.message(bucket.blocks_of(owner), size, fmt) for owner in self._nodes.owners]

    def _lay_out(self, bucket: Bucket, gradients: Gradients) -> tuple[Tensor, list[Write]]:
        """Messages side by side, zeros where there is no gradient, and what is to be written into them."""
        messages = self._messages(bucket)
        sizes = [each.nbytes for each in messages]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        writes: list[Write] = []
        for owner, message, part in zip(
            self._nodes.owners, messages, torch.split(buffer, sizes), strict=True
        ):
            blocks, packed = message.blocks_of(part), 0
            for piece in bucket.pieces(owner):
                gradient = gradients[piece.slot.parameter]
                if gradient is not None:
                    writes.append((piece, gradient, blocks[piece.rows]))
                else:
                    blocks[piece.rows].zero_()
                packed = piece.rows.stop
            blocks[packed:].zero_()
        return buffer, writes

    def _launch(self, buffer: Tensor, messages: Sequence[Message]) -> Exchange:
        rows = buffer.view(len(messages), -1)
        return EvenExchange(rows, messages[0], self._recipe.between_nodes, self._nodes, self._backend)


class TensorWire(BlockWire):
    """Codes and scales of whole tensors, in one hop."""

    def _launch(self, buffer: Tensor, messages: Sequence[Message]) -> Exchange:
        return UnevenExchange(buffer, messages, self._nodes)


class RingWire(BlockWire):
    """Codes of whole tensors, with a scale that the ranks agree on first: one small all-reduce a bucket."""

    message = CodeMessage

    def __init__(
        self, recipe: Recipe, nodes: Nodes, backend: Backend, parameters: Mapping[int, Tensor]
    ) -> None:
        super().__init__(recipe, nodes, backend, parameters)
        sizes = {index: each.numel() for index, each in parameters.items()}
        assert recipe.autoscale is not None
        self._autoscale = Autoscale(recipe.autoscale, sizes, nodes.size, self._device)

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        inverse = self._agree(gradients)
        buffer, scales = self._pack(bucket, gradients, counts, inverse), self._own_scales(bucket, inverse)
        gradients.clear()
        return RingExchange(buffer, self._messages(bucket), self._nodes, scales)

    def pack(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Tensor:
        return self._pack(bucket, gradients, counts, self._agree(gradients))

    def _pack(
        self, bucket: Bucket, gradients: Gradients, counts: Counts, inverse: Mapping[int, Tensor]
    ) -> Tensor:
        buffer, writes = self._lay_out(bucket, gradients)
        for piece, gradient, rows in writes:
            fp8_sum.quantize(gradient, inverse[piece.slot.parameter], rows, counts.of_gradient(piece.numel))
        return buffer

    def _agree(self, gradients: Gradients) -> dict[int, Tensor]:
        """What each parameter's values are multiplied with, 0-d float32, by parameter; on every rank."""
        amax = torch.zeros(len(gradients), device=self._device)
        for number, gradient in enumerate(gradients.values()):
            if gradient is not None:
                amax[number] = fp8_sum.largest(gradient)
        max_over_ranks(amax, self._nodes.everybody)
        inverse = fp8_sum.inverse_scales(amax, self._autoscale.of(list(gradients)), self._recipe.wire)
        return dict(zip(gradients, inverse, strict=True))

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
