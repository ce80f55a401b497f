"""Whole FP32 tensors of one parameter, read from the shards and written to them.

DeepSpeed's `safe_get_full_fp32_param`, `safe_get_full_optimizer_state`, `safe_get_full_grad` and
their `safe_set_*` counterparts call these methods, which are bound to the parameters. Reading is collective;
writing needs the same value on every rank and communicates nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.config.refusals import cut
from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import Blocks, chunks, decode, padded
from ds_fp8.ops.masters import decode_masters, store_masters
from ds_fp8.ops.moments import UNIT, square_root
from ds_fp8.zero_fp8.comm.collectives import sum_over_ranks
from ds_fp8.zero_fp8.gradients.reduced import ReducedGradient
from ds_fp8.zero_fp8.parts import Parts
from ds_fp8.zero_fp8.placement.parameters import numel_of, shape_of
from ds_fp8.zero_fp8.placement.partition import Piece
from ds_fp8.zero_fp8.states.shard import Shard

BOUND = ("_hp_mapping", "get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Owned(NamedTuple):
    """This rank's part of a bucket."""

    reduced: ReducedGradient
    shard: Shard
    weights: Tensor  # the memory where a sweep writes the rows that this rank owns


Read = Callable[[Owned, slice], Tensor]  # FP32 values of owned rows


class FullTensors:
    """Access to the shards by parameter.

    gradient_scale: factor from the reduced gradient as stored to the mean over ranks. on_reading_gradients:
    called, on every rank, before a gradient is read or set; it completes the reduction, and raises ValueError
    if there is no gradient. on_access: called before masters and weights are read or set.
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
    ) -> None:
        self._parts = parts
        self._group = group
        self._gradient_scale = gradient_scale
        self._on_foreign_state = on_foreign_state
        self._on_reading_gradients = on_reading_gradients
        self._on_access = on_access

    def attach(self, parameters: Mapping[int, Parameter]) -> None:
        """Give each parameter the methods that DeepSpeed's utilities call."""
        for index, parameter in parameters.items():
            methods = (
                None,  # DeepSpeed asks whether the attribute exists
                partial(self.get_state, index, parameter),
                partial(self.set_state, index, parameter),
                partial(self.get_gradient, index, parameter),
                partial(self.set_gradient, index, parameter),
            )
            for name, method in zip(BOUND, methods, strict=True):
                setattr(parameter, name, method)

    def detach(self, parameters: Mapping[int, Parameter]) -> None:
        """Remove the methods."""
        for parameter in parameters.values():
            for name in BOUND:
                parameter.__dict__.pop(name, None)

    def get_state(self, index: int, parameter: Parameter, optim_state_key: str | None = None) -> Tensor:
        """Return the master weight, or the named state, in FP32. Raises ValueError for another name."""
        return self._gather(index, parameter, self._state_reader(optim_state_key))

    def get_own_state(self, index: int, held: Tensor, optim_state_key: str | None = None) -> Tensor:
        """As `get_state`, for a slice: [elements of `held`], zeros after the parameter's end."""
        return self._own(index, held, self._state_reader(optim_state_key))

    def get_gradient(self, index: int, parameter: Parameter) -> Tensor:
        """Return the mean FP32 gradient without loss scale. Raises ValueError outside backward .. step."""
        return self._gather(index, parameter, self._gradient_reader())

    def get_own_gradient(self, index: int, held: Tensor) -> Tensor:
        """As `get_gradient`, for a slice: [elements of `held`], zeros after the parameter's end."""
        return self._own(index, held, self._gradient_reader())

    def set_state(
        self, index: int, parameter: Parameter, value: Tensor, optim_state_key: str | None = None
    ) -> None:
        """Round a value into the master weight, and so into the model's weight, or into a state."""
        _check_key(optim_state_key)
        self._on_access()
        flat = _flat(value, shape_of(parameter), parameter.device)
        for owned, piece in self._pieces(index):
            _write(flat[piece.elements], owned, piece.rows, optim_state_key)
        if optim_state_key is None:
            self._write_weight(index, parameter, flat)
        else:
            self._on_foreign_state()

    def set_own_state(
        self, index: int, held: Tensor, value: Tensor, optim_state_key: str | None = None
    ) -> None:
        """As `set_state`, for a slice: [elements of `held`].

        Raises ValueError for an FP8 weight, whose scales all ranks have to agree on.
        """
        _check_key(optim_state_key)
        self._on_access()
        if optim_state_key is None:
            self._refuse_part_of_codes(index)
        flat = _flat(value, held.shape, held.device)
        for owned, piece in self._pieces(index):
            _write(flat[: piece.numel], owned, piece.rows, optim_state_key)
        if optim_state_key is not None:
            self._on_foreign_state()

    def _refuse_part_of_codes(self, index: int) -> None:
        products = self._parts.products
        if products is not None and index in products.chosen:
            raise ValueError(
                f"{products.names[index]}: safe_set_local_fp32_param received a part of an FP8 weight, "
                "allowed: safe_set_full_fp32_param, which gives all ranks the scales of its tiles"
            )

    def set_gradient(self, index: int, parameter: Parameter, value: Tensor) -> None:
        """Round a mean gradient into the reduced gradient. Raises ValueError outside backward .. step."""
        self._on_reading_gradients()
        flat = _flat(value, shape_of(parameter), parameter.device) / self._gradient_scale()
        for owned, piece in self._pieces(index):
            owned.reduced.set(flat[piece.elements], piece.rows)

    def set_own_gradient(self, index: int, held: Tensor, value: Tensor) -> None:
        """As `set_gradient`, for a slice: [elements of `held`]."""
        self._on_reading_gradients()
        flat = _flat(value, held.shape, held.device) / self._gradient_scale()
        for owned, piece in self._pieces(index):
            owned.reduced.set(flat[: piece.numel], piece.rows)

    def _state_reader(self, key: str | None) -> Read:
        _check_key(key)
        self._on_access()

        def read(owned: Owned, rows: slice) -> Tensor:
            with owned.shard.lend(rows) as state:
                if key == "exp_avg_sq":
                    return state.second_moment(UNIT**-2)
                if key == "exp_avg":
                    return state.first_moment()
                return decode_masters(state.master, owned.weights[rows])

        return read

    def _gradient_reader(self) -> Read:
        self._on_reading_gradients()
        scale = self._gradient_scale()
        return lambda owned, rows: decode(owned.reduced.blocks[rows]) * scale

    def _write_weight(self, index: int, parameter: Parameter, flat: Tensor) -> None:
        """Write the whole weight, on every rank, as its owners' masters would give it."""
        fmt, size = self._parts.shards[0].master_format, self._parts.shards[0].block_size
        weight = torch.empty(flat.numel(), dtype=parameter.dtype, device=flat.device)
        for part in chunks(-(-flat.numel() // size), size):
            values = flat[part.start * size : part.stop * size]
            master = Blocks.zeros(part.stop - part.start, size, fmt, flat.device)
            rounded = torch.empty(len(master), size, dtype=weight.dtype, device=flat.device)
            store_masters(values, master, rounded)
            weight[part.start * size :][: values.numel()] = rounded.view(-1)[: values.numel()]
        for bucket, _, _, weights in self._parts.by_bucket():
            if any(slot.parameter == index for slot in bucket.slots):
                weights.write(index, parameter, weight)

    def _own(self, index: int, held: Tensor, read: Read) -> Tensor:
        own = torch.zeros(held.numel(), dtype=torch.float32, device=held.device)
        for owned, piece in self._pieces(index):
            own[: piece.numel] = read(owned, piece.rows).view(-1)[: piece.numel]
        return own

    def _gather(self, index: int, parameter: Parameter, read: Read) -> Tensor:
        whole = torch.zeros(numel_of(parameter), dtype=torch.float32, device=parameter.device)
        for owned, piece in self._pieces(index):
            whole[piece.elements] = read(owned, piece.rows).view(-1)[: piece.numel]
        sum_over_ranks(whole, self._group)
        return whole.view(shape_of(parameter))

    def _pieces(self, index: int) -> Iterator[tuple[Owned, Piece]]:
        """Yield each of this rank's pieces of a parameter with its bucket's shard."""
        for _, reduced, shard, weights in self._parts.by_bucket():
            for piece in shard.pieces:
                if piece.slot.parameter == index:
                    yield Owned(reduced, shard, weights.room), piece


def _check_key(key: str | None) -> None:
    if key is not None and key not in MOMENTS:
        raise ValueError(f"optimizer state: received {cut(repr(key))}, allowed: {', '.join(MOMENTS)}")


def _flat(value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"received shape {list(value.shape)}, allowed: {list(shape)}")
    return value.detach().to(device=device, dtype=torch.float32).reshape(-1)


def _write(part: Tensor, owned: Owned, rows: slice, key: str | None) -> None:
    """Round a vector into rows of the master and the weight, or of the named state."""
    with owned.shard.lend(rows) as state:
        if key is None:
            store_masters(part, state.master, owned.weights[rows])
        else:
            _quantize_moment(part, state, key)


LEAST = 2.0**-70  # more than Adam leaves in exp_avg where exp_avg_sq is below what FP32 holds


def _quantize_moment(values: Tensor, out: AdamState, key: str) -> None:
    """Round a vector of moments to nearest, with zeros after it; the other moment stays as it is.

    Raises ValueError, and writes nothing, for moments that have no quotient, if the quotient is stored.
    """
    size = out.exp_avg_sq.block_size

    def rows_of(part: slice) -> Tensor:
        return padded(values[part.start * size : part.stop * size], part.stop - part.start, size)

    for part in chunks(len(out.exp_avg_sq), size) if out.stores_quotient else ():
        _check_quotients(rows_of(part), out[part], key)
    for part in chunks(len(out.exp_avg_sq), size):
        rows, state = rows_of(part), out[part]
        if key == "exp_avg":
            state.set_first_moment(rows, state.root())
            continue
        m = state.first_moment() if state.stores_quotient else None
        state.set_second_moment(rows, square_root(rows))
        if m is not None:
            state.set_first_moment(m, state.root())


def _check_quotients(values: Tensor, state: AdamState, key: str) -> None:
    m, root = (values, state.root()) if key == "exp_avg" else (state.first_moment(), values)
    if bool(((root == 0) & (m.abs() >= LEAST)).any()):
        raise ValueError(
            f"{key}: received values that leave exp_avg_sq 0 where exp_avg is not 0, which is refused with "
            "fp8.optimizer.exp_avg_dtype int8, since it holds their quotient; set exp_avg to zeros, then "
            "exp_avg_sq, then exp_avg"
        )
