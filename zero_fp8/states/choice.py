"""Choose the executor that steps offloaded states: `fp8.offload.executor` or, if that is auto, the faster.

stream moves all states over the link, in both directions at once; host reads and writes them in place, and
meanwhile moves two bytes of weights per parameter. So the link, the cores and the level count: each is
measured briefly, on this machine, by all ranks at once, since they share memory and links. The slowest rank
decides.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import Backend
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import E4M3, Format
from ds_fp8.ops.rounding import Rounding
from ds_fp8.zero_fp8.states.arena import Arena
from ds_fp8.zero_fp8.states.host_memory import local_processes
from ds_fp8.zero_fp8.states.lanes import Lane, mark

HOST = torch.device("cpu")
LINK_BYTES = 1 << 26  # copied in each direction at once
SWEPT = 1 << 24  # parameters that are swept, more than caches hold
ROUNDS = 3
WEIGHT = 2  # bytes of a weight that is uploaded


@dataclass(frozen=True)
class Estimate:
    """Nanoseconds per parameter that a rank owns."""

    stream: float
    host: float

    @property
    def faster(self) -> str:
        return "host" if self.host < self.stream else "stream"

    def __str__(self) -> str:
        return f"stream {self.stream:.3f}, host {self.host:.3f} ns per parameter of a rank"


def cores_of_a_rank() -> int:
    """Cores of this process, divided among the machine's ranks unless each rank has its own."""
    own, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return max(1, own // local_processes() if own == all_of_them else own)


def measure(
    formats: Sequence[Format], block_size: int, rounding: Rounding, device: torch.device, host: Backend
) -> Estimate:
    """Measure. formats: of master, exp_avg and exp_avg_sq; device: a GPU; host: kernels of its sweep."""
    state_bytes = sum(fmt.itemsize + fmt.scaled / block_size for fmt in formats)
    per_byte = _link(device)
    sweep = _sweep(formats, block_size, rounding, host)
    return Estimate(state_bytes * per_byte, max(sweep, WEIGHT * per_byte))


def _best(act: Callable[[], None]) -> float:
    """Return the shortest time of a call, in nanoseconds."""
    act()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e9


def _link(device: torch.device) -> float:
    """Return nanoseconds per byte, with copies in both directions at once."""
    arena = Arena(2 * LINK_BYTES, device)
    there = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    here = [arena.tensor((LINK_BYTES,), torch.uint8) for _ in range(2)]
    up, down = Lane(device), Lane(device)

    def act() -> None:
        now = mark(device)
        with up.after(now):
            there[0].copy_(here[0], non_blocking=True)
        with down.after(now):
            here[1].copy_(there[1], non_blocking=True)
        up.wait()
        down.wait()

    taken = _best(act) / LINK_BYTES
    arena.close()
    return taken


def _sweep(formats: Sequence[Format], block_size: int, rounding: Rounding, host: Backend) -> float:
    """Return nanoseconds per parameter of the host's sweep."""
    rows = SWEPT // block_size
    master, exp_avg, exp_avg_sq = (Blocks.zeros(rows, block_size, fmt, HOST) for fmt in formats)
    sweep = Sweep(
        AdamState(master, exp_avg, exp_avg_sq),
        Blocks.zeros(rows, block_size, E4M3, HOST),
        torch.zeros(rows, block_size, dtype=torch.bfloat16),
        host.plan([Segment(slice(0, rows), 0, 0)], rows, block_size, HOST),
        AdamScalars(1, 1e-3, 0.9, 0.95, 1e-8, 0.1, True, True, 1.165),
        torch.ones(2, dtype=torch.float32),
        rounding,
    )
    return _best(lambda: host.adam_step(sweep)) / SWEPT
