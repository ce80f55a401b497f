"""What the sweep, the gather and checkpoints need of a bucket's weights, whatever parameters are made of.

In a step the sweep writes a rank's rows into `room`, and the gather brings what they have become to all ranks
while the next bucket is swept. Between steps a load, `bind` (values brought back) and
safe_set_full_fp32_param write them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Piece
from ds_fp8.zero_fp8.weights.home import Home


class Gather(Protocol):
    """Weights on their way."""

    def advance(self) -> None:
        """Start the second hop, if there is one."""

    def land(self) -> None:
        """Wait until parameters have them."""


class Weights(Protocol):
    """The weights of one bucket."""

    @property
    def saved_with_states(self) -> bool:
        """Whether split masters' upper halves are saved beside them, as no model file has whole weights."""

    def leads(self, index: int) -> bool:
        """Whether a parameter, by global index, can say anything new to its master.

        Not if it is codes that were made of the master, which knows more.
        """

    @property
    def room(self) -> Tensor:
        """Where this rank writes its rows, [blocks, block size] of the model's dtype; a gather follows.

        Beside split masters it holds their upper halves.
        """

    @property
    def own(self) -> Tensor:
        """The rows that this rank owns, with their values; to be read before another bucket's."""

    @property
    def homes(self) -> Sequence[Home]:
        """Where the bucket's parameters belong."""

    def gather(self, nodes: Nodes, control: Tensor | None) -> Gather:
        """Launch what brings every rank's rows to all.

        control: the sweep's, which may have left `room` as it was; None: every row was written.
        """

    def given(self, piece: Piece) -> Tensor:
        """Where new values of what this rank owns of a parameter go, [elements]; its master follows."""

    def write(self, index: int, parameter: Parameter, values: Tensor) -> None:
        """Write what there is of a parameter, whose owned rows are written; every rank gives the same.

        index: global. values: all elements, [n] of the parameter's dtype.
        """

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

    def launch(self, weights: Weights, nodes: Nodes, control: Tensor | None = None) -> None:
        """Send a bucket's rows off; the bucket before it moves on. control: as `Weights.gather` takes it."""
        for earlier in self._under_way[-1:]:
            earlier.advance()
        self._under_way.append(weights.gather(nodes, control))

    def wait(self) -> None:
        """Bring every rank's rows to the parameters."""
        while self._under_way:
            self._under_way.pop(0).land()
