"""What the sweep, the gather and checkpoints need from a bucket's weights, whatever form parameters have.

In a step the sweep writes a rank's rows into `room`, and the gather brings the resulting weights to all ranks
while the next bucket is swept. Between steps the rows are written by a load, by `bind` (values brought back)
and by safe_set_full_fp32_param.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Piece
from ds_fp8.zero_fp8.weights.home import Home


class Gather(Protocol):
    """Weights on their way to all ranks."""

    def advance(self) -> None:
        """Start the second hop, if there is one."""

    def land(self) -> None:
        """Wait until the parameters have the weights."""


class Weights(Protocol):
    """The weights of one bucket."""

    @property
    def saved_with_states(self) -> bool:
        """Whether split masters' upper halves are saved with them, as no model file has whole weights."""

    def leads(self, index: int) -> bool:
        """Whether a master is to be taken from this parameter, by global index.

        False if the parameter is codes that were made from the master, which is more precise.
        """

    @property
    def room(self) -> Tensor:
        """The rows that this rank writes, [blocks, block size] of the model's dtype; a gather follows.

        With split masters they hold the masters' upper halves.
        """

    @property
    def own(self) -> Tensor:
        """The rows that this rank owns, with their values; read them before those of another bucket."""

    @property
    def homes(self) -> Sequence[Home]:
        """The homes of the bucket's parameters."""

    def gather(self, nodes: Nodes, control: Tensor | None) -> Gather:
        """Launch the gather that brings every rank's rows to all.

        control: the sweep's, which may have left `room` as it was; None: every row was written.
        """

    def given(self, piece: Piece) -> Tensor:
        """Return the memory for new values of this rank's part of a parameter, [elements]; masters follow."""

    def write(self, index: int, parameter: Parameter, values: Tensor) -> None:
        """Write the present copy of a parameter whose owned rows are written; the same on every rank.

        index: global. values: all elements, [n] of the parameter's dtype.
        """

    def bind(self, parameters: Mapping[int, Parameter]) -> Iterator[int]:
        """Bring back parameters that left their buffers, with their values; yield their global indices."""

    @property
    def freed(self) -> bool:
        """Whether the memory was freed, by `untyped_storage().resize_(0)` on a parameter."""

    def allocate(self) -> None:
        """Allocate memory again, uninitialised."""


class Gathers:
    """Gathers under way: each bucket's is launched once its rows have been written."""

    def __init__(self) -> None:
        self._under_way: list[Gather] = []

    def launch(self, weights: Weights, nodes: Nodes, control: Tensor | None = None) -> None:
        """Launch a bucket's gather and advance the previous bucket's. control: as in `Weights.gather`."""
        for earlier in self._under_way[-1:]:
            earlier.advance()
        self._under_way.append(weights.gather(nodes, control))

    def wait(self) -> None:
        """Wait until parameters have every rank's rows."""
        while self._under_way:
            self._under_way.pop(0).land()
