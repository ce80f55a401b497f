"""Process groups: the ranks that share a bucket, and the nodes among them."""

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup


class Nodes:
    """The ranks as nodes of consecutive ranks, and who talks to whom.

    Rank `node * size + place` has `place` in its node. With nodes of one rank, or one node, there is nothing
    to gain from a second hop: then all ranks count as one node.
    """

    def __init__(self, group: ProcessGroup, size: int = 1) -> None:
        """Collective: every rank of the world makes the same groups. `size` divides the group's ranks."""
        ranks = dist.get_world_size(group)
        assert ranks % size == 0
        self.everybody = group
        self.size = ranks if size == 1 else size
        self.count = ranks // self.size
        self.node, self.place = divmod(dist.get_rank(group), self.size)
        self.inside = group  # the ranks of this node
        self.across: ProcessGroup | None = None  # the ranks with this place in all nodes; None: one node
        if self.count > 1:
            world = torch.tensor(torch.distributed.get_process_group_ranks(group)).view(self.count, self.size)
            self.inside = [dist.new_group(each) for each in world.tolist()][self.node]
            self.across = [dist.new_group(each) for each in world.T.tolist()][self.place]

    @property
    def owners(self) -> list[int]:
        """All ranks by place, then by node: the order in which messages lie when they leave."""
        return [node * self.size + place for place in range(self.size) for node in range(self.count)]

    def close(self) -> None:
        """Give up the groups that were made."""
        if self.across is not None:
            dist.destroy_process_group(self.inside)
            dist.destroy_process_group(self.across)
            self.across = None
