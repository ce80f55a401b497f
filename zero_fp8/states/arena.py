"""Host memory for states: one mapping per rank, exactly as large as the states, pinned if a GPU reads it.

torch rounds each of its pinned blocks up to a power of two, so to up to twice the bytes wanted. Here the
kernel maps pages, which CUDA registers as they are, in one call: it refuses a copy from or to memory of two
calls. A forked process, such as a data loader's worker, does
not get them: pinned pages would be copied for it.

If CUDA refuses to register them they stay pageable: copies are three to six times slower and block the host,
with the same results, and a warning is logged.
"""

import logging
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.states.host_memory import WHAT, memlock_limit

logger = logging.getLogger("ds_fp8")

ALIGNMENT = 64  # bytes; the start of every tensor is a multiple


def aligned(nbytes: int) -> int:
    """Return the bytes of the arena that a tensor takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def room_of(rows: int, block_size: int, fmt: Format) -> int:
    """Return the bytes of the arena that blocks take."""
    return aligned(rows * block_size * fmt.itemsize) + (aligned(rows) if fmt.scaled else 0)


class Arena:
    """Memory that is handed out once, from its first byte to its last."""

    def __init__(self, nbytes: int, device: torch.device | None) -> None:
        """Reserve zeroed memory. device: a GPU that copies from and to it; None: leave it pageable."""
        self.nbytes, self.used = nbytes, 0
        self.pinned = False
        self._memory = mapped(nbytes) if nbytes else None
        if self._memory is not None and device is not None and device.type == "cuda":
            self.pinned = self._pin(torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr(), device)

    def _pin(self, address: int, device: torch.device) -> bool:
        with torch.cuda.device(device):
            reason = register(address, self.nbytes, device)
        if reason is not None:
            logger.warning(
                "offloaded states are NOT pinned: %.2f GB of host memory could not be registered with CUDA "
                "(%s); copies between host and GPU will be 3 to 6 times slower. The process may lock %s",
                self.nbytes / 1e9,
                reason,
                memlock_limit(),
            )
            return False
        self._unpin = weakref.finalize(self, _let_go, address, device, self._memory)
        return True

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return zeros from the next bytes, as a tensor with its own storage."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if not nbytes or self._memory is None:
            return torch.zeros(*shape, dtype=dtype)
        taken = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=self.used)
        self.used += aligned(nbytes)
        return taken.view(dtype).view(*shape)

    def blocks(self, rows: int, block_size: int, fmt: Format) -> Blocks:
        """As `Blocks.zeros`."""
        codes = self.tensor((rows, block_size), fmt.dtype)
        scales = self.tensor((rows,), torch.uint8).fill_(1) if fmt.scaled else None
        return Blocks(codes, scales, fmt)

    def close(self) -> None:
        """Unpin the memory, which is freed with the last of its tensors."""
        if self.pinned:
            self._unpin()
        self._memory = None


def mapped(nbytes: int) -> mmap.mmap:
    """Map zeros in private pages, large ones if the kernel has them; a forked process gets none of them.

    Raises ValueError if the kernel refuses.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(f"{WHAT}: {nbytes / 1e9:.2f} GB of host memory: {error}") from error
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a kernel may lack the first
        with suppress(AttributeError, OSError):
            memory.madvise(getattr(mmap, advice))
    return memory


def register(address: int, nbytes: int, device: torch.device) -> str | None:
    """Register memory with CUDA; if it refuses, as it does from 2^39 bytes on, return the reason."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(cudart.cudaHostRegister(address, nbytes, 0))
    if not code:
        return None
    with suppress(RuntimeError):  # CUDA would report the error to its next caller
        torch.zeros(1, dtype=torch.float32, device=device)
    return f"cudaHostRegister gave error {code}"


def _let_go(address: int, device: torch.device, memory: object) -> None:
    """Undo `register` when no copy is under way; memory: kept alive until then."""
    with suppress(Exception):  # raised by a driver that has shut down
        torch.cuda.synchronize(device)
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(address)
