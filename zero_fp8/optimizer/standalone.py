"""FP8AdamW without DeepSpeed, one parameter after the other: sweeps its state, and lets masters follow edits.

A parameter's state is an entry (`entries.py`). The parameter and its gradient are read and written in place,
but for the last block, which is filled up in a copy. Between two steps a user may resize, recast, move or
wrap a parameter: `check` compares the parameter, its gradient and its entry at every step. A user may edit
its values, too: the master follows (`edits.py`).
"""

import logging
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import Backend, choose
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BF16, FP32
from ds_fp8.zero_fp8.optimizer.edits import Mark, brings_in_non_finite, follow, mark_of
from ds_fp8.zero_fp8.optimizer.entries import DTYPES, Entries
from ds_fp8.zero_fp8.plain_tensors import check_gradient, check_weight
from ds_fp8.zero_fp8.recipe import Recipe, weight_dtypes

logger = logging.getLogger("ds_fp8")

READ_IN_PLACE = {torch.float32: FP32, torch.bfloat16: BF16}  # gradients; others are turned FP32


class States:
    """Checks and sweeps the states of single parameters."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.entries = Entries(recipe)
        self._backends: dict[torch.device, Backend] = {}
        self._controls: dict[torch.device, Tensor] = {}
        self._plans: dict[tuple[Any, ...], Any] = {}  # a GPU's lie in its memory
        # By master: torch does not swap a parameter to which there is a weak reference.
        self._marks: MutableMapping[Tensor, Mark | None] = WeakIdKeyDictionary()

    def sweep(self, entry: dict[str, Any], parameter: Tensor, index: int, scalars: AdamScalars) -> None:
        """One step of a parameter. index: among all of the optimizer, for its random bits."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.dtype not in READ_IN_PLACE:
            gradient = gradient.to(torch.float32)
        weights = parameter.detach().contiguous().view(-1)
        gradient = gradient.detach().contiguous().view(-1)
        state = self.entries.state_of(entry)
        if scalars.step == 1 and not state.master.format.split:  # of a split one the weight is all but zeros
            self._backend(weights.device).quantize(weights, state.master)
        self._sweep_vector(state, gradient, weights, index, scalars)
        if not parameter.is_contiguous():
            parameter.detach().copy_(weights.view(parameter.shape))
        if not parameter.is_inference():
            torch.autograd.graph.increment_version(parameter)  # kernels write behind autograd's back

    def _sweep_vector(
        self, state: AdamState, gradient: Tensor, weights: Tensor, index: int, scalars: AdamScalars
    ) -> None:
        """Sweep whole blocks in place, and a short last block in a padded copy."""
        size = self.recipe.block_size
        blocks, rest = divmod(len(weights), size)
        whole = blocks * size
        if blocks:
            segment = Segment(slice(0, blocks), index, 0)
            self._sweep_rows(state[:blocks], gradient[:whole], weights[:whole], segment, scalars)
        if rest:
            last = torch.zeros(2, size, dtype=torch.float32, device=weights.device)
            last_gradient, last_weights = last[0].to(gradient.dtype), last[1].to(weights.dtype)
            last_gradient[:rest], last_weights[:rest] = gradient[whole:], weights[whole:]
            segment = Segment(slice(0, 1), index, whole)
            self._sweep_rows(state[blocks:], last_gradient, last_weights, segment, scalars)
            weights[whole:] = last_weights[:rest]

    # Edits between steps

    def follow(self, entry: dict[str, Any], parameter: Tensor) -> None:
        """Round edits of the weight into its master; done for all parameters before the first sweep."""
        if self._may_be_edited(entry, parameter):
            follow(self.entries.master_of(entry), parameter.detach().reshape(-1))

    def remember(self, entry: dict[str, Any], parameter: Tensor) -> None:
        """Remember the weight as a step has left it; views of one tensor count together."""
        self._marks[entry["master"]] = mark_of(parameter)

    def _may_be_edited(self, entry: dict[str, Any], parameter: Tensor) -> bool:
        """Whether the weight may differ from its master, by an edit since the last step or a load."""
        if self.recipe.master.split or entry["step"] == 0:
            return False
        mark = mark_of(parameter)
        return mark is None or self._marks.get(entry["master"]) != mark

    def _takes_in_non_finite(self, entry: dict[str, Any], parameter: Tensor) -> bool:
        """Whether the step would bring inf or NaN into a master that cannot hold it or is new."""
        if not entry or entry["step"] == 0:
            return not bool(parameter.isfinite().all())
        if not self.recipe.master.scaled or not self._may_be_edited(entry, parameter):
            return False
        return brings_in_non_finite(self.entries.master_of(entry), parameter.detach().reshape(-1))

    # What may be stepped

    def check(self, name: str, entry: dict[str, Any], parameter: Tensor) -> None:
        """Refuse a step that kernels cannot take, by a ValueError that begins with the parameter's name.

        entry: an empty one if the parameter has none yet.
        """
        check_weight(name, parameter, weight_dtypes(self.recipe.master))
        check_gradient(name, parameter, DTYPES)
        self._backend(parameter.device)
        if entry:
            self.entries.check(name, entry, parameter)
        if self._takes_in_non_finite(entry, parameter):
            raise ValueError(
                f"{name}: received a parameter of shape {list(parameter.shape)} with inf or NaN, "
                "allowed: finite"
            )

    # Kernels

    def _backend(self, device: torch.device) -> Backend:
        if device not in self._backends:
            backend = choose(device)
            if backend.instead:
                logger.warning("plain PyTorch instead of kernels, with the same numbers: %s", backend.instead)
            self._backends[device] = backend
            self._controls[device] = torch.ones(2, dtype=torch.float32, device=device)
        return self._backends[device]

    def _sweep_rows(
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
