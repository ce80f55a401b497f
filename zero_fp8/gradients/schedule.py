"""When buckets leave during a backward, and in which order: the same order on every rank.

**ZeRO 1 and 2.** In index order, each as soon as its last gradient has arrived (`Arrivals`).

**ZeRO 3.** Backward fetches weights, too, and ranks that meet in one collective must not wait for each other
in another. So a full bucket leaves where a module has ended its backward: between the same fetches on every
rank (`ModuleEnds`). Which module that is, a backward shows: the first one to end after the bucket's last
gradient has arrived. The ranks agree on the latest of their places, and buckets leave in the order of these.
A bucket that lacked a gradient on some rank, or was full after the last module had ended, leaves at the end
of backward, as does everything that has not left by then. While places are being learnt, buckets leave in
index order, each at the first module end that finds it full.

A module that DeepSpeed fetches as a whole (`set_z3_leaf_modules`), such as the experts of a mixture, may use
other parameters on each rank. Its bucket must not wait for those that this rank did not use: they count as
arrived when the module has ended.

What was learnt is forgotten, on all ranks, when a bucket of any rank was not full at its place: parameters or
modules are then used in another way than before. Only full buckets leave during backward, so when one leaves
changes no number.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module, Parameter

from ds_fp8.zero_fp8.comm.collectives import max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.partition import Bucket

AT_THE_END = 2**31 - 1  # place of a bucket that leaves when backward has ended
LEAF = "ds_z3_leaf_module"  # DeepSpeed's attribute of a parameter: the module that is fetched as a whole
End = tuple[Hashable, int]  # a module, and how often it had ended its backward in this round


class Schedule(Protocol):
    """Decides when each bucket is sent."""

    open: bool  # whether a backward is running whose gradients travel
    order: Sequence[int]  # order in which buckets are sent
    patient: bool  # a rank must not wait for a bucket before backward has ended
    changed: bool  # since the last step, if some bucket of this rank was not full at its place

    def listen(self, parameters: Mapping[int, Parameter], on_leave: Callable[[], None]) -> None:
        """Register hooks; `on_leave` is called when buckets may be sent. Call it again after a cast."""

    def renew(self) -> None:
        """Called when a backward begins."""

    def may_leave(self, bucket: int) -> bool:
        """Whether the bucket is sent now, given that those before it have been."""

    def end_round(self) -> None:
        """Called when every bucket has been sent, on every rank. Collective."""

    def start_round(self) -> None:
        """Reset: no gradient has arrived and no backward is running."""

    def forget(self) -> None:
        """Learn the order again, on every rank."""

    def remove(self) -> None:
        """Remove the hooks."""


class LastHook:
    """A hook of a node that runs after all others; autograd holds nodes weakly, so it is held here too."""

    def __init__(self, node: Node, function: Callable[..., None]) -> None:
        self._node, self._function = node, function
        self._handle = node.register_hook(function)

    def renew(self) -> None:
        """Run after those that have been registered since."""
        self._handle.remove()
        self._handle = self._node.register_hook(self._function)

    def remove(self) -> None:
        self._handle.remove()


class Arrivals:
    """Sends buckets in index order, as gradients arrive."""

    patient = False
    changed = False

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self.order: Sequence[int] = range(len(buckets))
        self._hooks: dict[int, LastHook] = {}  # by parameter
        self.start_round()

    def listen(self, parameters: Mapping[int, Parameter], on_leave: Callable[[], None]) -> None:
        """Hook the nodes that accumulate: their hooks run after all that hang on the parameters."""
        for bucket in self._buckets:
            for index in (slot.parameter for slot in bucket.slots):
                if parameters[index].requires_grad:
                    on_gradient = partial(self._on_gradient, bucket.index, index, on_leave)
                    if index in self._hooks:
                        self._hooks[index].remove()
                    self._hooks[index] = LastHook(accumulating_node(parameters[index]), on_gradient)

    def _on_gradient(self, bucket: int, index: int, on_leave: Callable[[], None], *_: object) -> None:
        if self.open:
            self._missing[bucket].discard(index)
            on_leave()

    def renew(self) -> None:
        self.open = True
        for hook in self._hooks.values():
            hook.renew()

    def may_leave(self, bucket: int) -> bool:
        return not self._missing[bucket]

    def end_round(self) -> None:
        pass

    def start_round(self) -> None:
        self.open = False
        self._missing = missing_of(self._buckets)

    def forget(self) -> None:
        pass

    def remove(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()


class ModuleEnds:
    """Sends buckets in a learnt order, when modules end their backward."""

    patient = True

    def __init__(self, buckets: Sequence[Bucket], nodes: Nodes, device: torch.device) -> None:
        """nodes, device: of the ranks that agree."""
        self._buckets = buckets
        self._nodes = nodes
        self._device = device
        self._hooks: list[Any] = []
        self.changed = False
        self.forget()
        self.start_round()

    def forget(self) -> None:
        self.order: Sequence[int] = range(len(self._buckets))
        self._last: dict[Module, int] = {}  # of a module fetched as a whole: its ends in a round, once learnt
        self._triggers: dict[int, End | None] | None = None  # by bucket; None: to be learnt

    def listen(self, parameters: Mapping[int, Parameter], on_leave: Callable[[], None]) -> None:
        """Hook the parameters: buckets leave elsewhere, when all hooks have run."""
        self.remove()
        self._on_leave = on_leave
        self._fetched_as_a_whole: dict[Module, list[tuple[int, int]]] = {}  # buckets and parameters
        for bucket in self._buckets:
            for index in (slot.parameter for slot in bucket.slots):
                parameter: Any = parameters[index]  # torch's stub of the hook has no types
                leaf = getattr(parameter, LEAF, None)
                if leaf is not None:
                    self._fetched_as_a_whole.setdefault(leaf, []).append((bucket.index, index))
                if parameter.requires_grad:
                    on_gradient = partial(self._on_gradient, bucket.index, index)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(on_gradient))

    def _on_gradient(self, bucket: int, index: int, _: object) -> None:
        if self.open:
            self._missing[bucket].discard(index)
            self._places[bucket] = len(self._ends)

    def on_module_end(self, module: Module) -> None:
        """Called when a module has ended its backward."""
        if self.open:
            self._counts[module] += 1
            self._ends[module, self._counts[module]] = None
            if self._counts[module] >= self._last.get(module, 1):
                self._count_as_arrived(self._fetched_as_a_whole.get(module, ()))
            self._on_leave()

    def _count_as_arrived(self, parameters: Iterable[tuple[int, int]]) -> None:
        """Wait no longer for these parameters of a module that has just ended."""
        for bucket, index in parameters:
            if index in self._missing[bucket]:
                self._missing[bucket].discard(index)
                self._places[bucket] = len(self._ends) - 1

    def renew(self) -> None:
        self.open = True

    def may_leave(self, bucket: int) -> bool:
        return not self._missing[bucket] and self._is_its_turn(bucket)

    def _is_its_turn(self, bucket: int) -> bool:
        return self._triggers is None or self._triggers[bucket] in self._ends

    def end_round(self) -> None:
        if self._triggers is None:
            self._learn()
            return
        expected = [bucket for bucket, trigger in self._triggers.items() if trigger is not None]
        self.changed = self.changed or not all(map(self.may_leave, expected))

    def _learn(self) -> None:
        """Agree on each bucket's place; with the fewest module ends of a rank, as a negative number."""
        places = [
            AT_THE_END if missing else self._places[index] for index, missing in enumerate(self._missing)
        ]
        agreed = torch.tensor([*places, -len(self._ends)], dtype=torch.int32, device=self._device)
        max_over_ranks(agreed, self._nodes.group)
        *places, fewest = agreed.tolist()
        if not fewest:
            return  # a round without a backward shows nothing
        places = [place if place < -fewest else AT_THE_END for place in places]
        ends = [*self._ends]
        self._triggers = {
            bucket: None if place == AT_THE_END else ends[place] for bucket, place in enumerate(places)
        }
        self.order = sorted(range(len(places)), key=places.__getitem__)
        self._last = {leaf: self._counts[leaf] for leaf in self._fetched_as_a_whole}

    def start_round(self) -> None:
        self.open = False
        self._missing = missing_of(self._buckets)
        self._places: dict[int, int] = {}  # module ends before a bucket's last gradient, by bucket
        self._ends: dict[End, None] = {}  # in order
        self._counts: Counter[Module] = Counter()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def missing_of(buckets: Sequence[Bucket]) -> list[set[int]]:
    """The parameters whose gradients have not arrived, by bucket: all."""
    return [{slot.parameter for slot in bucket.slots} for bucket in buckets]


def accumulating_node(parameter: Parameter) -> Node:
    """The node that accumulates a parameter's gradient, also of one that is read in a way of its own."""
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(parameter).node
