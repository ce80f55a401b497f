"""Common code of the benchmarks on several GPUs: join the ranks that torchrun started, and report facts.

Tensors of a GPU travel over NCCL, those of the host over gloo. Without a GPU, as in tests, all use gloo.
"""

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, cuda


def join_ranks() -> torch.device:
    """Return this rank's device, with the process group initialised and ds_fp8 registered."""
    warnings.simplefilter("ignore")
    device = torch.device("cpu")
    if cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backends, timeout=timedelta(minutes=3))
    import deepspeed

    import ds_fp8

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo for all, no C++ for minutes
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed()
    ds_fp8.register()
    return device


def wait(device: torch.device) -> None:
    """Wait until a GPU has run what was launched."""
    if device.type == "cuda":
        cuda.synchronize(device)


def limit_memory(gigabytes: float, device: torch.device) -> None:
    """Let torch's allocator use no more than this, as on a GPU that has less."""
    share = gigabytes * 1e9 / cuda.get_device_properties(device).total_memory
    cuda.set_per_process_memory_fraction(min(1.0, share), device)


def facts(device: torch.device) -> dict[str, Any]:
    """Return facts of the run, the same on every rank."""
    import deepspeed

    found = {
        "device": "cpu",
        "ranks": torch.distributed.get_world_size(),
        "backend": "gloo",
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }
    if device.type == "cuda":
        nccl = ".".join(map(str, cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found |= {"device": cuda.get_device_name(device), "backend": f"nccl {nccl}"}
    return found


def slowest(milliseconds: list[float], device: torch.device) -> list[float]:
    """Return the time of the slowest rank in every round."""
    values: Tensor = torch.tensor(milliseconds, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    found: list[float] = values.tolist()
    return found
