"""DeepSpeed's fetching of weights under ZeRO 3, with slices of whole blocks and fetches of ours.

Hooks on modules, prefetch, persistence and release are DeepSpeed's own. What is ours: how a parameter is cut
(`weights.sliced.slices`), how it travels (`weights.sliced.fetch`), and to be told when a module has ended its
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

AUTOGRAD_FUNCTIONS = ("pre_bwd_fn", "post_bwd_fn")  # attributes of a module that DeepSpeed has hooked
OnModuleEnd = Callable[[Module], None]


class Offload(DeepSpeedZeRoOffload):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's hooks, which also tell when a module has ended its backward."""

    on_module_end: OnModuleEnd = staticmethod(lambda module: None)

    def __init__(self, module: Module, **options: Any) -> None:
        _forget_functions(module)
        super().__init__(module, **options)

    def destroy(self) -> None:
        super().destroy()
        _forget_functions(self.module)

    def stranger(self) -> str | None:
        """What is wrong with a parameter that came after deepspeed.initialize, if there is one."""
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
        # DeepSpeed counts the forwards down and fetches no more at 0; a retained graph has another backward.
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
        self._name = names.__getitem__
        for parameter in names:
            cut(parameter, block_size)

    def install(self, on_module_end: OnModuleEnd) -> None:
        """Fetch from now on, and say when modules end their backward."""
        self.offload.on_module_end = on_module_end
        awaited = self.offload.module.ds_inflight_param_registry
        fetch.install(self._names, self._name, awaited, self._settle)

    def _settle(self) -> None:
        """Release modules that torch.autograd.grad has left in the middle of their backward."""
        if not in_backward():
            self.offload.release_backward_leftovers()

    def release(self) -> None:
        """Leave slices alone of every parameter, as a step, a save and a load need it."""
        self.offload.partition_all_parameters()

    def restore(self) -> None:
        """Drop what was done to parameters behind DeepSpeed's back, and would be lost: slices are left."""
        for each in self._names:
            if objection_to(each) is not None:
                each.data = torch.empty(0, dtype=dtype_of(each), device=held_of(each).device)

    def fetch_persistent(self) -> None:
        """Make whole what stays whole between steps. Collective."""
        fetch.fetch(self._stays_whole(), self._name)

    def _stays_whole(self) -> list[Any]:
        """Persistent parameters, once DeepSpeed has seen a forward.

        In its first one it learns which parameters are used outside their modules, such as those of a
        ParameterList or of nn.MultiheadAttention: by their not being whole when they are asked for.
        """
        return [] if self.offload.get_param_coordinator().is_invalid_trace() else self.persistent

    @contextmanager
    def released(self) -> Iterator[None]:
        """Slices alone, until the `with` ends; whoever was whole is fetched anew. Collective."""
        whole = self._whole()
        self.release()
        try:
            yield
        finally:
            fetch.fetch(dict.fromkeys([*self._stays_whole(), *whole]), self._name)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """As `released`, and whoever was whole is so again as it was, with what was written to it since."""
        whole = [fetch.kept(each) for each in self._whole()]
        self.release()
        try:
            yield
        finally:
            for put_back in whole:
                put_back()

    def _whole(self) -> list[Any]:
        """Parameters that are whole, as persistent ones are, and within GatheredParameters."""
        parameters: Iterable[Any] = self._names
        return [each for each in parameters if each.ds_status == ZeroParamStatus.AVAILABLE]

    def remove(self) -> None:
        """Take the hooks off; parameters stay as they are, and FP8 weights are BF16 again."""
        for each in self._names:
            if hasattr(each, CODES):
                getattr(each, CODES).give_back(each)
        self.offload.destroy()


def _forget_functions(model: Module) -> None:
    """Drop the autograd functions of an engine: DeepSpeed leaves them, and the next engine would use them."""
    for module in model.modules():
        for name in AUTOGRAD_FUNCTIONS:
            module.__dict__.pop(name, None)
