"""Host memory available to this process: a kernel that runs out of it kills processes without a message."""

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("ds_fp8")

MEMORY = Path("/proc/meminfo")
GROUPS = (  # of versions 2 and 1 of Linux's control groups: files of limit and use
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # environment variables of launchers
WHAT = "offloaded states (zero_optimization.offload_optimizer)"


def refuse_too_much(nbytes: int) -> None:
    """Refuse more than this machine can ever hold; warn if that is not free now. nbytes: of every rank.

    Raises ValueError.
    """
    processes = local_processes()
    wanted, found = nbytes * processes, list(limits())
    if not found:
        return
    limit, free = (min(each) for each in zip(*found, strict=True))
    asked = f"{WHAT} take {nbytes / 1e9:.2f} GB of host memory per rank, with {processes} on this machine"
    if wanted > limit:
        raise ValueError(f"{asked}, allowed: {limit / 1e9:.2f} GB, the memory of the machine or container")
    if wanted > free:
        logger.warning("%s; %.2f GB are free: the kernel may kill this process", asked, free / 1e9)


def local_processes() -> int:
    """Return the number of ranks on this machine, as the launcher sets it; 1 if it does not."""
    return next((int(os.environ[name]) for name in LOCAL_RANKS if os.environ.get(name, "").isdigit()), 1)


def limits() -> Iterator[tuple[int, int]]:
    """Yield the limit and the free bytes of the machine and of this process's container."""
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        yield tuple(int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))  # type: ignore[misc]
    for limit, used in GROUPS:
        with suppress(OSError, ValueError):  # "max" is no number and means no limit
            most = int(limit.read_text())
            yield most, most - int(used.read_text())


def memlock_limit() -> str:
    """Return the limit of `ulimit -l`, as text."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "any amount (ulimit -l)" if soft == resource.RLIM_INFINITY else f"{soft / 1e9:.2f} GB (ulimit -l)"
