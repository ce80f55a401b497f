"""What `TiledWeights` needs from the storage of codes, whole on every rank or as slices."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Piece, Slot
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.weights.store import Gather


class CodeHome(Protocol):
    """The `Home` of a matrix."""

    @property
    def parameter(self) -> int: ...

    @property
    def address(self) -> int: ...

    @property
    def matrix(self) -> Matrix: ...

    def objection(self, parameter: Parameter) -> str | None: ...

    def address_of(self, parameter: Parameter) -> int: ...


class CodeMemory:
    """The memory of a bucket's codes: bytes, and views of them, which stay valid."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.bytes = torch.empty(shape, dtype=torch.uint8, device=device)

    @property
    def freed(self) -> bool:
        """Whether it was freed, by `release` or by `untyped_storage().resize_(0)` on a view."""
        return self.bytes.untyped_storage().nbytes() < self.bytes.nbytes

    def release(self) -> None:
        """Free the memory until `allocate` is called."""
        self.bytes.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Allocate memory, filled with zeros."""
        self.bytes.untyped_storage().resize_(self.bytes.nbytes)
        self.bytes.zero_()


class CodeStore(Protocol):
    """Storage for the codes of one bucket's matrices."""

    @property
    def memory(self) -> CodeMemory:
        """The memory of what this rank holds."""

    @property
    def saved_with_states(self) -> bool:
        """As in `Weights`."""

    def codes_of(self, slot: Slot) -> Tensor:
        """Return the codes for a new matrix, [rows, columns] E4M3."""

    def home(self, slot: Slot, matrix: Matrix) -> CodeHome: ...

    def part(self, piece: Piece, home: Any) -> Tensor:
        """Return the codes that this rank owns, [elements] E4M3."""

    def values(self, piece: Piece, home: Any) -> Tensor:
        """Return the values that this rank owns, as the parameter has them, [elements] bfloat16."""

    def gather(self, nodes: Nodes) -> Gather:
        """Launch the gather that brings every rank's codes to all."""

    def show(self, home: Any) -> None:
        """Make the parameter read codes from now on."""

    def store(self, home: Any, values: Tensor) -> None:
        """Encode values of a whole parameter, the same on every rank."""

    def returned(self, home: Any, own: Sequence[Piece]) -> list[Tensor] | None:
        """Encode values that the parameter was given since, and return this rank's, [elements] each.

        Returns None if it was given none.
        """
