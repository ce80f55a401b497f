"""States of FP8AdamW without DeepSpeed: the blocks of one parameter after the other, on its own device.

A parameter's state is a dict of what `torch.save`, `torch.distributed.checkpoint` and every checkpointing
library keep as they are: codes and scales as bytes, the rest as numbers. Blocks are views of those bytes; the
parameter and its gradient are read and written in place, but for the last block, which is filled up in a
copy.

Between two steps a user may resize, recast, move or wrap a parameter. So `check` compares the parameter, its
gradient and its state at every step, and a state says what it was made for. A user may edit its values, too:
the master follows (`edits.py`).
"""

import logging
from collections.abc import Iterable, Iterator, MutableMapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ds_fp8.config.refusals import cut
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import Backend, choose
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BF16, FP32
from ds_fp8.zero_fp8.guards import check_gradient, check_weight, flaw_of
from ds_fp8.zero_fp8.optimizer.edits import Mark, brings_in_non_finite, follow, mark_of
from ds_fp8.zero_fp8.recipe import Recipe, weight_dtypes

logger = logging.getLogger("ds_fp8")

READ_IN_PLACE = {torch.float32: FP32, torch.bfloat16: BF16}  # gradients; others are turned FP32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # a state holds the place here of its weight's
ADVICE = "a new FP8AdamW, or this parameter's entry deleted from optimizer.state, begins anew"


class States:
    """Makes, checks and sweeps the states of single parameters."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.formats = {"master": recipe.master, "exp_avg": recipe.exp_avg, "exp_avg_sq": recipe.exp_avg_sq}
        self._keys = {"step", "clamp_square", "made_for", *self.formats}
        self._keys |= {f"{key}_scales" for key, fmt in self.formats.items() if fmt.scaled}
        self._backends: dict[torch.device, Backend] = {}
        self._controls: dict[torch.device, Tensor] = {}
        self._plans: dict[tuple[Any, ...], Any] = {}  # a GPU's lie in its memory
        # By master: torch swaps no parameter that somebody refers to weakly.
        self._marks: MutableMapping[Tensor, Mark | None] = WeakIdKeyDictionary()

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must have alike for one to go on with the other's states."""
        names = {key: fmt.name for key, fmt in self.formats.items()}
        return {**names, "block_size": self.recipe.block_size, "seed": self.recipe.seed}

    def make(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step: zeros, and a master that `sweep` fills then."""
        state: dict[str, Any] = {"step": 0, "clamp_square": 0.0, "made_for": _description(parameter)}
        blocks = self._blocks_of(parameter)
        for key, fmt in self.formats.items():
            fresh = Blocks.zeros(blocks, self.recipe.block_size, fmt, parameter.device)
            state[key] = fresh.codes.view(torch.uint8).view(-1)
            if fresh.scales is not None:
                state[f"{key}_scales"] = fresh.scales
        return state

    def sweep(self, state: dict[str, Any], parameter: Tensor, index: int, scalars: AdamScalars) -> None:
        """One step of a parameter. index: among all of the optimizer, for its random bits."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.dtype not in READ_IN_PLACE:
            gradient = gradient.to(torch.float32)
        size = self.recipe.block_size
        weights = parameter.detach().contiguous().view(-1)
        gradient = gradient.detach().contiguous().view(-1)
        master, exp_avg, exp_avg_sq = (self._view(state, key) for key in self.formats)
        if scalars.step == 1 and not master.format.split:  # of a split one the weight is all but zeros
            self._backend(weights.device).quantize(weights, master)
        states = AdamState(master, exp_avg, exp_avg_sq)
        whole = len(weights) // size
        if whole:
            inside = slice(0, whole * size)
            self._sweep(
                states[:whole], gradient[inside], weights[inside], Segment(slice(0, whole), index, 0), scalars
            )
        if len(weights) % size:
            rest = slice(whole * size, None)
            last = torch.zeros(2, size, dtype=torch.float32, device=weights.device)
            tail_gradient, tail = last[0].to(gradient.dtype), last[1].to(weights.dtype)
            count = len(weights[rest])
            tail_gradient[:count], tail[:count] = gradient[rest], weights[rest]
            self._sweep(
                states[whole:], tail_gradient, tail, Segment(slice(0, 1), index, whole * size), scalars
            )
            weights[rest] = tail[:count]
        if not parameter.is_contiguous():
            parameter.detach().copy_(weights.view(parameter.shape))
        if not parameter.is_inference():
            torch.autograd.graph.increment_version(parameter)  # kernels write behind autograd's back

    # Edits between steps

    def follow(self, state: dict[str, Any], parameter: Tensor) -> None:
        """Take edits of the weight over into its master; for all parameters before the first is swept."""
        if self._may_be_edited(state, parameter):
            follow(self._view(state, "master"), parameter.detach().reshape(-1))

    def remember(self, state: dict[str, Any], parameter: Tensor) -> None:
        """Remember what a step has left, after its last sweep: views of one tensor count together."""
        self._marks[state["master"]] = mark_of(parameter)

    def _may_be_edited(self, state: dict[str, Any], parameter: Tensor) -> bool:
        """Whether the weight may be another than its master gives, since the last step or from elsewhere."""
        if self.recipe.master.split or state["step"] == 0:
            return False
        mark = mark_of(parameter)
        return mark is None or self._marks.get(state["master"]) != mark

    def _takes_in_non_finite(self, state: dict[str, Any], parameter: Tensor) -> bool:
        """Whether the step would bring inf or NaN into a master that cannot hold it or is new."""
        if not state or state["step"] == 0:
            return not bool(parameter.isfinite().all())
        if not self.recipe.master.scaled or not self._may_be_edited(state, parameter):
            return False
        return brings_in_non_finite(self._view(state, "master"), parameter.detach().reshape(-1))

    # What may be stepped and loaded

    def check(self, name: str, state: dict[str, Any], parameter: Tensor) -> None:
        """Refuse a step that kernels cannot take, by a ValueError that begins with the parameter's name.

        state: an empty one if the parameter has none yet.
        """
        check_weight(name, parameter, weight_dtypes(self.recipe.master))
        check_gradient(name, parameter, DTYPES)
        self._backend(parameter.device)
        if state:
            self._check_numbers(name, state)
            received, expected = state["made_for"], _description(parameter)
            if received != expected:
                raise ValueError(
                    f"{name}: received a parameter of {_words(expected)}, allowed: {_words(received)}, "
                    f"which its state was made for ({ADVICE})"
                )
            self._check_bytes(name, state, parameter, parameter.device)
        if self._takes_in_non_finite(state, parameter):
            raise ValueError(
                f"{name}: received a parameter of shape {list(parameter.shape)} with inf or NaN, "
                "allowed: finite"
            )

    def taken_over(self, name: str, saved: Any, parameter: Tensor) -> dict[str, Any]:
        """A copy of a saved state, beside the parameter. Raises ValueError for one of another shape."""
        if not isinstance(saved, dict):
            raise ValueError(f"{name}: received {type(saved).__name__}, allowed: a dict")
        self._check_numbers(name, saved)
        received, expected = _shape(saved["made_for"]), list(parameter.shape)
        if received != expected:
            raise ValueError(f"{name}: received shape {received}, expected {expected}")
        self._check_bytes(name, saved, parameter)
        copied = {
            key: each.to(parameter.device, copy=True) if isinstance(each, Tensor) else each
            for key, each in saved.items()
        }
        return {**copied, "made_for": _description(parameter)}

    def check_identity(self, received: Any) -> None:
        """Refuse states of other formats, by a ValueError."""
        for key, value in self.identity.items():
            found = received.get(key) if isinstance(received, dict) else None
            if found != value:
                raise ValueError(f"state_dict fp8.{key}: received {cut(repr(found))}, expected {value!r}")

    def _check_numbers(self, name: str, state: dict[str, Any]) -> None:
        if state.keys() != self._keys:
            raise ValueError(f"{name}: received states {sorted(state)}, expected {sorted(self._keys)}")
        step, square = state["step"], state["clamp_square"]
        if type(step) is not int or step < 0:
            raise ValueError(f"{name}: received step {step!r}, allowed: an integer from 0 on")
        if not isinstance(square, int | float) or not square >= 0:
            raise ValueError(f"{name}: received clamp_square {square!r}, allowed: a number from 0 on")

    def _check_bytes(
        self, name: str, state: dict[str, Any], parameter: Tensor, device: torch.device | None = None
    ) -> None:
        """Of a state as many as the parameter takes, in memory that is there; device: where, if given."""
        for key, count in self._sizes(parameter):
            each = state[key]
            flaw = flaw_of(each) if isinstance(each, Tensor) else f"a {type(each).__name__}"
            if flaw is not None:
                raise ValueError(f"{name}: received {flaw} as {key}, allowed: a dense tensor of this process")
            in_place = each.is_contiguous() and each.storage_offset() % 4 == 0  # as codes of 4 bytes need it
            if each.dtype is not torch.uint8 or each.shape != (count,) or not in_place:
                raise ValueError(
                    f"{name}: received bytes {list(each.shape)} of {each.dtype} in steps of {each.stride()} "
                    f"from {each.storage_offset()} on as {key}, expected [{count}] of torch.uint8 in "
                    "steps of 1 from a multiple of 4 on"
                )
            if device is not None and each.device != device:
                raise ValueError(
                    f"{name}: received a parameter on {device}, allowed: {each.device}, where its {key} is"
                )

    def _sizes(self, parameter: Tensor) -> Iterator[tuple[str, int]]:
        """The bytes of a parameter's state, by key."""
        blocks = self._blocks_of(parameter)
        for key, fmt in self.formats.items():
            yield key, blocks * self.recipe.block_size * fmt.itemsize
            if fmt.scaled:
                yield f"{key}_scales", blocks

    def _blocks_of(self, parameter: Tensor) -> int:
        return -(-parameter.numel() // self.recipe.block_size)

    # Kernels

    def _backend(self, device: torch.device) -> Backend:
        if device not in self._backends:
            backend = choose(device)
            if backend.instead:
                logger.warning("plain PyTorch instead of kernels, with the same numbers: %s", backend.instead)
            self._backends[device] = backend
            self._controls[device] = torch.ones(2, device=device)
        return self._backends[device]

    def _view(self, state: dict[str, Any], key: str) -> Blocks:
        fmt = self.formats[key]
        codes = state[key].view(fmt.dtype).view(-1, self.recipe.block_size)
        return Blocks(codes, state.get(f"{key}_scales"), fmt)

    def _sweep(
        self, states: AdamState, gradient: Tensor, weights: Tensor, segment: Segment, scalars: AdamScalars
    ) -> None:
        """Rows of one parameter; gradient and weights as vectors of as many elements."""
        size, device = self.recipe.block_size, weights.device
        backend, rows = self._backend(device), segment.blocks.stop
        place = (device, segment.parameter, segment.first_element, rows)
        if place not in self._plans:
            self._plans[place] = backend.plan([segment], rows, size, device)
        sweep = Sweep(
            states,
            Blocks(gradient.view(-1, size), None, READ_IN_PLACE[gradient.dtype]),
            weights.view(-1, size),
            self._plans[place],
            scalars,
            self._controls[device],
            rounding=self.recipe.rounding,
        )
        backend.adam_step(sweep)


# What a state was made for is kept in integers: a flattened `torch.distributed.checkpoint` state dict takes
# tensors and numbers, also in dicts, and neither lists nor text.


def _description(parameter: Tensor) -> dict[str, int]:
    sizes = {f"dim{number}": size for number, size in enumerate(parameter.shape)}
    return {"dtype": DTYPES.index(parameter.dtype), **sizes}


def _shape(described: Any) -> list[Any] | None:
    """Of a description; None if it is none."""
    if not isinstance(described, dict) or described.get("dtype") not in range(len(DTYPES)):
        return None
    return [described.get(f"dim{number}") for number in range(len(described) - 1)]


def _words(described: Any) -> str:
    shape = _shape(described)
    return repr(described) if shape is None else f"{DTYPES[described['dtype']]} and shape {shape}"


# Names


class Member(NamedTuple):
    """A parameter of an optimizer."""

    number: int  # among all of them
    name: str  # for messages
    group: dict[str, Any]
    parameter: Tensor


def members_of(param_groups: list[dict[str, Any]]) -> Iterator[Member]:
    """Every parameter with its place."""
    number = 0
    for of_groups, group in enumerate(param_groups):
        names = group.get("param_names")
        for place, parameter in enumerate(group["params"]):
            named = f", {names[place]!r}" if names else ""
            yield Member(number, f"parameter {number} (param group {of_groups}{named})", group, parameter)
            number += 1


def check_apart(members: Iterable[Member]) -> None:
    """Refuse parameters that share memory, by a ValueError: a step of one would edit the other."""
    there = [each for each in members if flaw_of(each.parameter) is None and each.parameter.numel()]
    there.sort(key=lambda each: (str(each.parameter.device), each.parameter.data_ptr(), each.number))
    for one, other in pairwise(there):
        begin = one.parameter.data_ptr()
        whole = one.parameter.is_contiguous() and other.parameter.is_contiguous()
        end = begin + (one.parameter.nbytes if whole else 1)  # strided ones may lie between each other
        if one.parameter.device == other.parameter.device and begin <= other.parameter.data_ptr() < end:
            raise ValueError(
                f"FP8AdamW, {one.name} and {other.name}: received parameters that share memory, allowed: one "
                "and the same Parameter in both places, or memory of its own for each"
            )
