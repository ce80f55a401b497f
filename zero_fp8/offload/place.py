"""Host memory for a run's offloaded states, the executor that steps them, and the data copied for that.

With the executor host the reduced gradient lives in host memory, too (`gradients.landing`).
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ds_fp8.config.refusals import refusal
from ds_fp8.ops.backend import Backend, choose_for_host
from ds_fp8.ops.blocks import Blocks
from ds_fp8.zero_fp8.comm.agreement import agreed, gather_objects
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.gradients.landing import Landing
from ds_fp8.zero_fp8.offload.sizes import Crossing, formats_of
from ds_fp8.zero_fp8.recipe import Offload, Recipe
from ds_fp8.zero_fp8.states.arena import Arena
from ds_fp8.zero_fp8.states.choice import Estimate, cores_of_a_rank, measure
from ds_fp8.zero_fp8.states.host_memory import refuse_too_much
from ds_fp8.zero_fp8.states.residence import Residence, arena_bytes, streamed, swept_on_host

logger = logging.getLogger("ds_fp8")

EXECUTOR = "fp8.offload.executor"


@dataclass(frozen=True)
class Offloaded:
    """The residence of states, and the reduced gradient if it is in host memory, too."""

    residence: Residence
    landing: Landing | None = None
    reduced: Sequence[Blocks] = ()  # memory for it, by bucket
    host: Backend | None = None  # kernels of the host

    def close(self) -> None:
        """Free the memory once no copy is under way."""
        if self.landing:
            self.landing.close()
        self.residence.close()


def stream(
    recipe: Recipe, offload: Offload, rows: Sequence[int], device: torch.device, backend: Backend
) -> Residence:
    """Create the residence of shards with these rows. Raises ValueError if there is too little memory."""
    how = (recipe.block_size, formats_of(recipe), device, backend)
    return streamed(rows, *how, pinned=offload.pinned, ratio=offload.ratio)


def offloaded(
    recipe: Recipe,
    offload: Offload,
    crossing: Crossing,
    device: torch.device,
    backend: Backend,
    ranks: Ranks,
) -> Offloaded:
    """Create host memory for this rank's states. Collective.

    Raises ValueError, on every rank, if one has too little memory, or lacks what the executor requires.
    """
    host = agreed(lambda: _host_if_wanted(recipe, offload, device, ranks), ranks)
    if host is None:
        return Offloaded(agreed(lambda: stream(recipe, offload, crossing.rows, device, backend), ranks))
    return agreed(lambda: _on_host(recipe, offload, crossing, device, host), ranks)


def _on_host(
    recipe: Recipe, offload: Offload, crossing: Crossing, device: torch.device, host: Backend
) -> Offloaded:
    landing = crossing.landing_bytes(recipe)
    refuse_too_much(landing + arena_bytes(crossing.rows, recipe.block_size, formats_of(recipe), 1.0))
    arena = Arena(landing, device if offload.pinned else None)
    size, formats = recipe.block_size, formats_of(recipe)
    residence = swept_on_host(crossing.rows, size, formats, device, host, arena, crossing.row_bytes)
    buffers = crossing.device_buffer(recipe), crossing.host_buffer(recipe)
    reduced = [arena.blocks(rows, size, recipe.reduced) for rows in crossing.rows]
    return Offloaded(residence, Landing(device, host, arena, *buffers), reduced, host)


def _host_if_wanted(recipe: Recipe, offload: Offload, device: torch.device, ranks: Ranks) -> Backend | None:
    """Return the host's kernels, if the config asks for them or they are faster, else None."""
    if offload.executor == "stream":
        return None
    threads, auto = offload.threads or cores_of_a_rank(), offload.executor == "auto"
    if auto and (device.type != "cuda" or offload.ratio < 1):
        return None
    try:
        host: Backend | None = choose_for_host(threads)
    except RuntimeError as error:
        if not auto:
            raise refusal(EXECUTOR, "host", f'"stream", "auto": the host has no kernels: {error}') from error
        host = None
    if not auto:
        return host
    return host if _faster(recipe, device, host, threads, ranks) == "host" else None


def _faster(recipe: Recipe, device: torch.device, host: Backend | None, threads: int, ranks: Ranks) -> str:
    """Return the faster executor for the slowest rank; rank 0 logs it. Collective."""
    own: Estimate | None = None
    with suppress(RuntimeError):  # a device or host without memory for it
        own = measure(formats_of(recipe), recipe.block_size, recipe.rounding, device, host) if host else None
    found = gather_objects(own, ranks)
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        logger.info(
            "fp8.offload.executor auto: stream, as a rank has no host kernels or no memory to measure them"
        )
        return "stream"
    slowest = Estimate(max(each.stream for each in known), max(each.host for each in known))
    if ranks.rank == 0:
        logger.info(
            "fp8.offload.executor auto: %s, with %s threads for the host: %s",
            slowest,
            threads,
            slowest.faster,
        )
    return slowest.faster
