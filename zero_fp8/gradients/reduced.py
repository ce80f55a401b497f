"""The reduced gradient: one rank's blocks of a bucket, added up over ranks and rounds since the last step.

It lives on the device or, if the host sweeps, in host memory; then `Sum` brings there what has arrived.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks, chunks, decode, encode
from ds_fp8.ops.formats import FP32
from ds_fp8.ops.reduction import NORM_PARTS, norm_parts
from ds_fp8.zero_fp8.placement.partition import Piece


class Sum(Protocol):
    """How arriving messages are added to the reduced gradient."""

    def add(
        self, arrived: Sequence[Blocks], gradient: Blocks, *, overwrite: bool
    ) -> "Tensor | Future[Tensor]":
        """Add one exchange's messages, in the order given, to the gradient, or in its place.

        Returns the norm's parts of the result, as `ops.reduction.norm_parts` gives them, on the device.
        """

    def forget(self) -> None:
        """Called when the gradient is dropped."""

    def settle(self) -> None:
        """Wait until what has been added is in the gradient, as far as the host has a part in it."""


class BlockSum:
    """In FP32, one scale per block."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def add(self, arrived: Sequence[Blocks], gradient: Blocks, *, overwrite: bool) -> Tensor:
        return self._backend.accumulate(arrived, gradient, overwrite=overwrite)

    def forget(self) -> None:
        pass

    def settle(self) -> None:
        pass


class TensorSum:
    """In FP32, one scale per tensor: one tensor at a time."""

    def __init__(self, backend: Backend, pieces: Sequence[Piece]) -> None:
        self._backend, self._pieces = backend, pieces

    def add(self, arrived: Sequence[Blocks], gradient: Blocks, *, overwrite: bool) -> Tensor:
        parts = torch.zeros(NORM_PARTS, dtype=torch.int64, device=gradient.codes.device)
        for piece in self._pieces:
            tensors = [each[piece.rows] for each in arrived]
            parts += self._backend.accumulate(tensors, gradient[piece.rows], overwrite=overwrite)
        return parts

    def forget(self) -> None:
        pass

    def settle(self) -> None:
        pass


class ReducedGradient:
    """The owner's sum of a bucket's gradients, until a step takes it or it is dropped."""

    def __init__(
        self, blocks: Blocks, total: Sum, backend: Backend, device: torch.device, *, promotes: bool
    ) -> None:
        """blocks: room for it; backend: for where that is; device: of the run.

        promotes: it turns FP32 before a second arrival.
        """
        self._blocks = blocks
        self._sum = total
        self._backend = backend
        self._device = device
        self._promotes = promotes
        self.forget()

    @property
    def blocks(self) -> Blocks:
        """The sum of what has arrived."""
        self._sum.settle()
        return self._blocks

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    def forget(self) -> None:
        """Let the next arrival replace what has been reduced."""
        self._arrivals = 0  # exchanges since the last step
        self._sum.forget()
        self._norm_parts: Tensor | Future[Tensor] | None = None

    @property
    def norm_parts(self) -> Tensor | None:
        """`ops.reduction.norm_parts`, on the device; None: nothing arrived."""
        found = self._norm_parts
        return found.result() if isinstance(found, Future) else found

    @property
    def must_promote(self) -> bool:
        """Whether the next arrival would be rounded into a format that the config did not ask for."""
        return self._promotes and self._arrivals > 0 and self._blocks.format is not FP32

    def promote(self) -> None:
        """Turn FP32, keeping the values."""
        narrow = self.blocks
        wide = Blocks.zeros(len(narrow), narrow.block_size, FP32, narrow.codes.device)
        for part in chunks(len(wide), wide.block_size):
            encode(decode(narrow[part]), wide[part])
        self._blocks = wide

    def receive(self, arrived: Sequence[Blocks]) -> None:
        """Add one exchange's messages, in the order given."""
        self._norm_parts = self._sum.add(arrived, self._blocks, overwrite=self._arrivals == 0)
        self._arrivals += 1

    def set(self, values: Tensor, rows: slice) -> None:
        """Round a vector into rows."""
        blocks = self.blocks
        self._backend.quantize(values.to(blocks.codes.device), blocks[rows])
        self._norm_parts = norm_parts(blocks).to(self._device)
