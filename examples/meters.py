"""Count bytes from outside: what lives in memory and what is handed to collectives.

Neither asks the optimizer: DeepSpeed's own and ds_fp8's are measured by the same ruler.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of every storage behind the tensors, each once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def live_tensors() -> list[Tensor]:
    """Every tensor that Python still holds."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at an object may wake a deprecated attribute
        return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def optimizer_bytes(module: torch.nn.Module, before: dict[int, int]) -> int:
    """Bytes alive now, less those of `before` and of the module's parameters and buffers."""
    excluded = {**before, **storages([*module.parameters(), *module.buffers()])}
    return sum(size for address, size in storages(live_tensors()).items() if address not in excluded)


class Traffic(TorchDispatchMode):
    """Bytes handed to collectives while active, by collective.

    `handed[name]` sums what one rank hands in: the whole tensor of an all-reduce, its own part of an
    all-gather. `sent(ranks)` turns that into what the rank sends in a ring or pairwise exchange.
    """

    SHARE_SENT: ClassVar = {  # of the bytes handed in, by number of ranks
        "allreduce_": lambda n: 2 * (n - 1) / n,
        "_reduce_scatter_base_": lambda n: (n - 1) / n,
        "reduce_": lambda n: (n - 1) / n,
        "alltoall_base_": lambda n: (n - 1) / n,
        "_allgather_base_": lambda n: n - 1,
        "broadcast_": lambda n: (n - 1) / n,
    }

    def __init__(self) -> None:
        super().__init__()
        self.handed: Counter[str] = Counter()

    def sent(self, ranks: int) -> float:
        return sum(self.SHARE_SENT[name](ranks) * size for name, size in self.handed.items())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and func._opname in self.SHARE_SENT:
            gives = args[1] if func._opname in ("_allgather_base_", "alltoall_base_") else args[0]
            tensors = gives if isinstance(gives, list) else [gives]
            size = sum(tensor.nbytes for tensor in tensors)
            self.handed[func._opname] += size
        return func(*args, **(kwargs or {}))
