"""The collectives: FP8 gradients to their owners, weights to all ranks, sums and maxima of small vectors.

Gradients go by all-to-alls of bytes, codes and scales of a destination side by side in one message. Not by
a reduce-scatter: that would add inside the collective, in FP8 and without scales. Float8 tensors are
never handed to a collective (gloo refuses them), their bytes are.

What is large travels while something else computes: it is launched here, and code that needs it waits for it.
On a GPU the stream waits, not the host.
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_fp8.zero_fp8.comm.groups import Nodes, Ranks, groups_of


class AllToAll:
    """An all-to-all that has been launched, and its buffers. A `with` that ends waits for it."""

    def __init__(self, messages: Tensor, group: ProcessGroup, sizes: Sequence[int] | None = None) -> None:
        """Launch it.

        messages: [ranks, bytes], row r for rank r; with sizes, flat: what goes to rank r has sizes[r] bytes.
        """
        self._sent = messages
        if sizes is None:
            self._received = torch.empty_like(messages)
            self._work = dist.all_to_all_single(self._received, messages, group=group, async_op=True)
        else:
            own = sizes[dist.get_rank(group)]
            self._received = messages.new_empty(len(sizes), own)
            self._work = dist.all_to_all_single(
                self._received.view(-1),
                messages,
                [own for _ in sizes],
                list(sizes),
                group=group,
                async_op=True,
            )

    @property
    def done(self) -> bool:
        """Whether the host would not be held up by `wait`; on a GPU the stream waits instead."""
        return self._work is None or self._received.is_cuda or bool(self._work.is_completed())

    def wait(self) -> Tensor:
        """Row r came from rank r. Once: the buffers are given up."""
        work, self._work = self._work, None
        work.wait()
        received = self._received
        keep_for_this_stream(self._sent, received)
        del self._sent, self._received
        return received

    def __enter__(self) -> "AllToAll":
        return self

    def __exit__(self, *_: object) -> None:
        if self._work is not None:
            self.wait()


class AllGather:
    """A flat buffer that is being filled with the even part of it that each rank has written.

    1. Ranks with the same place in their nodes gather their slices: each slice reaches a node once. They
       arrive side by side, and are copied to where they lie in the buffer, a node's slices apart.
    2. Each node gathers in place, a run of slices for every node.
    With one node only the second is left, as one gather of the whole buffer.
    """

    def __init__(self, buffer: Tensor, nodes: Nodes) -> None:
        self._nodes = nodes
        self._slices = buffer.view(nodes.layout.count, nodes.layout.size, -1)
        self._works: list[Any] = []
        self._column: Tensor | None = None  # the slices of this place, while they travel between nodes
        if nodes.across is None:
            self._gather_in_nodes()
        else:
            own = self._slices[nodes.node, nodes.place]
            self._column = own.new_empty(nodes.layout.count, own.numel())
            self._works = [gather_flat(self._column, own, nodes.across)]

    def advance(self) -> None:
        """Start the second step, where the first is still under way."""
        if self._column is not None:
            self._wait()
            self._slices[:, self._nodes.place] = self._column
            self._column = None
            self._gather_in_nodes()

    def land(self) -> None:
        """Wait until the buffer is filled."""
        self.advance()
        self._wait()

    def _gather_in_nodes(self) -> None:
        place, inside = self._nodes.place, self._nodes.inside
        self._works = [gather_flat(run, run[place], inside) for run in self._slices]

    def _wait(self) -> None:
        while self._works:
            self._works.pop(0).wait()


class Broadcasts:
    """A flat buffer whose uneven parts their owners broadcast: gloo has no uneven gather."""

    def __init__(self, parts: Sequence[Tensor], group: ProcessGroup) -> None:
        """parts: of the buffer, one for each rank."""
        self._works = [
            dist.broadcast(part, dist.get_global_rank(group, rank), group=group, async_op=True)
            for rank, part in enumerate(parts)
            if part.numel()
        ]

    def advance(self) -> None:
        """Do nothing: there is one step only."""

    def land(self) -> None:
        """Wait until the buffer is filled."""
        while self._works:
            self._works.pop(0).wait()


class NothingToGather:
    """No gather after a step: ZeRO 3 fetches weights when a module needs them."""

    def advance(self) -> None:
        """Do nothing."""

    def land(self) -> None:
        """Do nothing: nothing was launched."""


def keep_for_this_stream(*buffers: Tensor) -> None:
    """Reuse their memory, which may be another stream's, only when the current stream is done with it."""
    for each in buffers:
        if each.is_cuda:
            each.record_stream(torch.cuda.current_stream())


def exchange(sent: Sequence[Tensor], sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """The vectors that every rank has sent to this one, concatenated in rank order; waits for them.

    sent: a vector for each rank. sizes: elements of those that come.
    """
    received = sent[0].new_empty(sum(sizes))
    sent_sizes = [len(each) for each in sent]
    dist.all_to_all_single(received, torch.cat(list(sent)), list(sizes), sent_sizes, group=group)
    return received


def gather_flat(whole: Tensor, own: Tensor, group: ProcessGroup) -> Any:
    """Launch a gather of every rank's `own`, in rank order, into `whole`; what there is to wait for."""
    return dist.all_gather_into_tensor(whole.view(-1), own, group=group, async_op=True)


def sum_over_ranks(tensor: Tensor, ranks: ProcessGroup | Ranks) -> None:
    """Add a tensor over the ranks, in place."""
    for group in groups_of(ranks):
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)


def max_over_ranks(tensor: Tensor, ranks: ProcessGroup | Ranks) -> None:
    """Largest of each element over the ranks, in place."""
    for group in groups_of(ranks):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
