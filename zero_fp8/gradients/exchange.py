"""One bucket's gradients on their way to the ranks that own them, in one hop or two.

A byte between nodes costs several times a byte inside one. With two hops the ranks of a node first add up
what they send to another node, and one message crosses instead of one per rank of the node.
The price is a second rounding.

An exchange is a generator that yields what travels where backward goes on: once when its first hop has been
launched, once when its last one has. What it returns is to be added, in this order.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.comm.collectives import AllToAll
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.messages import Message

Hops = Generator[AllToAll, None, Sequence[Blocks]]


def blocks_in(buffer: Tensor, message: Message) -> Blocks:
    """A message, [nbytes] uint8, seen as blocks."""
    codes = buffer[: message.code_bytes].view(message.format.dtype).view(message.blocks, message.block_size)
    scales = buffer[message.code_bytes :][: message.blocks] if message.scaled else None
    return Blocks(codes, scales, message.format)


def one_hop(transfer: AllToAll, message: Message) -> Hops:
    """Every rank receives what is for it from every rank, in rank order. message: of what it owns."""
    with transfer:
        yield transfer
        yield transfer
        return [blocks_in(each, message) for each in transfer.wait()]


def two_hops(first: AllToAll, message: Message, between: Format, nodes: Nodes, backend: Backend) -> Hops:
    """Messages of one length, by way of the node.

    1. Inside the node: the rank at place p receives what is for the owners at place p of all nodes.
    2. It adds the messages for one owner in FP32, in rank order, and rounds the sum to `between`.
    3. Between nodes: the ranks at place p send each other the sums.
    4. The owner adds what has arrived, in rank order.
    """
    assert nodes.across is not None
    second = replace(message, format=between)
    with first:
        yield first
        sums = _sums(first.wait(), message, second, backend)
    with AllToAll(sums, nodes.across) as last:
        del sums
        yield last
        return [blocks_in(each, second) for each in last.wait().flatten(0, 1)]


def _sums(received: Tensor, message: Message, second: Message, backend: Backend) -> Tensor:
    """The node's sum for the owner in each node, [nodes, 1, bytes] uint8; received: [ranks, nodes, bytes]."""
    sums = torch.empty(received.shape[1], second.nbytes, dtype=torch.uint8, device=received.device)
    for node, total in enumerate(sums):
        messages = [blocks_in(each, message) for each in received[:, node]]
        backend.accumulate(messages, blocks_in(total, second), overwrite=True)
    return sums[:, None]


class Exchange:
    """An exchange whose hops have been launched."""

    def __init__(self, hops: Hops) -> None:
        """The first hop has been launched."""
        self._hops = hops
        self._first_only = True
        self._transfer = next(hops)

    def advance(self) -> None:
        """Launch the second hop, if there is one and it has not been launched."""
        if self._first_only:
            self._first_only = False
            self._transfer = next(self._hops)

    def progress(self) -> bool:
        """Launch the second hop if the first has come; whether it has been launched, now or before."""
        if self._first_only and self._transfer.done:
            self.advance()
        return not self._first_only

    @property
    def done(self) -> bool:
        """Whether `land` would return at once."""
        return not self._first_only and self._transfer.done

    def land(self) -> Sequence[Blocks]:
        """Wait for the last hop: what there is to add, in this order."""
        self.advance()
        try:
            next(self._hops)
        except StopIteration as arrived:
            return arrived.value  # type: ignore[no-any-return]
        raise AssertionError("an exchange has two hops at most")

    def abandon(self) -> None:
        """Wait for what has been launched, and launch nothing more."""
        self._hops.close()


# Takes a buffer, the messages that lie in it, in the order of `NodeLayout.owners`, and who they are for.
Launch = Callable[[Tensor, Sequence[Message], Nodes], Exchange]


def launch_uneven(buffer: Tensor, messages: Sequence[Message], nodes: Nodes) -> Exchange:
    """Messages as long as what their owners have, in one hop."""
    transfer = AllToAll(buffer, nodes.group, [each.nbytes for each in messages])
    return Exchange(one_hop(transfer, messages[nodes.rank]))


def launch_even(between: Format, backend: Backend) -> Launch:
    """Messages of one length, in two hops if there are several nodes. between: format of the second hop."""

    def launch(buffer: Tensor, messages: Sequence[Message], nodes: Nodes) -> Exchange:
        layout, message = nodes.layout, messages[0]
        if nodes.across is None:
            return Exchange(one_hop(AllToAll(buffer.view(layout.size, -1), nodes.group), message))
        first = AllToAll(buffer.view(layout.size, layout.count, -1), nodes.inside)
        return Exchange(two_hops(first, message, between, nodes, backend))

    return launch
