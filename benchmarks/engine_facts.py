"""Facts about a training engine, found from outside: bytes it should hold, bytes it sends, waits.

The same code serves ds_fp8's engines and stock DeepSpeed's.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdp2 import BYTES, Fsdp2
from torch import cuda
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.distributed import get_world_size
from torch.profiler import ProfilerActivity, profile, record_function

import ds_fp8
from ds_fp8.estimate.memory import gradient_bytes, state_bytes

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from meters import Traffic, elements

WAITS = {  # of the host for the device, under the profiler's names
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::_local_scalar_dense",  # called by item()
}
STEP = "engine.step"


def predicted_bytes(engine: Any) -> float:
    """Return a rank's bytes of states and reduced gradient, by `estimate.memory`; stock's by its formats."""
    if ds_fp8.is_active(engine):
        recipe, buckets = engine.optimizer.recipe, engine.optimizer.parts.buckets
        return state_bytes(recipe, buckets) + gradient_bytes(recipe, buckets, accumulating=False)
    parameters = elements(engine.module)
    if isinstance(engine, Fsdp2):
        return BYTES * parameters / get_world_size()
    low = engine._config._param_dict["bf16"].get("bf16_optimizer_states", False)
    gradient = 2 if engine.zero_optimization_stage() == 3 else 0  # kept between steps, too
    return ((6 if low else 12) + gradient) * parameters / engine.seq_dp_world_size


def weights_saved(engine: Any) -> float:
    """Return the bytes by which FP8 weights lower a rank's peak: those that it keeps and those it fetches."""
    about = ds_fp8.describe(engine) if ds_fp8.is_active(engine) else {}
    if "fp8_elements" not in about:
        return 0.0
    parameters = elements(engine.module)
    if engine.zero_optimization_stage() < 3:
        return float(2 * parameters - about["weight_bytes"])
    kept = 2 * parameters / engine.seq_dp_world_size - about["weight_bytes"]
    return float(kept + min(engine.zero_max_live_parameters(), parameters) * about["fp8_share"])


def gradient_bytes_sent(engine: Any) -> float | None:
    """Return the estimate of a step's gradient bytes that a rank sends; None if not in one hop of FP8."""
    about = ds_fp8.describe(engine) if ds_fp8.is_active(engine) else {"nodes": 0}
    if about["nodes"] != 1:
        return None
    ranks = engine.seq_dp_world_size
    each = about["wire_bytes_per_gradient_element"] * (ranks - 1) / ranks
    return float(each * elements(engine.module) * engine.gradient_accumulation_steps())


def decodes(engine: Any) -> int:
    """Count how often FP8 weights have been decoded for what is not a product."""
    matrices = (getattr(each, "matrix", None) for each in engine.module.parameters())
    return sum(each.decodes for each in matrices if each is not None)


def waits(step: Callable[[], object]) -> dict[str, int]:
    """Count, by name, the host's waits for the device and copies from it within a step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        with record_function(STEP):
            step()
        if cuda.is_available():
            cuda.synchronize()
    events = list(profiler.events())
    on_host = [each for each in events if each.device_type == DeviceType.CPU]
    span = next(each.time_range for each in on_host if each.name == STEP)
    waiting = [each for each in on_host if span.start <= each.time_range.start <= span.end]
    copies = [each for each in events if each.device_type != DeviceType.CPU]
    return dict(Counter(each.name for each in [*waiting, *copies] if is_wait(each.name)))


def is_wait(name: str) -> bool:
    """Whether a call is a wait, or a copy to the host, which waits for it or for an event behind it."""
    return name in WAITS or name.startswith("Memcpy DtoH")


def sent(run: Callable[[], object]) -> dict[str, float]:
    """Return the bytes that this rank sends during `run`, by collective."""
    with Traffic() as traffic:
        run()
    return dict(traffic.sent)
