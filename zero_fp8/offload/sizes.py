"""Bytes of a run whose states live in host memory, both allocated and estimated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ds_fp8.ops.formats import FP32, Format
from ds_fp8.zero_fp8.placement.messages import Message
from ds_fp8.zero_fp8.placement.ranks import NodeLayout
from ds_fp8.zero_fp8.recipe import Offload, Recipe
from ds_fp8.zero_fp8.states.arena import aligned, room_of
from ds_fp8.zero_fp8.states.residence import arena_bytes, offloaded_rows, staging_bytes
from ds_fp8.zero_fp8.states.ring import BUFFERS as RING
from ds_fp8.zero_fp8.states.visits import chunk_rows

LANDING = 2  # buffers for gradients on their way down, on the device and on the host


@dataclass(frozen=True)
class Crossing:
    """Other data than states that is copied, in bytes and numbers of one rank, if the host sweeps."""

    rows: Sequence[int]  # of the rank's shards
    row_bytes: int  # of a row of weights
    nodes: NodeLayout
    several: bool  # whether a step has several exchanges, as far as the config says

    def device_buffer(self, recipe: Recipe) -> int:
        """Return the bytes of a buffer of reduced gradients on the device."""
        return Message(max(self.rows), recipe.block_size, recipe.reduced).nbytes

    def host_buffer(self, recipe: Recipe) -> int:
        """Return the bytes of a buffer of gradients that the host adds."""
        if not self.several:
            return 0
        arriving = recipe.between_nodes if self.nodes.count > 1 else recipe.wire
        message, total = (Message(max(self.rows), recipe.block_size, fmt) for fmt in (arriving, FP32))
        return min(self.nodes.messages * message.nbytes, total.nbytes)

    def landing_bytes(self, recipe: Recipe) -> int:
        """Return host bytes for the reduced gradient, terms added to it, and weights on their way up."""
        return (
            sum(room_of(each, recipe.block_size, recipe.reduced) for each in self.rows)
            + LANDING * aligned(self.host_buffer(recipe))
            + staging_bytes(self.rows, recipe.block_size, self.row_bytes)
        )


class Expected(NamedTuple):
    """Bytes of one rank whose states live in host memory."""

    host: int  # states in host memory
    landing: int  # other data in host memory, if the host sweeps
    resident: int  # states that stay on the device
    buffers: int  # buffers on the device
    gradient_on_device: bool  # the reduced gradient


def expected(recipe: Recipe, offload: Offload, crossing: Crossing) -> Expected:
    """Return the bytes that are allocated. executor auto counts as stream."""
    rows, size, formats = crossing.rows, recipe.block_size, formats_of(recipe)
    row = sum(size * fmt.itemsize + fmt.scaled for fmt in formats)
    host = arena_bytes(rows, size, formats, offload.ratio)
    if offload.executor == "host":
        buffers = LANDING * crossing.device_buffer(recipe)
        return Expected(host, crossing.landing_bytes(recipe), 0, buffers, gradient_on_device=False)
    away = [offloaded_rows(each, offload.ratio) for each in rows]
    buffers = RING * row * chunk_rows(size, max(away))
    return Expected(host, 0, row * (sum(rows) - sum(away)), buffers, gradient_on_device=True)


def formats_of(recipe: Recipe) -> tuple[Format, Format, Format]:
    """Return the formats of master, exp_avg and exp_avg_sq."""
    return recipe.master, recipe.exp_avg, recipe.exp_avg_sq
