"""Parameters whose `.data` was replaced after deepspeed.initialize, brought home to their buffers.

`parameter.data = ...` (vector_to_parameters, a cast and back, swapped averages, SAM's restore) leaves the
buffer that sweep and gather write without a reader. Before they, or a save, come to it, the values are copied
back and the parameter is a view of the buffer again. Masters do not follow, as they do not follow an edit in
place: such values last until the next step, which is said once. A split master's upper half is the weight
itself, and so follows.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.ops.blocks import chunks, decode
from ds_fp8.ops.masters import write_weights
from ds_fp8.zero_fp8.agreement import everybody
from ds_fp8.zero_fp8.partition import Piece
from ds_fp8.zero_fp8.roster import naming
from ds_fp8.zero_fp8.shard import Shard
from ds_fp8.zero_fp8.weights import Weights

logger = logging.getLogger("ds_fp8")


class Binding:
    """Keeps parameters in their buffers. on_return: called when some have been brought back."""

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
        self._edited: dict[str, None] = {}  # names of parameters whose owned values left their masters
        self._said = False

    def restore(self) -> str | None:
        """Bring parameters back. An objection, and nothing is done, if one does not fit any more."""
        for weights in self._weights:
            for index, expected in weights.unfit(self._parameters):
                found = self._parameters[index]
                return (
                    f"{self._names[index]}: received {list(found.shape)} of {found.dtype} on {found.device}, "
                    f"allowed after deepspeed.initialize: {expected}"
                )
        back = {index for weights in self._weights for index in weights.bind(self._parameters)}
        if back:
            self._on_return()
            self._note_edits(back)
        return None

    def require(self) -> None:
        """`restore`, where the ranks need not agree first. Raises ValueError."""
        objection = self.restore()
        if objection:
            raise ValueError(objection)

    @property
    def unsaid(self) -> int:
        """How many parameters there are to speak of."""
        return 0 if self._said else len(self._edited)

    def say(self, group: ProcessGroup) -> None:
        """Log them, once; on every rank or none."""
        names = sorted({name for told in everybody(list(self._edited), group) for name in told})
        self._said = True
        if torch.distributed.get_rank(group) == 0:
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
    master, own = shard.state.master[piece.rows], weights.own[piece.rows]
    if master.format.split:
        return False
    for part in chunks(len(master), master.block_size):
        rounded = torch.empty_like(own[part])
        write_weights(decode(master[part]), rounded)
        if not torch.equal(rounded, own[part]):
            return True
    return False
