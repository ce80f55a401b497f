"""Process groups: the ranks of a fleet, and the nodes among them."""

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup

from ds_fp8.zero_fp8.placement.ranks import NodeLayout


class Nodes:
    """A fleet's ranks in nodes, and who talks to whom."""

    def __init__(self, group: ProcessGroup, node_size: int = 1, *, apart: bool = False) -> None:
        """Collective: every rank of the world makes the same groups.

        node_size: a divisor of the ranks. apart: in a group of its own, of the ranks of `group`.
        """
        self._apart = apart
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
        """Give up the groups that were made."""
        if self.across is not None:
            dist.destroy_process_group(self.inside)
            dist.destroy_process_group(self.across)
            self.across = None
        if self._apart:
            self._apart = False
            dist.destroy_process_group(self.group)
