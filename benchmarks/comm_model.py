"""Bytes and time of an exchange of gradients, by formula: what a rank sends, over which links, in what time.

A node has `node_size` ranks; each rank has a link to its node and one out of it. A message of n bytes takes
latency + n / bandwidth of its link; messages on a link follow one another, and the two links work at the same
time. In two hops the second begins when the first has ended. An all-reduce is assumed to send as little as a
ring and to wait as few times as a tree, up and down: better than either.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

BF16, FP32 = 2.0, 4.0
FP8 = 1 + 1 / 128  # with its scale


@dataclass(frozen=True)
class Cluster:
    """Ranks in nodes; seconds and bytes per second of a rank's links, elements per second of its kernels."""

    ranks: int
    node_size: int = 8
    intra_latency: float = 3e-6
    intra_bandwidth: float = 300e9
    inter_latency: float = 10e-6
    inter_bandwidth: float = 40e9
    quantize_rate: float = 1.36e12
    sum_rate: float = 2.6e12

    @property
    def node(self) -> int:
        """Ranks of a node that take part."""
        return min(self.node_size, self.ranks)

    @property
    def nodes(self) -> int:
        return self.ranks // self.node


@dataclass(frozen=True)
class Hop:
    """Bytes per element that a rank sends over each link, messages it waits for, elements it sums."""

    intra: float
    inter: float
    intra_messages: float
    inter_messages: float
    summed: float = 0.0  # per element of the bucket

    def seconds(self, cluster: Cluster, elements: float) -> float:
        inside = self.intra_messages * cluster.intra_latency + self.intra * elements / cluster.intra_bandwidth
        out = self.inter_messages * cluster.inter_latency + self.inter * elements / cluster.inter_bandwidth
        return max(inside, out) + self.summed * elements / cluster.sum_rate


@dataclass(frozen=True)
class Exchange:
    """The exchange of a bucket's gradients."""

    hops: tuple[Hop, ...]
    quantized: bool

    @property
    def sent(self) -> float:
        """Bytes per element that a rank sends."""
        return sum(hop.intra + hop.inter for hop in self.hops)

    @property
    def crossed(self) -> float:
        """Bytes per element that leave the node."""
        return sum(hop.inter for hop in self.hops)

    def seconds(self, cluster: Cluster, elements: float) -> float:
        quantize = elements / cluster.quantize_rate if self.quantized else 0.0
        return quantize + sum(hop.seconds(cluster, elements) for hop in self.hops)


def ring(cluster: Cluster, width: float, *, ways: int) -> Exchange:
    """ways: 2 for an all-reduce, 1 for a reduce-scatter or a reduce to owners."""
    sent = ways * width * (cluster.ranks - 1) / cluster.ranks
    leaves = 1 / cluster.node if cluster.nodes > 1 else 0.0  # share of a ring's links, one per node
    waits = [ways * math.log2(cluster.node), ways * math.log2(cluster.nodes)]
    return Exchange((Hop(sent * (1 - leaves), sent * leaves, *waits),), quantized=False)


def all_to_all(cluster: Cluster, width: float) -> Exchange:
    """One hop: a message to every rank."""
    ranks, node = cluster.ranks, cluster.node
    share = width / ranks
    hop = Hop(share * (node - 1), share * (ranks - node), node - 1, ranks - node, summed=1.0)
    return Exchange((hop,), quantized=True)


def two_hops(cluster: Cluster, inside: float, between: float) -> Exchange:
    """All-to-all in the node, sum, all-to-all between nodes; one hop if there is one node."""
    node, nodes = cluster.node, cluster.nodes
    if node == 1 or nodes == 1:
        return all_to_all(cluster, inside)
    first = Hop(inside * (node - 1) / node, 0.0, node - 1, 0, summed=1.0)
    second = Hop(0.0, between * (nodes - 1) / nodes / node, 0, nodes - 1, summed=1 / node)
    return Exchange((first, second), quantized=True)


def all_gather(cluster: Cluster, width: float, *, hops: int) -> tuple[float, float]:
    """Bytes per element that a rank sends, and those that leave the node, to gather weights in pairs."""
    ranks, node, nodes = cluster.ranks, cluster.node, cluster.nodes
    sent, crossed = ranks - 1, ranks - node
    if hops == 2 and 1 < node < ranks:
        sent, crossed = (nodes - 1) + nodes * (node - 1), nodes - 1
    return width * sent / ranks, width * crossed / ranks


Way = Callable[[Cluster], Exchange]
WAYS: dict[str, Way] = {
    "FP32 all-reduce": lambda cluster: ring(cluster, FP32, ways=2),
    "BF16 all-reduce": lambda cluster: ring(cluster, BF16, ways=2),
    "BF16 reduce": lambda cluster: ring(cluster, BF16, ways=1),
    "FP8 one hop": lambda cluster: all_to_all(cluster, FP8),
    "FP8 two hops": lambda cluster: two_hops(cluster, FP8, FP8),
    "FP8 two hops, BF16 between": lambda cluster: two_hops(cluster, FP8, BF16),
}
OURS = ("FP8 one hop", "FP8 two hops", "FP8 two hops, BF16 between")
STOCK = ("BF16 all-reduce", "BF16 reduce")


def fastest(names: tuple[str, ...], cluster: Cluster, elements: float) -> tuple[str, float]:
    """Return the fastest of these ways, and its seconds."""
    times = {name: WAYS[name](cluster).seconds(cluster, elements) for name in names}
    name = min(times, key=lambda each: times[each])
    return name, times[name]


def fp8_wins_from(cluster: Cluster, stock: tuple[str, ...]) -> int | None:
    """Return the size of the smallest bucket, a power of two up to 2^32, from which FP8 is always faster."""
    first = None
    for exponent in range(32, 9, -1):
        if fastest(OURS, cluster, 2.0**exponent)[1] >= fastest(stock, cluster, 2.0**exponent)[1]:
            break
        first = 2**exponent
    return first
