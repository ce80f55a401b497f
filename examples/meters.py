"""Count bytes from outside: what lives in memory and what is handed to collectives.

Neither asks the optimizer: DeepSpeed's own and ds_fp8's are measured by the same ruler.
"""

import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed import ProcessGroup, get_process_group_ranks, get_rank
from torch.utils._python_dispatch import TorchDispatchMode


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of every storage behind the tensors, each once; on the meta device there is none.

    FP8 weights, which give no address away, are asked past their class.
    """
    found = {}
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in tensors:
            if tensor.is_meta or isinstance(tensor, FakeTensor):
                continue
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def elements(module: torch.nn.Module) -> int:
    """Of all parameters when they are whole: ZeRO 3 leaves them empty between uses."""
    return sum(getattr(each, "ds_numel", each.numel()) for each in module.parameters())


def live_tensors() -> list[Tensor]:
    """Every tensor that Python still holds."""
    time.sleep(0.02)  # gloo's threads let go of a tensor a moment after it was waited for
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at an object may wake a deprecated attribute
        return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def optimizer_bytes(module: torch.nn.Module, before: dict[int, int]) -> int:
    """Bytes alive now, less those of `before` and of the module's parameters, their slices, and buffers."""
    parameters = list(module.parameters())
    slices = [getattr(each, "ds_tensor", each) for each in parameters]
    excluded = {**before, **storages([*parameters, *slices, *module.buffers()])}
    return sum(size for address, size in storages(live_tensors()).items() if address not in excluded)


class Traffic(TorchDispatchMode):
    """Bytes of collectives while active, by collective.

    `handed` sums what this rank hands in: the whole tensor of an all-reduce, its own part of an all-gather.
    `sent` is what the rank sends for that in a ring or in pairs, within the collective's own group.
    `crossed` is the part of a pairwise exchange that leaves the node, which is `node_size` consecutive ranks.
    """

    SHARE_SENT: ClassVar = {  # of the bytes handed in, by number of ranks
        "allreduce_": lambda n: 2 * (n - 1) / n,
        "reduce_": lambda n: (n - 1) / n,
        "broadcast_": lambda n: (n - 1) / n,
        "_reduce_scatter_base_": lambda n: (n - 1) / n,
        "alltoall_base_": lambda n: (n - 1) / n,
        "_allgather_base_": lambda n: n - 1,
    }
    IN_PAIRS: ClassVar = {  # what goes to each other rank, of the bytes handed in
        "alltoall_base_": lambda n: 1 / n,
        "_allgather_base_": lambda n: 1,
    }
    WITHOUT_BYTES = ("barrier",)

    def __init__(self, node_size: int = 1) -> None:
        super().__init__()
        self._node_size = node_size
        self.handed: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.crossed: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and func._opname not in self.WITHOUT_BYTES:
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        """Raises KeyError for a collective that it does not know."""
        share = self.SHARE_SENT[name]
        group = next(place for place, each in enumerate(args) if isinstance(each, torch.ScriptObject))
        gives = args[group - 1]  # an output, where there is one, comes before it
        size = sum(each.nbytes for each in (gives if isinstance(gives, list) else [gives]))
        ranks = get_process_group_ranks(ProcessGroup.unbox(args[group]))
        self.handed[name] += size
        self.sent[name] += share(len(ranks)) * size
        if name in self.IN_PAIRS:
            elsewhere = sum(each // self._node_size != get_rank() // self._node_size for each in ranks)
            self.crossed[name] += elsewhere * self.IN_PAIRS[name](len(ranks)) * size
