"""What the sweep, the gather and checkpoints need of a bucket's weights, whatever parameters are made of.

In a step the sweep writes a rank's own rows and the gather brings the others', while the next bucket is
swept. Between steps a load, `bind` (values brought back) and safe_set_full_fp32_param write them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.comm.collectives import AllGather, Broadcasts, NothingToGather
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.weights.home import Home

Gather = AllGather | Broadcasts | NothingToGather


class Weights(Protocol):
    """The weights of one bucket."""

    @property
    def saved_with_states(self) -> bool:
        """Whether split masters' upper halves are saved beside them, as no model file has whole weights."""

    @property
    def own(self) -> Tensor:
        """The rows that this rank writes, [blocks, block size] of the model's dtype."""

    @property
    def homes(self) -> Sequence[Home]:
        """Where the bucket's parameters belong."""

    def gather(self, nodes: Nodes) -> Gather:
        """Launch what brings every rank's rows to all."""

    def bind(self, parameters: Mapping[int, Parameter]) -> Iterator[int]:
        """Bring parameters back that have left, with their values; the global index of each."""

    @property
    def freed(self) -> bool:
        """Whether the memory was given back, by `untyped_storage().resize_(0)` on a parameter."""

    def allocate(self) -> None:
        """Have memory again, with nothing that is known in it."""


class Gathers:
    """Weights on their way to every rank: each bucket's are launched when its rows have been written."""

    def __init__(self) -> None:
        self._under_way: list[Gather] = []

    def launch(self, weights: Weights, nodes: Nodes) -> None:
        """Send a bucket's rows off; the bucket before it moves on."""
        for earlier in self._under_way[-1:]:
            earlier.advance()
        self._under_way.append(weights.gather(nodes))

    def wait(self) -> None:
        """Bring every rank's rows to the parameters."""
        while self._under_way:
            self._under_way.pop(0).land()
