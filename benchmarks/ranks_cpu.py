"""Runs a function on gloo ranks, processes of this machine."""

import itertools
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the function's results by rank. Raises ProcessRaisedException with a failed rank's traceback."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # of the ranks
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank_main, (ranks, _free_port(), results, function, arguments), nprocs=ranks, join=True)
        return [results[rank] for rank in range(ranks)]


def in_turn(
    engines: Mapping[str, Any], batches: Iterator[Any], iterate: Callable[[Any, Any], Any]
) -> Iterator[dict[str, Any]]:
    """Yield each engine's result, round by round without end; each round begins with another engine."""
    for number in itertools.count():
        batch = next(batches)
        names = sorted(engines, reverse=bool(number % 2))
        yield {name: iterate(engines[name], batch) for name in names}


def _rank_main(
    rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Run in a spawned process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    warnings.simplefilter("ignore")
    import deepspeed

    import ds_fp8

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo everywhere, and no C++ for minutes
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    ds_fp8.register()
    results[rank] = function(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])
