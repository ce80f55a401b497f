"""The paper's sum of gradients in FP8 (arXiv 2310.18313 section 2.1), between ranks.

1. The ranks agree on a scale per tensor, in one small all-reduce per bucket.
2. Each sends the codes alone to the tensor's owner.
3. The owner adds them in FP8, in the order in which a ring of ranks would.

The reduced gradient has an FP32 scale. `ops.fp8_sum` has the arithmetic, `autoscale` the factor mu.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_fp8.ops import fp8_sum
from ds_fp8.ops.blocks import Blocks, decode
from ds_fp8.ops.formats import Format
from ds_fp8.ops.per_tensor import store_rows
from ds_fp8.ops.reduction import norm_parts
from ds_fp8.zero_fp8.comm.collectives import AllToAll, max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.gradients.autoscale import Autoscale
from ds_fp8.zero_fp8.gradients.exchange import Exchange, Hops, one_hop
from ds_fp8.zero_fp8.gradients.packing import Gradients, lay_out
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.messages import Message
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.placement.ranks import Fleet


class FP8Packer:
    """Codes of whole tensors, scaled alike on every rank."""

    def __init__(
        self, fmt: Format, fleets: Mapping[Fleet, Nodes], device: torch.device, autoscale: Autoscale
    ) -> None:
        self._format = fmt
        self._fleets = fleets
        self._device = device
        self._autoscale = autoscale

    def send(self, bucket: Bucket, gradients: Gradients, counts: Counts) -> Exchange:
        """Launch a bucket. Lets go of its gradients before there is room for what arrives."""
        nodes = self._fleets[bucket.fleet]
        owned, size = map(bucket.blocks_of, nodes.layout.owners), bucket.block_size
        messages = [Message(blocks, size, self._format, with_scales=False) for blocks in owned]
        inverse = self._agree(gradients, nodes)
        buffer = self._pack(bucket, gradients, messages, inverse, counts)
        scales = self._own_scales(bucket, nodes.rank, inverse)
        gradients.clear()
        transfer = AllToAll(buffer, nodes.group, [message.nbytes for message in messages])
        return Exchange(_in_ring_order(transfer, messages[nodes.rank], nodes.rank, scales))

    def _pack(
        self,
        bucket: Bucket,
        gradients: Gradients,
        messages: Sequence[Message],
        inverse: Mapping[int, Tensor],
        counts: Counts,
    ) -> Tensor:
        """The messages side by side, uint8."""
        owners = self._fleets[bucket.fleet].layout.owners
        buffer, writes = lay_out(bucket, gradients, owners, messages, self._device)
        for piece, gradient, rows in writes:
            counted = counts.of_gradient(piece.numel)
            fp8_sum.quantize(gradient, inverse[piece.slot.parameter], rows, counted)
        return buffer

    def _agree(self, gradients: Gradients, nodes: Nodes) -> dict[int, Tensor]:
        """The factor of each parameter's values, 0-d float32, by parameter; the same on every rank."""
        amax = torch.zeros(len(gradients), dtype=torch.float32, device=self._device)
        for number, gradient in enumerate(gradients.values()):
            if gradient is not None:
                amax[number] = fp8_sum.largest(gradient)
        max_over_ranks(amax, nodes.group)
        inverse = fp8_sum.inverse_scales(amax, self._autoscale.of(list(gradients)), self._format)
        return dict(zip(gradients, inverse, strict=True))

    def _own_scales(self, bucket: Bucket, rank: int, inverse: Mapping[int, Tensor]) -> Tensor:
        """Scales of this rank's rows, [blocks] float32."""
        scales = torch.ones(bucket.blocks_of(rank), dtype=torch.float32, device=self._device)
        for piece in bucket.pieces(rank):
            scales[piece.rows] = 1 / inverse[piece.slot.parameter]
        return scales


def _in_ring_order(transfer: AllToAll, message: Message, rank: int, scales: Tensor) -> Hops:
    """From the rank after this one on; this rank's own come last. scales: of the rows that it owns."""
    arrived = yield from one_hop(transfer, message)
    messages = [Blocks(each.codes, scales, each.format) for each in arrived]
    return [*messages[rank + 1 :], *messages[: rank + 1]]


class FP8Sum:
    """In FP8, one tensor at a time; counts what reaches the largest code."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self._pieces = pieces
        self._saturated = torch.zeros(len(pieces), dtype=torch.float64, device=device)
        self._exchanges = 0

    def add(self, arrived: Sequence[Blocks], gradient: Blocks, *, overwrite: bool) -> Tensor:
        for number, piece in enumerate(self._pieces):
            tensors = [each[piece.rows] for each in arrived]
            total = replace(tensors[0], codes=torch.empty_like(tensors[0].codes))
            self._saturated[number] += fp8_sum.ring_sum(tensors, total)
            _store(total, gradient[piece.rows], overwrite=overwrite)
        self._exchanges += 1
        return norm_parts(gradient)

    def settle(self) -> None:
        pass

    def forget(self) -> None:
        self._saturated = torch.zeros_like(self._saturated)
        self._exchanges = 0

    @property
    def saturated(self) -> Iterator[tuple[int, Tensor]]:
        """How many values of each parameter's sum were at the largest code, in the mean of the exchanges."""
        for piece, count in zip(self._pieces, self._saturated, strict=True):
            yield piece.slot.parameter, count / max(self._exchanges, 1)


def _store(total: Blocks, gradient: Blocks, *, overwrite: bool) -> None:
    """The sum as it is, if nothing was there before and the formats are the same."""
    if not overwrite:
        store_rows(decode(gradient) + decode(total), gradient)
    elif gradient.format is total.format:
        gradient.copy_(total)
    else:
        store_rows(decode(total), gradient)
