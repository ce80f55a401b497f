"""Whole FP32 tensors of one parameter, read from the shards and written to them.

What DeepSpeed's `safe_get_full_fp32_param`, `safe_get_full_optimizer_state`, `safe_get_full_grad` and
their `safe_set_*` twins call: methods bound to the parameters. Reading is collective; writing needs
the same value on every rank and communicates nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.config.refusals import cut
from ds_fp8.ops.adam import UNIT, AdamState, square_root
from ds_fp8.ops.blocks import Blocks, chunks, decode, padded, quantize
from ds_fp8.ops.masters import decode_masters, store_masters
from ds_fp8.zero_fp8.comm.collectives import sum_over_ranks
from ds_fp8.zero_fp8.gradients.reduced import ReducedGradient
from ds_fp8.zero_fp8.placement.partition import Piece
from ds_fp8.zero_fp8.states.shard import Shard
from ds_fp8.zero_fp8.wiring import Parts

BOUND = ("_hp_mapping", "get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Owned(NamedTuple):
    """What this rank has of a bucket."""

    reduced: ReducedGradient
    shard: Shard
    weights: Tensor  # the rows that it owns


class FullTensors:
    """Access to the shards by parameter.

    gradient_scale: from the reduced gradient as stored to the mean over ranks. on_reading_gradients:
    called, on every rank, before a gradient is read or set; it brings what has not arrived yet, and raises
    ValueError if there is nothing. on_access: called before masters and weights are read or set.
    on_other_owner: called if another engine binds a parameter of this one.
    """

    def __init__(
        self,
        parts: Parts,
        group: ProcessGroup,
        gradient_scale: Callable[[], float],
        *,
        on_foreign_state: Callable[[], None],
        on_reading_gradients: Callable[[], None],
        on_access: Callable[[], None],
        on_other_owner: Callable[[], None],
    ) -> None:
        self._parts = parts
        self._group = group
        self._gradient_scale = gradient_scale
        self._on_foreign_state = on_foreign_state
        self._on_reading_gradients = on_reading_gradients
        self._on_access = on_access
        self._on_other_owner = on_other_owner

    def attach(self, parameters: Mapping[int, Parameter]) -> None:
        """Give each parameter the methods that DeepSpeed's utilities call; an earlier engine loses it."""
        for owner in {id(each): each for each in map(_owner, parameters.values()) if each}.values():
            owner._on_other_owner()
        for index, parameter in parameters.items():
            methods = (
                None,  # that the attribute exists is what DeepSpeed asks
                partial(self.get_state, index, parameter),
                partial(self.set_state, index, parameter),
                partial(self.get_gradient, index, parameter),
                partial(self.set_gradient, index, parameter),
            )
            for name, method in zip(BOUND, methods, strict=True):
                setattr(parameter, name, method)

    def detach(self, parameters: Mapping[int, Parameter]) -> None:
        """Take the methods back, from parameters that no other engine has bound since."""
        for parameter in parameters.values():
            for name in BOUND if _owner(parameter) is self else ():
                parameter.__dict__.pop(name, None)

    def get_state(self, index: int, parameter: Parameter, optim_state_key: str | None = None) -> Tensor:
        """Master weight, or the named state, in FP32. Raises ValueError for another name."""
        _check_key(optim_state_key)
        self._on_access()

        def read(owned: Owned, rows: slice) -> Tensor:
            with owned.shard.lend(rows) as state:
                if optim_state_key == "exp_avg_sq":
                    return state.second_moment(UNIT**-2)
                if optim_state_key == "exp_avg":
                    return decode(state.exp_avg)
                return decode_masters(state.master, owned.weights[rows])

        return self._gather(index, parameter, read)

    def get_gradient(self, index: int, parameter: Parameter) -> Tensor:
        """Mean gradient in FP32, without loss scale. Raises ValueError outside backward .. step."""
        self._on_reading_gradients()
        scale = self._gradient_scale()
        return self._gather(index, parameter, lambda owned, rows: decode(owned.reduced.blocks[rows]) * scale)

    def set_state(
        self, index: int, parameter: Parameter, value: Tensor, optim_state_key: str | None = None
    ) -> None:
        """Round a value into the master weight, and so into the model's weight, or into a state."""
        _check_key(optim_state_key)
        self._on_access()
        flat = _flat(value, parameter)
        for owned, piece in self._pieces(index):
            part = flat[piece.elements]
            with owned.shard.lend(piece.rows) as state:
                if optim_state_key is None:
                    store_masters(part, state.master, owned.weights[piece.rows])
                elif optim_state_key == "exp_avg":
                    quantize(part, state.exp_avg)
                else:
                    _quantize_second_moment(part, state)
        if optim_state_key is None:
            self._write_weight(flat, parameter)
        else:
            self._on_foreign_state()

    def set_gradient(self, index: int, parameter: Parameter, value: Tensor) -> None:
        """Round a mean gradient into the reduced gradient. Raises ValueError outside backward .. step."""
        self._on_reading_gradients()
        flat = _flat(value, parameter) / self._gradient_scale()
        for owned, piece in self._pieces(index):
            owned.reduced.set(flat[piece.elements], piece.rows)

    def _write_weight(self, flat: Tensor, parameter: Parameter) -> None:
        """The whole weight, on every rank, as its owners' masters would give it."""
        fmt, size = self._parts.shards[0].master_format, self._parts.shards[0].block_size
        weight = parameter.data.view(-1)
        for part in chunks(-(-flat.numel() // size), size):
            values = flat[part.start * size : part.stop * size]
            master = Blocks.zeros(part.stop - part.start, size, fmt, flat.device)
            rounded = torch.empty(len(master), size, dtype=weight.dtype, device=weight.device)
            store_masters(values, master, rounded)
            weight[part.start * size :][: values.numel()] = rounded.view(-1)[: values.numel()]

    def _gather(self, index: int, parameter: Parameter, read: Callable[[Owned, slice], Tensor]) -> Tensor:
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for owned, piece in self._pieces(index):
            whole[piece.elements] = read(owned, piece.rows).view(-1)[: piece.numel]
        sum_over_ranks(whole, self._group)
        return whole.view(parameter.shape)

    def _pieces(self, index: int) -> Iterator[tuple[Owned, Piece]]:
        """Each of this rank's pieces of a parameter, and what holds it."""
        for _, reduced, shard, weights in self._parts.by_bucket():
            for piece in shard.pieces:
                if piece.slot.parameter == index:
                    yield Owned(reduced, shard, weights.own), piece


def _owner(parameter: Parameter) -> FullTensors | None:
    """Whose methods a parameter has already."""
    method = getattr(getattr(parameter, BOUND[1], None), "func", None)
    owner = getattr(method, "__self__", None)
    return owner if isinstance(owner, FullTensors) else None


def _check_key(key: str | None) -> None:
    if key is not None and key not in MOMENTS:
        raise ValueError(f"optimizer state: received {cut(repr(key))}, allowed: {', '.join(MOMENTS)}")


def _flat(value: Tensor, parameter: Parameter) -> Tensor:
    if value.shape != parameter.shape:
        raise ValueError(f"received shape {list(value.shape)}, allowed: {list(parameter.shape)}")
    return value.detach().to(device=parameter.device, dtype=torch.float32).reshape(-1)


def _quantize_second_moment(v: Tensor, out: AdamState) -> None:
    """A vector of second moments, rounded to nearest, zeros after it."""
    size = out.exp_avg_sq.block_size
    for part in chunks(len(out.exp_avg_sq), size):
        rows = padded(v[part.start * size : part.stop * size], part.stop - part.start, size)
        out[part].set_second_moment(rows, square_root(rows))
