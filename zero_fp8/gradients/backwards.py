"""The rules for what counts as a backward.

PyTorch's rule holds: every gradient that reaches a trained parameter counts, until a step or `zero_grad`,
whichever forward it came from and however backward was called. Two things are DeepSpeed's:

- Each backward is divided by the micro-steps of a step. `engine.backward` divides its loss; under
  `loss.backward()` each gradient is divided where it arrives, so that terms of a loss count alike whether
  they went through the engine's output or not, and `torch.autograd.grad` gives what it gives in PyTorch.
- Ranks exchange gradients during a backward and at its end. A call of `torch.autograd.grad`, or a backward
  towards some tensors only (`inputs=`), may happen on one rank alone: it exchanges nothing, and what it
  leaves in `.grad` goes with the next backward's, or before the step.

Which of these is running is asked of autograd, by names that torch keeps private but uses in
`torch.utils.checkpoint` and `torch.autograd.graph` itself; `ds_fp8.compat` checks that they are there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle


def in_backward() -> bool:
    """Whether autograd is running on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def covers_whole_graph() -> bool:
    """In a tensor's hook: whether this is a backward to all leaves, not a call for some tensors' gradients.

    A call for some tensors is one where autograd forbids reentrant checkpointing, but for a node at which it
    ends: that one executes none of the nodes that follow.
    """
    if not torch.autograd.Variable._execution_engine.is_checkpoint_valid():
        return False
    node = torch._C._current_autograd_node()
    followers = [each for each, _ in node.next_functions if each is not None] if node is not None else []
    return not followers or any(_executes(each) for each in followers)


def accumulates() -> bool:
    """In a parameter's hook: whether the gradient will be added to `.grad`."""
    node = torch._C._current_autograd_node()
    return node is None or _executes(node)


def _executes(node: torch.autograd.graph.Node) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad hands out
        return False


class EngineBackwards:
    """Counts the calls of `engine.backward` that are running, of any engine."""

    def __init__(self) -> None:
        self._running = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    @property
    def running(self) -> bool:
        return self._running > 0


ENGINE_BACKWARDS = EngineBackwards()


class ArrivalHooks:
    """Hooks that see each gradient of a trained parameter before all other hooks.

    before: called where no `engine.backward` is running and a gradient is about to be added to a
    parameter's `.grad`; returns what the gradient is divided by, or raises.
    """

    def __init__(self, parameters: Mapping[int, Parameter], before: Callable[[], float]) -> None:
        self._hooks = [_hook_first(each, partial(self._on_gradient, before)) for each in parameters.values()]

    @staticmethod
    def _on_gradient(before: Callable[[], float], gradient: Tensor | None) -> Tensor | None:
        if gradient is None or ENGINE_BACKWARDS.running or not accumulates():
            return None  # a custom function may have added to `.grad` by itself
        divisor = before()
        return None if divisor == 1 else gradient / divisor

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _hook_first(parameter: Parameter, hook: Callable[[Tensor | None], Tensor | None]) -> RemovableHandle:
    """Register a hook that runs before those that the parameter has already."""
    handle: RemovableHandle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    hooks = parameter._backward_hooks  # a dict, which autograd walks in the order of insertion
    assert hooks is not None
    earlier = [(key, each) for key, each in hooks.items() if key != handle.id]
    for key, each in earlier:
        del hooks[key]
        hooks[key] = each
    return handle
