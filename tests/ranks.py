"""Run plain functions on real gloo ranks.

Ranks are processes that stay alive between tests, one set a world size. They are forked from a server that
has imported what every rank needs, which takes seconds. A rank that raises or hangs takes its set down, and
the next test starts a fresh one.
"""

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch.distributed
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _world

HANG = 300.0  # seconds after which a rank is taken to hang
FORKED = mp.get_context("forkserver")
IMPORTED = ["engines", "torch._inductor.compile_fx"]  # by the server: with them come deepspeed and ds_fp8


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def start_server() -> None:
    """Before the first process of FORKED is started."""
    FORKED.set_forkserver_preload(IMPORTED)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server does not look where we do
        forkserver.ensure_running()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(rank_environment(rank, world_size, port))
    import deepspeed
    import torch

    import ds_fp8

    torch.set_num_threads(1)
    linear = torch.nn.functional.linear
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of C++ for nothing here
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    ds_fp8.register()
    gc.freeze()  # what was imported: collections, of which tests make many, pass over it
    names = set(_world.pg_names.values())
    while True:
        request = pipe.recv()
        if request is None:
            break
        function, arguments = request
        torch.nn.functional.linear = linear  # which ZeRO 3 replaces for good
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            break
        del request, function, arguments
        names = leave_groups(names)
    torch.distributed.destroy_process_group()


def leave_groups(earlier: set[str]) -> set[str]:
    """Give up process groups that a function made and left: each has threads, and they poll.

    earlier: names of those that there were before. Returns the names of those that are left; DeepSpeed keeps
    some for the next engine.
    """
    made = [group for group, name in _world.pg_names.items() if name not in earlier]
    if made:
        kept = list(_kept_by_deepspeed())
        for group in [each for each in made if not any(each is other for other in kept)]:
            torch.distributed.destroy_process_group(group)
            _take_from_holders(group)
    return set(_world.pg_names.values())


def _take_from_holders(group: object) -> None:
    """DeepSpeed frees no engine of ZeRO 3: only if that holds its groups no longer, their threads end."""
    for holder in gc.get_referrers(group):
        attributes = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        for name in [name for name, value in attributes.items() if value is group]:
            attributes[name] = None


def _kept_by_deepspeed() -> Iterator[object]:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    for value in (*vars(groups).values(), *vars(parallel_state_sp).values()):
        if isinstance(value, DeviceMesh):
            yield from value.get_all_groups()
        else:
            yield from value.values() if isinstance(value, dict) else [value]


class Ranks:
    """`world_size` processes in one process group."""

    def __init__(self, world_size: int) -> None:
        start_server()
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = FORKED.Pipe()
            process = FORKED.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = HANG) -> list[Any]:
        """The function's results by rank. Raises AssertionError with a rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            outcome = self._receive(pipe, seconds)
            if outcome is None or not outcome[0]:
                self._report_and_stop(rank, outcome)
            results.append(outcome[1])
        return results

    @staticmethod
    def _receive(pipe: Connection, timeout: float) -> Any:
        try:
            return pipe.recv() if pipe.poll(timeout) else None
        except EOFError:
            return None

    def _report_and_stop(self, rank: int, outcome: Any) -> None:
        """Prefer the rank that raised to one that waited for it."""
        failures = {rank: outcome[1]} if outcome else {}
        for other, pipe in enumerate(self._pipes):
            late = self._receive(pipe, 2.0) if other != rank else None
            if late and not late[0]:
                failures[other] = late[1]
        self.stop()
        told = "\n".join(f"rank {number}: {text}" for number, text in failures.items())
        raise AssertionError(told or f"rank {rank} hung or died")

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class RankPools:
    """Ranks by world size, started when first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, Ranks] = {}

    def run(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, seconds: float = HANG
    ) -> list[Any]:
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = Ranks(world_size)
        return pool.run(function, *arguments, seconds=seconds)

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()


def on_examples_path() -> None:
    """Let tests, and the ranks they start, import the example's modules."""
    examples = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
