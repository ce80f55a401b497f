"""Return parameters whose `.data` was replaced after deepspeed.initialize to their buffers.

After `parameter.data = ...` (vector_to_parameters, a cast and back, swapped averages, SAM's restore) the
parameter no longer reads the buffer that sweep and gather write. Before the next sweep, gather or save, the
values are copied back and the parameter becomes a view of the buffer again. Masters do not follow, as they do
not follow an edit in place: such values last until the next step, which is logged once. A split master's
upper half is the weight itself, and so follows.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.config.refusals import naming
from ds_fp8.ops.blocks import Blocks, chunks, decode
from ds_fp8.ops.masters import write_weights
from ds_fp8.zero_fp8.comm.agreement import gather_objects
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.placement.partition import Piece
from ds_fp8.zero_fp8.states.shard import Shard
from ds_fp8.zero_fp8.weights.home import Home
from ds_fp8.zero_fp8.weights.store import Weights

logger = logging.getLogger("ds_fp8")


class Binding:
    """Keeps parameters in their buffers. on_return: called after some have been brought back."""

    def __init__(
        self,
        weights: Sequence[Weights],
        shards: Sequence[Shard],
        parameters: Mapping[int, Parameter],
        names: Mapping[int, str],
        on_return: Callable[[], None],
    ) -> None:
        self._weights = weights
        self._shards = shards
        self._parameters = parameters
        self._names = names
        self._on_return = on_return
        self._given_up = False
        self._edited: dict[str, None] = {}  # names of parameters whose owned values left their masters
        self._logged = False

    @cached_property
    def _homes(self) -> dict[int, Home]:
        """Homes by address; codes have none before the first gather."""
        return {home.address: home for each in self._weights for home in each.homes}

    def bring_home(self) -> str | None:
        """Bring parameters back. If one no longer fits, return an objection and do nothing."""
        objection = self._freed() or next(filter(None, map(self._objection, self._homes.values())), None)
        if objection:
            return objection
        back = {index for weights in self._weights for index in weights.bind(self._parameters)}
        if back:
            self._on_return()
            self._note_edits(back)
        return None

    def _freed(self) -> str | None:
        """Return an objection if memory was freed, which is allocated again so that collectives can run."""
        for weights in self._weights:
            if weights.freed:
                weights.allocate()
                name = self._names[weights.homes[0].parameter]
                return (
                    f"{name}: received a storage that was resized, with all weights of its bucket, which are "
                    "lost; load a checkpoint"
                )
        return None

    def _objection(self, home: Home) -> str | None:
        """Return an objection to a parameter's current values if they cannot be copied to its home."""
        parameter, name = self._parameters[home.parameter], self._names[home.parameter]
        objection = home.objection(parameter)
        if objection is not None:
            return f"{name}: {objection}"
        other = self._homes.get(home.address_of(parameter), home)
        if other is not home:
            tied = self._names[other.parameter]
            return (
                f"{name}: received the memory of {tied} as .data, allowed: its own; tie parameters before "
                "deepspeed.initialize, by giving both modules the same Parameter"
            )
        return None

    def give_up(self) -> None:
        """Note that another engine has taken over the parameters."""
        self._given_up = True

    def check_owned(self) -> None:
        """Raise RuntimeError if another engine has taken over the parameters."""
        if self._given_up:
            raise RuntimeError(
                "this engine's parameters are trained by an engine that was made after it: use that one, or "
                "call engine.destroy() on one before another is made for the same parameters"
            )

    def require(self) -> None:
        """Run `bring_home` without agreement of the ranks. Raises ValueError, or as `check_owned`."""
        self.check_owned()
        objection = self.bring_home()
        if objection:
            raise ValueError(objection)

    @property
    def unlogged(self) -> int:
        """How many parameters have edits that the log has not named."""
        return 0 if self._logged else len(self._edited)

    def log_edits(self, ranks: Ranks) -> None:
        """Name them in the log, once; on every rank or none."""
        names = sorted({name for told in gather_objects(list(self._edited), ranks) for name in told})
        self._logged = True
        if ranks.rank == 0:
            logger.warning(
                "weights replaced through .data by other values than their masters have: %s; masters do not "
                "follow, the next step overwrites such an edit (safe_set_full_fp32_param sets both)",
                naming(names),
            )

    def _note_edits(self, back: set[int]) -> None:
        for shard, weights in zip(self._shards, self._weights, strict=True):
            for piece in shard.pieces:
                if piece.slot.parameter in back and _differs(shard, weights, piece):
                    self._edited[self._names[piece.slot.parameter]] = None


def _differs(shard: Shard, weights: Weights, piece: Piece) -> bool:
    """Whether owned weights are other than their rounded masters; split masters have no other weight."""
    if shard.master_format.split:
        return False
    own = weights.own
    for rows in shard.cut(piece.rows):
        with shard.lend(rows) as state:
            if _differ(state.master, own[rows]):
                return True
    return False


def _differ(master: Blocks, weights: Tensor) -> bool:
    for part in chunks(len(master), master.block_size):
        rounded = torch.empty_like(weights[part])
        write_weights(decode(master[part]), rounded)
        if not torch.equal(rounded, weights[part]):
            return True
    return False
