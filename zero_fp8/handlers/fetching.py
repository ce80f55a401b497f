"""DeepSpeed's fetching of weights under ZeRO 3, with slices of whole blocks and our own fetches.

Hooks on modules, prefetch, persistence and release are DeepSpeed's own. Ours are: how a parameter is cut
(`weights.sliced.slices`), how it travels (`weights.sliced.fetch`), and a call when a module has ended its
backward.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module, Parameter

from ds_fp8.compat import DeepSpeedZeRoOffload, ZeroParamStatus
from ds_fp8.zero_fp8.gradients.backwards import in_backward
from ds_fp8.zero_fp8.placement.parameters import held_of
from ds_fp8.zero_fp8.weights.sliced import fetch
from ds_fp8.zero_fp8.weights.sliced.slices import CODES, cut, dtype_of, objection_to

AUTOGRAD_FUNCTIONS = ("pre_bwd_fn", "post_bwd_fn")  # attributes of a module with DeepSpeed's hooks
OnModuleEnd = Callable[[Module], None]


class Offload(DeepSpeedZeRoOffload):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's hooks, plus a call when a module has ended its backward."""

    on_module_end: OnModuleEnd = staticmethod(lambda module: None)

    def __init__(self, module: Module, **options: Any) -> None:
        _forget_functions(module)
        super().__init__(module, **options)

    def destroy(self) -> None:
        super().destroy()
        _forget_functions(self.module)

    def stranger(self) -> str | None:
        """Return an objection to a parameter that was added after deepspeed.initialize, if there is one."""
        known = ((name, hasattr(each, "ds_id")) for name, each in self.module.named_parameters())
        name = next((name for name, is_known in known if not is_known), None)
        return name and (
            f"{name}: received a parameter that was not in the model when deepspeed.initialize was called, "
            "allowed under ZeRO 3: those that were (exchange modules and assign parameters before it)"
        )

    def pre_sub_module_forward_function(self, sub_module: Module) -> None:
        try:
            super().pre_sub_module_forward_function(sub_module)
        except AttributeError as error:  # DeepSpeed looks for its own attributes on every parameter
            stranger = self.stranger()
            if stranger is None:
                raise
            raise ValueError(stranger) from error

    def pre_sub_module_backward_function(self, sub_module: Any) -> None:
        super().pre_sub_module_backward_function(sub_module)
        # DeepSpeed counts forwards down and stops fetching at 0, but a retained graph has another backward.
        sub_module.applied_pre_backward_ref_cnt += 1

    def post_sub_module_backward_function(self, sub_module: Module) -> None:
        super().post_sub_module_backward_function(sub_module)
        self.on_module_end(sub_module)


class Fetching:
    """The parameters of a model as slices, fetched where modules use them."""

    def __init__(self, offload: Offload, names: Mapping[Parameter, str], block_size: int) -> None:
        """Cut all parameters anew. Collective. names: every parameter of the model."""
        self.offload = offload
        self.persistent: list[Any] = offload.persistent_parameters
        self._names = names
        self._slices = fetch.Slices(names.__getitem__)
        for parameter in names:
            cut(parameter, block_size)

    def install(self, on_module_end: OnModuleEnd) -> None:
        """Fetch from now on; on_module_end is called when a module has ended its backward."""
        self.offload.on_module_end = on_module_end
        awaited = self.offload.module.ds_inflight_param_registry
        fetch.install(self._names, self._slices, awaited, self._settle)
        self.written()

    def written(self) -> None:
        """Make fetches from now on wait for slices written on the current stream."""
        self._slices.written(next(iter(self._names)).device)

    def _settle(self) -> None:
        """Release modules that torch.autograd.grad left in the middle of their backward."""
        if not in_backward():
            self.offload.release_backward_leftovers()

    def release(self) -> None:
        """Release all parameters except their slices, as steps, saves and loads require."""
        self.offload.partition_all_parameters()

    def restore(self) -> None:
        """Drop changes made without DeepSpeed's knowledge: only slices are left."""
        for each in self._names:
            if objection_to(each) is not None:
                each.data = torch.empty(0, dtype=dtype_of(each), device=held_of(each).device)

    def fetch_persistent(self) -> None:
        """Fetch the parameters that stay whole between steps, after slices were written. Collective."""
        self.written()
        fetch.fetch(self._stays_whole(), self._slices)

    def _stays_whole(self) -> list[Any]:
        """Return persistent parameters, once DeepSpeed has seen a forward.

        In the first forward it learns which parameters are used outside their modules, such as those of a
        ParameterList or of nn.MultiheadAttention: they are not whole when they are used.
        """
        return [] if self.offload.get_param_coordinator().is_invalid_trace() else self.persistent

    @contextmanager
    def released(self) -> Iterator[None]:
        """Keep only slices until the `with` ends, then fetch whole parameters anew. Collective."""
        whole = self._whole()
        self.release()
        try:
            yield
        finally:
            self.written()
            fetch.fetch(dict.fromkeys([*self._stays_whole(), *whole]), self._slices)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """As `released`, but make whole parameters whole again as they were, with later writes to them."""
        whole = [fetch.kept(each) for each in self._whole()]
        self.release()
        try:
            yield
        finally:
            self.written()
            for put_back in whole:
                put_back()

    def _whole(self) -> list[Any]:
        """Return whole parameters: persistent ones and those within GatheredParameters."""
        parameters: Iterable[Any] = self._names
        return [each for each in parameters if each.ds_status == ZeroParamStatus.AVAILABLE]

    def remove(self) -> None:
        """Remove the hooks; parameters stay as they are, and FP8 weights become BF16 again."""
        for each in self._names:
            if hasattr(each, CODES):
                getattr(each, CODES).give_back(each)
        self.offload.destroy()


def _forget_functions(model: Module) -> None:
    """Delete an engine's autograd functions: DeepSpeed leaves them, and the next engine would use them."""
    for module in model.modules():
        for name in AUTOGRAD_FUNCTIONS:
            module.__dict__.pop(name, None)
