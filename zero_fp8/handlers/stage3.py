"""The ZeRO 3 optimizer that DeepSpeed's engine calls.

As under ZeRO 2, plus calls for fetched weights: the backward epilogue, the release of all parameters before a
step, and the fetch of persistent ones after it, also if the step was skipped or failed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ds_fp8.zero_fp8.checkpoint.contracts import Restorable
from ds_fp8.zero_fp8.gradients.schedule import LEAF, ModuleEnds
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer
from ds_fp8.zero_fp8.handlers.fetching import Fetching, Offload
from ds_fp8.zero_fp8.handlers.master_views import as_slices
from ds_fp8.zero_fp8.handlers.slice_access import SliceAccess
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.weights.claims import claim, release
from ds_fp8.zero_fp8.weights.sliced.slices import CODES
from ds_fp8.zero_fp8.weights.tiled import tiled


class Stage3Optimizer(FP8ZeROOptimizer):
    """ZeRO 3: every rank holds slices of all weights."""

    fetching: Fetching
    master_views = staticmethod(as_slices)

    def __init__(
        self,
        make_offload: Callable[[], Offload],
        optimizer: FP8AdamW,
        names: Mapping[Parameter, str],
        *run: Any,
        **options: Any,
    ) -> None:
        """As `FP8ZeROOptimizer`; make_offload: converts the model's parameters and hooks its modules."""
        self._names, self._make_offload = names, make_offload
        super().__init__(optimizer, names, *run, **options)
        self.fetching.install(self._on_module_end)

    def _prepare(self) -> None:
        claim(self._names, self)
        self.fetching = Fetching(self._make_offload(), self._names, self.recipe.block_size)

    def _bind(self) -> None:
        self.slice_access = SliceAccess(self.full_tensors, self.parameters, self.fetching.written)
        self.slice_access.attach(self._names)

    def leave_masters(self) -> None:
        """Do nothing: slices are given back with the values of masters."""

    def _unbind(self) -> None:
        self.slice_access.detach()
        for part, values in self.saved.model_weights.own_values():
            self._give_back(part.home, values)
        for each in tiled(self.parts.weights):
            for home in each.homes:
                self._give_back(home, torch.empty(0, dtype=torch.bfloat16))  # this rank owns nothing of it
        self.fetching.remove()
        release(self._names)

    def _give_back(self, home: Any, values: Tensor) -> None:
        parameter = self.parameters[home.parameter]
        if hasattr(parameter, CODES):
            home.give_back(parameter, values)

    def _on_module_end(self, module: Module) -> None:
        schedule = self.gradients.schedule
        assert isinstance(schedule, ModuleEnds)
        schedule.on_module_end(module)

    # Backward and step

    def backward_epilogue(self) -> None:
        """Release modules whose input needs no gradient: no hook has released them."""
        self.parameter_offload.release_backward_leftovers()

    def _bring_home(self) -> str | None:
        objection, stranger = super()._bring_home(), self.parameter_offload.stranger()
        if stranger is None:
            self.fetching.release()
        if objection is not None:
            self.fetching.restore()
        return objection or stranger

    def step(self, closure: Any = None) -> None:
        """As `FP8ZeROOptimizer.step`."""
        try:
            super().step(closure)
        finally:
            self.fetching.fetch_persistent()

    # What DeepSpeed, TRL and others read

    @property
    def parameter_offload(self) -> Offload:
        """DeepSpeed's hooks and coordinator."""
        return self.fetching.offload

    @property
    def persistent_parameters(self) -> list[Any]:
        """Parameters that stay whole between steps."""
        return self.fetching.persistent

    @property
    def leaf_parameters(self) -> dict[Module, list[Parameter]]:
        """Trained parameters by the module that DeepSpeed fetches as a whole (`set_z3_leaf_modules`)."""
        found: dict[Module, list[Parameter]] = {}
        for each in self.parameters.values():
            leaf = getattr(each, LEAF, None)
            if leaf is not None:
                found.setdefault(leaf, []).append(each)
        return found

    @property
    def module(self) -> Module:
        """The model."""
        module: Module = self.parameter_offload.module
        return module

    @property
    def fp16_groups(self) -> list[list[Parameter]]:
        """`parameters_by_bucket`, under the name that DeepSpeed's utilities use with ZeRO 3."""
        return self.parameters_by_bucket

    def empty_partition_cache(self) -> None:
        """Release all parameters."""
        self.parameter_offload.empty_partition_cache()

    # Checkpoints

    def checkpoint_event_prologue(self) -> None:
        """Prepare for a save or load by DeepSpeed."""
        self.fetching.release()

    def checkpoint_event_epilogue(self) -> None:
        """Fetch persistent parameters after DeepSpeed has saved or loaded."""
        self.fetching.fetch_persistent()

    @contextmanager
    def ready_for_files(self) -> Iterator[None]:
        """As `FP8ZeROOptimizer.ready_for_files`, with parameters released to slices of values."""
        with super().ready_for_files(), self.fetching.set_aside(), self.parts.frozen.as_values():
            yield

    def refresh_fp32_params(self) -> None:
        """Take masters from the current weights and drop gradients, as after loading weights."""
        with self.fetching.released():
            super().refresh_fp32_params()

    _restore_from_bit16_weights = refresh_fp32_params

    def restore(self, source: Restorable) -> None:
        """Restore a checkpoint that has been checked; the weights follow the masters."""
        with self.fetching.released():
            super().restore(source)
