"""Which ranks hold the same copy of a parameter, and how they lie in nodes. Integers only."""

from dataclasses import dataclass

from ds_fp8.config.refusals import refusal


@dataclass(frozen=True)
class Fleet:
    """The ranks that hold the same copy of a parameter and share its states."""

    name: str  # distinguishes fleets of one size
    size: int  # ranks

    def mean_factor(self) -> float:
        """The factor from a sum over the ranks to their mean."""
        return 1.0 / self.size

    def sequences(self, ranks_per_sequence: int) -> int:
        """How many sequences the ranks process at a time."""
        return self.size // ranks_per_sequence


@dataclass(frozen=True)
class Grid:
    """Ranks of model parallelism and of data parallelism, in order: part after part."""

    parts: int  # ranks that hold parts of one replica of the model
    replicas: int

    @property
    def size(self) -> int:
        return self.parts * self.replicas

    def rank_of(self, part: int, replica: int) -> int:
        return part * self.replicas + replica


def turn_of(index: int, ranks: int) -> int:
    """The rank that does the work of an index if ranks take turns."""
    return index % ranks


@dataclass(frozen=True)
class NodeLayout:
    """A fleet's ranks as nodes of consecutive ranks: rank `node * size + place` has `place` in its node."""

    size: int  # ranks per node
    count: int  # nodes

    @staticmethod
    def of(ranks: int, node_size: int) -> "NodeLayout":
        """Nodes of `node_size` ranks, which divides `ranks`.

        With nodes of one rank, or one node, there is nothing to gain from a second hop: then all ranks count
        as one node.
        """
        assert ranks % node_size == 0
        size = ranks if node_size == 1 else node_size
        return NodeLayout(size, ranks // size)

    @property
    def owners(self) -> list[int]:
        """All ranks by place, then by node: the order in which messages lie when they leave."""
        return [node * self.size + place for place in range(self.size) for node in range(self.count)]

    @property
    def messages(self) -> int:
        """Number of messages that reach an owner on the last hop."""
        return self.count if self.count > 1 else self.size

    def where(self, rank: int) -> tuple[int, int]:
        """A rank's node, and its place in it."""
        return divmod(rank, self.size)


NODE_SIZE = "fp8.gradients.intra_node_size"
SEQUENCE_SIZE = "sequence_parallel_size"
AUTOTP_SIZE = "tensor_parallel.autotp_size"


def check_divides(key: str, size: int, ranks: int) -> None:
    """Refuse, by a ValueError, nodes or sequences that the ranks do not fill. key: that has the size."""
    if ranks % size:
        divisors = ", ".join(str(each) for each in range(1, ranks + 1) if ranks % each == 0)
        allowed = f"divisors of the world size {ranks}: {divisors}"
        raise refusal(key, size, allowed)
