"""Common code of the benchmarks: clocks, interleaved rounds, STREAM triad as the limit, peak memory, facts.

A machine's memory bandwidth changes from second to second, by half if it is shared. So contestants are never
timed one after the other: in every round each of them is timed once, beginning with another one in each
round, and two are compared by the median of their ratios, round by round.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from verify import verify

from ds_fp8.ops.backend import Backend, cpu_backend, cpu_obstacle
from ds_fp8.ops.cpu.build import library_path

CPU = torch.device("cpu")
TRIAD = "STREAM triad"
SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9}

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Contestant:
    """An operation to time, and the bytes that one run has to read and write at least."""

    name: str
    run: Callable[[], object]
    moved: int
    rounds: int | None = None  # in which it takes part; None: all


class Times:
    """Milliseconds by contestant and round.

    others: average number of cores busy with other processes.
    """

    others = 0.0

    def __init__(self, contestants: Sequence[Contestant]) -> None:
        self._moved = {each.name: each.moved for each in contestants}
        self.milliseconds: dict[str, list[float]] = {each.name: [] for each in contestants}

    def median(self, name: str) -> float:
        return statistics.median(self.milliseconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Return the median of the ratios of the rounds in which both ran."""
        pairs = zip(self.milliseconds[name], self.milliseconds[to], strict=False)
        return statistics.median(first / second for first, second in pairs)

    def bandwidth(self, name: str) -> float:
        """Return GB/s."""
        return self._moved[name] / self.median(name) / 1e6

    def share_of_triad(self, name: str) -> float:
        """Return the share of triad's bandwidth, as a median over the rounds."""
        return self._moved[name] / self._moved[TRIAD] / self.ratio(name, TRIAD)


def host_clock(run: Callable[[], object]) -> float:
    """Return the milliseconds of a run."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


def event_clock(run: Callable[[], object]) -> float:
    """Return milliseconds between CUDA events around the work that a run queues on the current stream."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def interleave(contestants: Sequence[Contestant], rounds: int, clock: Clock = host_clock) -> Times:
    """Time every contestant once per round.

    Each runs once more just before, untimed: libraries have their own OpenMP runtimes, whose threads keep
    spinning for milliseconds after their work and would take a core from the next contestant.
    """
    times = Times(contestants)
    before = busy_seconds(), time.process_time(), time.perf_counter()
    for number in range(rounds):
        first = number % len(contestants)
        for each in (*contestants[first:], *contestants[:first]):
            if each.rounds is None or number < each.rounds:
                each.run()
                times.milliseconds[each.name].append(clock(each.run))
    busy, own, wall = (
        busy_seconds() - before[0],
        time.process_time() - before[1],
        time.perf_counter() - before[2],
    )
    times.others = max(0.0, busy - own) / wall
    return times


def busy_seconds() -> float:
    """Return the CPU time that all processes of this machine have used, stolen time included."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def triad(size: int) -> Contestant:
    """c = a + s b in FP32, by torch with its threads; 12 bytes per element, as STREAM counts.

    The lines of c are read before they are written, which STREAM does not count. An operation in place has no
    such reads, and so may come out above 1.
    """
    a, b, c = (torch.full((size,), value) for value in (1.0, 2.0, 0.0))
    return Contestant(TRIAD, lambda: torch.add(a, b, alpha=3.0, out=c), 12 * size)


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Return the rise of the process's resident memory during one run, after a warm-up.

    Linux only: 5 written to /proc/self/clear_refs resets the high-water mark VmHWM. The allocator first
    returns its free memory, so that memory from an earlier run does not hide this one's.
    Raises OSError if the kernel does not offer it.
    """
    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def checked_backend() -> tuple[Backend, list[str]]:
    """Check that the C++ kernels equal the reference; return them, and what was compared.

    Raises SystemExit if they cannot run or are wrong: then nothing is timed.
    """
    obstacle = cpu_obstacle(CPU)
    if obstacle:
        raise SystemExit(f"not timed: the C++ kernels cannot run: {obstacle}")
    backend = cpu_backend()
    try:
        return backend, verify(backend, CPU)
    except AssertionError as error:
        raise SystemExit(f"not timed: a kernel differs from the reference: {error}") from error


def element_count(text: str) -> int:
    """Parse a number of elements, with or without a suffix K, M or G, for argparse."""
    number, unit = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1)
    try:
        count = int(float(number) * unit)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"received {text!r}, allowed: a count such as 50M, 640K or 8192")
    return count


def round_count(text: str) -> int:
    """Parse a number of rounds, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"received {text!r}, allowed: 1 or more")
    return int(text)


def parser_of(doc: str | None, *, rounds: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every CPU benchmark has; the docstring is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument("--rounds", type=round_count, help="each round times every contestant once")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds, as a smoke test")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every number to this JSON file")
    return parser


def facts() -> dict[str, Any]:
    """Return facts about the machine and its load; call it before the timing."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
        "kernels": library_path().parent.name,  # digest of sources and flags
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def title(what: str, machine: dict[str, Any], others: float | None = None) -> str:
    """Format a title. others: cores that were busy with other processes, if that was measured."""
    busy = "" if others is None else f", other processes took {others:.2f} cores"
    return (
        f"{what}; {machine['processor']}, {machine['threads']} of {machine['cores']} cores; "
        f"load before {machine['load_average_before']}{busy}"
    )


def write(out: Path | None, result: dict[str, Any]) -> None:
    """Replace the file atomically: if the process is killed meanwhile, the old file stays."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(f"{out.name}.new")
        fresh.write_text(json.dumps(result, indent=1) + "\n")
        fresh.replace(out)
