"""One bucket's gradients on their way to the ranks that own them, in one hop or two.

Between nodes a byte costs several times what it costs inside one. With two hops the ranks of a node add up
first what they send to another node, and one message crosses where as many crossed as the node has ranks.
The price is a second rounding.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.comm.collectives import Transfer, UnevenTransfer
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.messages import Message


class Exchange(Protocol):
    """A bucket's messages, launched."""

    def advance(self) -> None:
        """Start what follows on what is under way."""

    def land(self) -> Sequence[Blocks]:
        """Wait for the last hop: what there is to add, in this order."""

    def abandon(self) -> None:
        """Wait for what has been launched, and launch nothing more."""


class UnevenExchange:
    """Messages as long as the tensors of their owners; one hop."""

    def __init__(self, buffer: Tensor, messages: Sequence[Message], nodes: Nodes) -> None:
        """buffer: uint8, the messages for all ranks side by side."""
        self._own = messages[nodes.place]  # as every rank sends it to this one
        self._transfer = UnevenTransfer(
            buffer, [each.nbytes for each in messages], nodes.place, nodes.everybody
        )

    def advance(self) -> None:
        pass

    def land(self) -> Sequence[Blocks]:
        return [self._own.blocks_of(each) for each in self._transfer.wait()]

    def abandon(self) -> None:
        self._transfer.wait()


class RingExchange(UnevenExchange):
    """Codes that all ranks have scaled alike; they land in the order in which a ring of ranks adds them."""

    def __init__(self, buffer: Tensor, messages: Sequence[Message], nodes: Nodes, scales: Tensor) -> None:
        """scales: of the rows that this rank owns, [blocks] float32."""
        super().__init__(buffer, messages, nodes)
        self._first, self._scales = nodes.place + 1, scales

    def land(self) -> Sequence[Blocks]:
        """From the rank after this one on; this rank's own come last."""
        pieces = [Blocks(each.codes, self._scales, each.format) for each in super().land()]
        return [*pieces[self._first :], *pieces[: self._first]]


class EvenExchange:
    """Messages of one length, in one hop or two.

    1. Inside the node: the rank at place p receives what is for the owners at place p of all nodes.
    2. It adds the messages for one owner in FP32, in rank order, and rounds the sum for the second hop.
    3. Between nodes: the ranks at place p send each other the sums.
    4. The owner adds what has arrived, in rank order.
    With one node 2 and 3 fall away, and 4 adds the ranks' own messages.
    """

    def __init__(
        self, messages: Tensor, message: Message, between_nodes: Format, nodes: Nodes, backend: Backend
    ) -> None:
        """messages: [ranks, nbytes] uint8, one for each of `nodes.owners`."""
        self._message = message
        self._second_hop = (replace(message, format=between_nodes), nodes.across) if nodes.across else None
        self._nodes = nodes
        self._backend = backend
        self._transfer = Transfer(messages.view(nodes.size, nodes.count, -1), nodes.inside)

    def advance(self) -> None:
        """Start the second hop, where the first is still under way."""
        if self._second_hop is not None:
            (second, across), self._second_hop = self._second_hop, None
            self._transfer = Transfer(self._add(second), across)
            self._message = second

    def land(self) -> Sequence[Blocks]:
        """Wait for the last hop: what there is to add, in this order."""
        self.advance()
        return [self._message.blocks_of(each) for each in self._transfer.wait().flatten(0, 1)]

    def abandon(self) -> None:
        """Wait for what has been launched, and launch nothing more."""
        self._transfer.wait()

    def _add(self, second: Message) -> Tensor:
        """The node's sum for the owner in each node, [nodes, 1, nbytes] uint8."""
        received = self._transfer.wait()
        sums = second.buffer(self._nodes.count, received.device)
        for node in range(self._nodes.count):
            pieces = [self._message.blocks_of(each) for each in received[:, node]]
            self._backend.accumulate(pieces, second.blocks_of(sums[node]), overwrite=True)
        return sums[:, None]
