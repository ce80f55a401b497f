"""Time and bytes of one bucket's way to its owners: the FP8 exchange beside the collectives of stock.

The exchange is the code that trains, `GradientReducer`: quantisation, all-to-all, decoding and sum; its parts
are also timed alone. Ranks begin together: on a GPU a rank sleeps while the host launches, since the host
runs ahead in training, and an all-reduce of one number synchronises the ranks. A round's time is the slowest
rank's.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from engine_facts import sent
from gradient_way import Way
from operations import gradients
from ranks_gpu import slowest
from timing import Clock, Contestant, event_clock, host_clock, interleave
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.ops.backend import choose
from ds_fp8.zero_fp8.comm.collectives import AllToAll
from ds_fp8.zero_fp8.gradients.exchange import blocks_in
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.placement.messages import Message

PARAMETERS = 32  # to which the elements belong
GRAIN = 128 * PARAMETERS
BUCKETS = 8  # of the overlapped exchange
SLEEP = 20_000_000  # clocks, about 10 ms

REDUCE = "BF16 reduce-scatter"
EXCHANGE = "FP8 exchange"
OVERLAPPED = f"FP8 exchange in {BUCKETS} buckets, overlapped"
BF16_WIRE = "the same exchange of BF16"  # fp8.gradients.dtype bf16
PARTS = ("quantise", "all-to-all", "decode and sum")
OTHERS = "all-to-all, without the own message"


class Exchange:
    """Repeated exchange of `elements` gradient elements, a multiple of GRAIN."""

    def __init__(self, elements: int, device: torch.device, *, buckets: int = 1, wire: str = "e4m3") -> None:
        size = elements // PARAMETERS
        nowhere = torch.zeros(1, dtype=torch.bfloat16, device=device)  # the weights are not read
        parameters = [Parameter(nowhere.expand(size)) for _ in range(PARAMETERS)]
        fitting = elements // buckets
        self._way = Way(
            parameters,
            choose(device),
            bucket_elements=fitting,
            overlap=buckets > 1,
            gradients={"dtype": wire},
        )
        self._gradients = gradients(elements, device).split(size)

    def run(self) -> None:
        self._way.parts.reducer.drop()
        self._way.give(self._gradients)
        self._way.parts.reducer.finish()

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return the PARTS of a single bucket's exchange, each to be timed alone."""
        parts, nodes = self._way.parts, self._way.nodes
        (bucket,), (reduced,) = parts.buckets, parts.reduced
        message = Message(bucket.blocks_per_rank, bucket.block_size, self._way.recipe.wire)

        def pack() -> Tensor:
            self._way.give(self._gradients)
            return parts.packer.pack(bucket, parts.reducer.pending.take(bucket), Counts()).view(
                self._way.ranks, -1
            )

        messages = pack()
        pieces = [blocks_in(each, message) for each in messages.clone()]

        def receive() -> None:
            reduced.forget()
            reduced.receive(pieces)

        steps = (pack, lambda: AllToAll(messages, nodes.group).wait(), receive)
        return {**dict(zip(PARTS, steps, strict=True)), OTHERS: self._others(messages)}

    def _others(self, messages: Tensor) -> Callable[[], object]:
        """Return the all-to-all without the rank's message to itself, which NCCL copies, too."""
        splits = [0 if rank == self._way.rank else messages.shape[1] for rank in range(self._way.ranks)]
        source = messages[[rank for rank, size in enumerate(splits) if size]].view(-1)
        target = torch.empty_like(source)
        return lambda: torch.distributed.all_to_all_single(target, source, splits, splits)


def reduce_scatter(source: Tensor, group: ProcessGroup | None = None) -> Callable[[], object]:
    """Reduce-scatter by NCCL or gloo: the sum of a bucket goes to the owners."""
    part = source.new_empty(len(source) // torch.distributed.get_world_size())
    return lambda: torch.distributed.reduce_scatter_tensor(part, source, group=group)


def all_reduce(source: Tensor) -> Callable[[], object]:
    """All-reduce to every rank, as in stock DeepSpeed."""
    return lambda: torch.distributed.all_reduce(source)


def native_fp8(source: Tensor, spare: ProcessGroup) -> tuple[Callable[[], object] | None, str]:
    """Return a reduce-scatter of unscaled E4M3, which adds in FP8 inside the collective, or why it fails.

    spare: a group without other use, in case it does not survive that.
    """
    run = reduce_scatter(source.to(torch.float8_e4m3fn), spare)
    try:
        run()
    except (RuntimeError, ValueError, TypeError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return run, ""


def clock_of(device: torch.device) -> Clock:
    """Return a clock for runs that begin on all ranks at the same time."""
    token = torch.zeros(1, device=device)

    def together(run: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda._sleep(SLEEP)
        torch.distributed.all_reduce(token)
        return event_clock(run) if device.type == "cuda" else host_clock(run)

    return together


def measure(elements: int, rounds: int, device: torch.device, spare: ProcessGroup) -> dict[str, Any]:
    """Return milliseconds and bytes of each way for a bucket of `elements` elements, a multiple of GRAIN.

    Raises AssertionError if the exchange sends more than 0.51 of the bytes of BF16.
    """
    one, several = Exchange(elements, device), Exchange(elements, device, buckets=BUCKETS)
    other = Exchange(elements, device, wire="bf16")
    runs = {EXCHANGE: one.run, OVERLAPPED: several.run, BF16_WIRE: other.run, **one.parts()}
    source = gradients(elements, device)
    for name, values in {"BF16": source, "FP32": source.float()}.items():
        runs |= {f"{name} reduce-scatter": reduce_scatter(values), f"{name} all-reduce": all_reduce(values)}
    native, why_not = native_fp8(source, spare)
    if native is not None:
        runs["E4M3 reduce-scatter, unscaled"] = native
    size = {name: sum(sent(run).values()) for name, run in runs.items()}
    share = size[EXCHANGE] / size[REDUCE]
    assert share <= 0.51, f"the exchange sends {share:.3f} of the bytes of BF16"
    times = interleave([Contestant(name, run, 0) for name, run in runs.items()], rounds, clock_of(device))
    found = {name: slowest(each, device) for name, each in times.milliseconds.items()}
    rows = [
        {
            "name": name,
            "milliseconds": statistics.median(each),
            "by_reduce": statistics.median(a / b for a, b in zip(each, found[REDUCE], strict=True)),
            "sent_bytes": size[name],
            "rounds": each,
        }
        for name, each in found.items()
    ]
    return {"elements": elements, "wire_by_bf16": share, "rows": rows, "no_native_fp8": why_not}
