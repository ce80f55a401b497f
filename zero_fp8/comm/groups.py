"""Process groups: all ranks of a run, the ranks of a fleet, and the nodes among them."""

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup

from ds_fp8.zero_fp8.placement.ranks import Grid, NodeLayout


class Ranks:
    """All ranks of a run: those that hold the same part of the model, and peers with the other parts.

    With model parallelism the ranks are a grid: `group` has one of every replica of the model, `peers` those
    of one replica. What goes over both, one after the other, goes over all ranks. Their order is that of the
    parts (ranks in `peers`), and within a part that of `group`.
    """

    def __init__(self, group: ProcessGroup, peers: ProcessGroup | None = None) -> None:
        """Collective if there are peers. None: every rank holds the whole model."""
        self.group = group
        self.groups = (group,) if peers is None else (group, peers)
        self.peers = peers
        self.part = 0 if peers is None else dist.get_rank(peers)
        self.parts = 1 if peers is None else dist.get_world_size(peers)
        grid = Grid(self.parts, dist.get_world_size(group))
        self.rank, self.size = grid.rank_of(self.part, dist.get_rank(group)), grid.size
        self.numbers = torch.distributed.get_process_group_ranks(group)  # in the world, in order
        if peers is not None:
            by_part: list[list[int]] = [[] for _ in range(self.parts)]
            torch.distributed.all_gather_object(by_part, self.numbers, group=peers)
            self.numbers = [number for numbers in by_part for number in numbers]


def groups_of(ranks: ProcessGroup | Ranks) -> tuple[ProcessGroup, ...]:
    """The groups over which something goes, one after the other, to reach all ranks."""
    return ranks.groups if isinstance(ranks, Ranks) else (ranks,)


class Nodes:
    """A fleet's ranks in nodes, with the process groups of both hops."""

    def __init__(
        self,
        group: ProcessGroup,
        node_size: int = 1,
        *,
        apart: bool = False,
        all_ranks: Ranks | None = None,
    ) -> None:
        """Collective: every rank of the world makes the same groups.

        node_size: a divisor of the ranks. apart: in a group of its own, of the ranks of `group`.
        all_ranks: of the run; None: those of the fleet.
        """
        self.all_ranks = all_ranks or Ranks(group)
        self._given, self._apart = group, apart
        if apart:
            group = dist.new_group(torch.distributed.get_process_group_ranks(group))
        self.group = group  # all ranks of the fleet
        self.rank: int = dist.get_rank(group)
        self.layout = NodeLayout.of(dist.get_world_size(group), node_size)
        self.node, self.place = self.layout.where(self.rank)
        self.inside = group  # the ranks of this node
        self.across: ProcessGroup | None = None  # the ranks with this place in all nodes; None: one node
        if self.layout.count > 1:
            ranks = torch.tensor(torch.distributed.get_process_group_ranks(group))
            world = ranks.view(self.layout.count, self.layout.size)
            self.inside = [dist.new_group(each) for each in world.tolist()][self.node]
            self.across = [dist.new_group(each) for each in world.T.tolist()][self.place]

    def close(self) -> None:
        """Give up the groups that were made: their threads end when nothing refers to them."""
        if self.across is not None:
            dist.destroy_process_group(self.inside)
            dist.destroy_process_group(self.across)
            self.across = None
        if self._apart:
            self._apart = False
            dist.destroy_process_group(self.group)
        self.inside = self.group = self._given
