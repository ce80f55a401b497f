"""States of FP8AdamW without DeepSpeed: the blocks of one parameter after the other, on its own device.

A parameter's state is a dict of what `torch.save` and every checkpointing library keep as they are: the
step, the clamp, and the codes and scales as bytes. Blocks are views of those bytes; the parameter and its
gradient are read and written in place, but for the last block, which is filled up in a copy.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment
from ds_fp8.ops.backend import Backend, choose
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BF16, FP32, Format
from ds_fp8.refusals import cut
from ds_fp8.zero_fp8.recipe import Recipe, weight_dtypes

logger = logging.getLogger("ds_fp8")

GRADIENTS = {torch.float32: FP32, torch.bfloat16: BF16}  # read in place; others are turned FP32


class States:
    """Makes, checks and sweeps the states of single parameters."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._backends: dict[torch.device, Backend] = {}
        self._controls: dict[torch.device, Tensor] = {}
        self._plans: dict[tuple[Any, ...], Any] = {}  # a GPU's lie in its memory

    @property
    def formats(self) -> dict[str, Format]:
        recipe = self.recipe
        return {"master": recipe.master, "exp_avg": recipe.exp_avg, "exp_avg_sq": recipe.exp_avg_sq}

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must have alike for one to go on with the other's states."""
        names = {key: fmt.name for key, fmt in self.formats.items()}
        return {**names, "block_size": self.recipe.block_size, "seed": self.recipe.seed}

    def prepare(self, state: dict[str, Any], parameter: Tensor) -> None:
        """The state of a parameter that has none, its master made from the weight."""
        if state:
            return
        self._check_parameter(parameter)
        blocks = self._blocks_of(parameter)
        state.update(step=0, clamp_square=None)
        for key, fmt in self.formats.items():
            fresh = Blocks.zeros(blocks, self.recipe.block_size, fmt, parameter.device)
            state[key] = fresh.codes.view(torch.uint8).view(-1)
            if fresh.scales is not None:
                state[f"{key}_scales"] = fresh.scales
        if not self.recipe.master.split:  # of a split master the weight is all that is not zero
            master = self._view(state, "master")
            self._backend(parameter.device).quantize(parameter.detach().reshape(-1), master)

    def sweep(self, state: dict[str, Any], parameter: Tensor, index: int, scalars: AdamScalars) -> None:
        """One step of a parameter. index: among all of the optimizer, for its random bits."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError("FP8AdamW: received a sparse gradient, allowed: dense")
        if gradient.dtype not in GRADIENTS:
            gradient = gradient.to(torch.float32)
        size = self.recipe.block_size
        master, exp_avg, exp_avg_sq = (self._view(state, key) for key in self.formats)
        states = AdamState(master, exp_avg, exp_avg_sq)
        weights = parameter.detach().contiguous().view(-1)
        gradient = gradient.detach().reshape(-1)
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

    def check(self, saved: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Refuse, by a ValueError, a state_dict that is not of these parameters and formats."""
        for key, value in self.identity.items():
            received = saved.get("fp8", {}).get(key)
            if received != value:
                raise ValueError(f"state_dict fp8.{key}: received {cut(repr(received))}, expected {value!r}")
        for index, state in saved["state"].items():
            if index not in range(len(parameters)):
                raise ValueError(
                    f"state_dict: received parameter {index}, allowed: 0 to {len(parameters) - 1}"
                )
            blocks = self._blocks_of(parameters[index])
            expected: dict[str, int] = {}
            for key, fmt in self.formats.items():
                expected[key] = blocks * self.recipe.block_size * fmt.itemsize
                if fmt.scaled:
                    expected[f"{key}_scales"] = blocks
            received = {key: each.numel() for key, each in state.items() if isinstance(each, Tensor)}
            kinds = {each.dtype for each in state.values() if isinstance(each, Tensor)}
            if received != expected or kinds != {torch.uint8}:
                raise ValueError(
                    f"state_dict of parameter {index}: received bytes {received} of {kinds}, "
                    f"expected {expected} of torch.uint8"
                )

    def _blocks_of(self, parameter: Tensor) -> int:
        return -(-parameter.numel() // self.recipe.block_size)

    def _check_parameter(self, parameter: Tensor) -> None:
        dtypes = weight_dtypes(self.recipe.master)
        if parameter.dtype not in dtypes:
            allowed = ", ".join(map(str, dtypes))
            raise ValueError(f"FP8AdamW: received a parameter of {parameter.dtype}, allowed: {allowed}")
        if not parameter.isfinite().all():
            shape = list(parameter.shape)
            raise ValueError(
                f"FP8AdamW: received a parameter of shape {shape} with inf or NaN, allowed: finite"
            )

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
        backend.adam_step(
            states,
            Blocks(gradient.view(-1, size), None, GRADIENTS[gradient.dtype]),
            weights.view(-1, size),
            self._plans[place],
            scalars,
            self._controls[device],
            rounding=self.recipe.rounding,
        )
