"""FP8 weights in model files: the values of their codes, or their masters rounded to BF16.

Products multiply the codes, so a model that is loaded from their values computes what training computes.
Masters are more precise: quantising the model anew, or training it further, starts better from them.
Both go to host memory, one matrix after another.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.ops.masters import rewrite_weights
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.states.shard import Shard
from ds_fp8.zero_fp8.weights.claims import LEFT, Left, put_together
from ds_fp8.zero_fp8.weights.frozen import FrozenWeights
from ds_fp8.zero_fp8.weights.sliced.frozen import FrozenSlices
from ds_fp8.zero_fp8.weights.store import Weights
from ds_fp8.zero_fp8.weights.tiled import OwnPart, TiledWeights, is_tiled

logger = logging.getLogger("ds_fp8")


class StateDictNotice:
    """Logs one line when values of codes first go into a state_dict."""

    def __init__(self) -> None:
        self._given = False

    def __call__(self) -> None:
        if not self._given:
            self._given = True
            logger.info(
                "FP8 weights are in this state_dict as the BF16 values of their codes, with which the model "
                "computes; for their masters: fp8.checkpoint.weights masters (in save_checkpoint and "
                "save_16bit_model), or `ds_fp8 export` of a checkpoint"
            )


class ModelWeights:
    """FP8 weights for model files."""

    def __init__(
        self,
        shards: Sequence[Shard],
        weights: Sequence[Weights],
        frozen: FrozenWeights | FrozenSlices,
        group: ProcessGroup,
        *,
        masters: bool,
    ) -> None:
        """masters: whether `fp8.checkpoint.weights` is "masters"; frozen weights have none."""
        self._shards = shards
        self._weights = weights
        self._frozen = frozen
        self._group = group
        self._masters = masters
        self._held: dict[Matrix, Tensor] | None = None  # gathered masters while a save goes on

    def hold(self, *, writes: bool) -> None:
        """Gather masters for a save, kept on ranks that write. Collective if masters are wanted."""
        self._held = self._gathered(keeps=writes) if self._masters else {}

    def let_go(self) -> None:
        """End a save."""
        self._held = None

    @property
    def exist(self) -> bool:
        """Whether there are FP8 weights."""
        return any(map(is_tiled, self._weights)) or self._frozen.exist

    def make_plain(self, state: dict[str, Any], *, writes: bool) -> None:
        """Turn parameters into plain tensors, FP8 ones into BF16. Outside a save as collective as `hold`.

        writes: as in `hold`; ranks that do not write leave parameters as they are during a save.
        """
        masters = self._held
        if masters is None:
            masters = self._gathered(keeps=True) if self._masters else {}
        elif not writes:
            return
        for name, value in state.items():
            if isinstance(value, FP8Parameter):
                state[name] = self._values(value.matrix, masters)
            elif isinstance(value, Tensor):
                state[name] = value.detach()

    def _values(self, matrix: Matrix, masters: dict[Matrix, Tensor]) -> Tensor:
        if matrix in masters:
            return masters[matrix]
        if matrix.on_state_dict:
            matrix.on_state_dict()
        return matrix.values().cpu()

    def put_masters(self, state: dict[str, Any] | None) -> None:
        """Replace gathered values by masters, if files hold those. Collective. state: None on other ranks."""
        for matrix, values in self._rounded() if self._masters else ():
            if state is not None and matrix.name in state:
                state[matrix.name] = values.cpu()

    def _gathered(self, *, keeps: bool) -> dict[Matrix, Tensor]:
        """Return the masters of a state_dict's matrices, rounded to BF16, on the CPU. Collective."""
        if any(each.saved_with_states for each in self._weights):
            return {}
        return {matrix: values.cpu() for matrix, values in self._rounded() if keeps}

    def own_values(self) -> Iterator[tuple[OwnPart, Tensor]]:
        """Yield what this rank owns of FP8 weights: masters rounded to BF16, valid until the next one."""
        for shard, weights in zip(self._shards, self._weights, strict=True):
            if is_tiled(weights):
                yield from weights.own_values(own_masters(shard, weights))

    def leave(self, parameters: Mapping[int, Parameter]) -> None:
        """Give FP8 weights what `claims.make_plain` takes. parameters: by global index."""
        if not any(isinstance(each, FP8Parameter) for each in parameters.values()):
            return  # another engine has made them plain
        left: dict[int, Left] = {}
        try:
            for part, values in self.own_values():
                left.setdefault(part.home.parameter, []).append((part.piece.elements, values.clone()))
        except RuntimeError as error:  # no memory: the next engine begins with codes
            logger.warning("the masters of FP8 weights are not left to an engine that follows: %s", error)
            return
        for index, own in left.items():
            setattr(parameters[index], LEFT, own)

    def _rounded(self) -> Iterator[tuple[Matrix, Tensor]]:
        for shard, weights in zip(self._shards, self._weights, strict=True):
            if is_tiled(weights):
                yield from rounded_masters(shard, weights, self._group)


def rounded_masters(
    shard: Shard, weights: TiledWeights, group: ProcessGroup
) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield each matrix of a bucket and its masters, [rows, columns] bfloat16, as encoded. Collective."""
    room = own_masters(shard, weights)
    for matrix, own in weights.matrices():
        parts = [(part.piece.elements, part.of(room)) for part in own]
        yield matrix, put_together(matrix.codes.shape, parts, room.device, group)


def own_masters(shard: Shard, weights: TiledWeights) -> Tensor:
    """Return the masters that this rank owns of a bucket, rounded to BF16, until its room is used again."""
    room = weights.room
    for rows in shard.cut():
        with shard.lend(rows) as state:
            rewrite_weights(state.master, room[rows])
    return room
