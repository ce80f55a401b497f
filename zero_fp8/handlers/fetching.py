"""DeepSpeed's fetching of weights under ZeRO 3, with slices of whole blocks and fetches of ours.

Hooks on modules, prefetch, persistence and release are DeepSpeed's own. What is ours: how a parameter is cut
(`weights.slices`), how it travels (`weights.fetch`), and to be told when a module has ended its backward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn import Module, Parameter

from ds_fp8.compat import DeepSpeedZeRoOffload
from ds_fp8.zero_fp8.weights import fetch
from ds_fp8.zero_fp8.weights.slices import cut

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
        for parameter in names:
            cut(parameter, block_size)

    def install(self, on_module_end: OnModuleEnd) -> None:
        """Fetch from now on, and say when modules end their backward."""
        self.offload.on_module_end = on_module_end
        fetch.install(self._names, self._names.__getitem__)
        self.fetch_persistent()

    def release(self) -> None:
        """Leave slices alone of every parameter, as a step, a save and a load need it."""
        self.offload.partition_all_parameters()

    def fetch_persistent(self) -> None:
        """Make whole what stays whole between steps. Collective."""
        fetch.fetch(self.persistent, self._names.__getitem__)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Slices alone, until the `with` ends."""
        self.release()
        try:
            yield
        finally:
            self.fetch_persistent()

    def remove(self) -> None:
        """Take the hooks off; parameters stay as they are."""
        self.offload.destroy()


def _forget_functions(model: Module) -> None:
    """Drop the autograd functions of an engine: DeepSpeed leaves them, and the next engine would use them."""
    for module in model.modules():
        for name in AUTOGRAD_FUNCTIONS:
            module.__dict__.pop(name, None)
