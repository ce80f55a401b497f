"""The parts of a run, as `wiring` has built them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ds_fp8.ops.backend import Backend
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.gradients.autoscale import GradientScales
from ds_fp8.zero_fp8.gradients.packing import Packer
from ds_fp8.zero_fp8.gradients.reduced import ReducedGradient
from ds_fp8.zero_fp8.gradients.reducer import GradientReducer
from ds_fp8.zero_fp8.health import Health
from ds_fp8.zero_fp8.offload.place import Offloaded
from ds_fp8.zero_fp8.placement.partition import Bucket
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.states.residence import Residence
from ds_fp8.zero_fp8.states.shard import Shard
from ds_fp8.zero_fp8.weights.frozen import FrozenWeights
from ds_fp8.zero_fp8.weights.sliced.frozen import FrozenSlices
from ds_fp8.zero_fp8.weights.store import Weights
from ds_fp8.zero_fp8.weights.tiled import Products


@dataclass(frozen=True)
class Parts:
    """The parts of a run. Of each bucket there is one of `weights`, `reduced` and `shards`."""

    buckets: Sequence[Bucket]
    fleets: Mapping[Fleet, Nodes]
    weights: Sequence[Weights]
    reduced: list[ReducedGradient]
    counted: Sequence[bool]  # per bucket: whether this rank counts it, or a model-parallel peer
    shards: list[Shard]
    packer: Packer
    reducer: GradientReducer
    gradient_scales: GradientScales
    health: Health
    backend: Backend
    offloaded: Offloaded  # where states live, unless they are moved
    listens: bool  # gradients travel while backward runs
    divisor: int  # by which the sum of the ranks' gradients is divided
    frozen: FrozenWeights | FrozenSlices  # those that are codes
    products: Products | None = None  # of FP8 matrices, if there are any

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's states and reduced gradients."""
        return sum(each.nbytes for each in self.reduced) + sum(each.nbytes for each in self.shards)

    @property
    def residence(self) -> Residence:
        """Where the states live, unless they are moved."""
        return self.offloaded.residence

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory that this rank's states and reduced gradients take."""
        gradients = sum(each.nbytes for each in self.reduced) if self.offloaded.landing else 0
        return gradients + sum(each.host_nbytes for each in self.shards)

    def close(self) -> None:
        """Give up states, reduced gradients and process groups."""
        self.shards.clear()
        self.reduced.clear()
        self.offloaded.close()
        for nodes in self.fleets.values():
            nodes.close()

    def nodes_of(self, bucket: Bucket) -> Nodes:
        return self.fleets[bucket.fleet]

    def by_bucket(self) -> Iterator[tuple[Bucket, ReducedGradient, Shard, Weights]]:
        """The parts of one bucket."""
        return zip(self.buckets, self.reduced, self.shards, self.weights, strict=True)
