"""engine.offload_states and reload_states: between phases of a run, states go to host memory and come back.

Reinforcement learning uses this while another engine generates text. Masters and moments are one state, and
move together. While they are away they can be saved, read and even stepped: they visit the device, with the
same bits.
"""

import logging
from collections.abc import Container
from typing import Any

from deepspeed.accelerator import get_accelerator

from ds_fp8.zero_fp8.parts import Parts
from ds_fp8.zero_fp8.recipe import Offload, Recipe
from ds_fp8.zero_fp8.states.residence import Residence
from ds_fp8.zero_fp8.wiring import in_host_memory

logger = logging.getLogger("ds_fp8")

MOVED = ("optim_states", "hp_params")  # of DeepSpeed's OffloadStateTypeEnum
STAYS = {"lp_params": "weights", "lp_grads": "reduced gradients"}


class MovableStates:
    """The methods that DeepSpeed's engine calls."""

    parts: Parts
    recipe: Recipe
    _away: Residence | None = None  # the moved states' residence

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's states and reduced gradient, wherever they are."""
        return self.parts.nbytes

    def offload_states(
        self,
        include: Container[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move master weights and moments to host memory, if `include` has either; wait for the move.

        include: members of DeepSpeed's OffloadStateTypeEnum; None: all. Weights and reduced gradients stay on
        the device, which is logged if they are requested. Raises ValueError without enough host memory,
        and with one scale per tensor.
        """
        stays = [words for name, words in STAYS.items() if include is None or name in include]
        if stays:
            logger.info("offload_states: %s stay on the device", " and ".join(stays))
        asked = include is None or any(name in include for name in MOVED)
        if not asked or self._away is not None or self.parts.residence.away is not None:
            return
        device, rows = self.parts.residence.device, [shard.rows for shard in self.parts.shards]
        offload = Offload(pinned=pin_memory)
        self._away = in_host_memory(self.recipe, offload, rows, device, self.parts.backend)
        self._move(self._away)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Move states back to the device, and wait for it; do nothing if they were not moved."""
        if self._away is not None:
            self._move(self.parts.residence)
            self._forget_moves()

    def _move(self, residence: Residence) -> None:
        for shard in self.parts.shards:
            shard.move(residence)
        get_accelerator().empty_cache()

    def _forget_moves(self) -> None:
        """Free the memory to which states were moved."""
        if self._away is not None:
            self._away.close()
            self._away = None
