"""What a GPU would run: the kernels compiled for one that is not here.

Every kernel in its default configurations (block size 128), for an A100 (sm_80), for Ada (sm_89) and for
Hopper (sm_90). `ptx.py` compiles them in a process of its own and executes the PTX of two programs, one
whose blocks are all there and one at the ragged end of the tensors; the claims are about what they did.
"""

import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ds_fp8

BLOCK = 128
SCALE = 1 / BLOCK  # bytes per element
WORD = 16  # bytes a thread moves at once
FUSED = "fma.rn.f32"
TO_E4M3 = "cvt.rn.satfinite.e4m3x2.f32"
SINGLE_ROUNDING = (3, 9)  # first Triton that converts FP32 to E4M3 on sm_89 as on sm_90


@dataclass(frozen=True)
class Design:
    """What a kernel should do with an element."""

    loads: float  # bytes
    stores: float
    fused: int = 0  # multiply-adds that the source asks for
    e4m3: int = 0  # values stored in E4M3
    vector: int = 0  # bytes per element of a tensor that may end inside a block
    lookups: int = 0  # of the segments that begin inside a tile, for random numbers


SQUARE_ROOT_AND_QUOTIENT = 2 + 4
MOMENTS = 2  # the quotient of m and the root of v
DESIGN = {
    "quantize": Design(2, 1 + SCALE, e4m3=1, vector=2),
    "quantize vectors": Design(2, 1 + SCALE, e4m3=1, vector=2),
    "dequantize": Design(1 + SCALE, 4, vector=4),
    "accumulate 2 into an overwritten e4m3": Design(2 * (1 + SCALE), 1 + SCALE, fused=1, e4m3=1),
    "accumulate 2 into an old e4m3": Design(3 * (1 + SCALE), 1 + SCALE, fused=1, e4m3=1),
    "accumulate 2 into an overwritten fp32": Design(2 * (1 + SCALE), 4, fused=1),
    "accumulate 2 into an old fp32": Design(2 * (1 + SCALE) + 4, 4, fused=1),
    "accumulate 8 into an overwritten e4m3": Design(8 * (1 + SCALE), 1 + SCALE, fused=7, e4m3=1),
    "accumulate 8 into an old e4m3": Design(9 * (1 + SCALE), 1 + SCALE, fused=7, e4m3=1),
    "accumulate 8 into an overwritten fp32": Design(8 * (1 + SCALE), 4, fused=7),
    "accumulate 8 into an old fp32": Design(8 * (1 + SCALE) + 4, 4, fused=7),
    # gradient, master, m and v are read; master, m, v and the weight are written
    "sweep O1": Design(1 + SCALE + 4 + 4 + 4, 4 + 4 + 4 + 2, fused=SQUARE_ROOT_AND_QUOTIENT),
    "sweep O2": Design(
        1 + 2 + 1 + 2 + 4 * SCALE,
        2 + 1 + 2 + 2 + 3 * SCALE,
        fused=SQUARE_ROOT_AND_QUOTIENT + MOMENTS,
        lookups=1,
    ),
    # the weight is read, too: it is the upper half of the master
    "sweep O2+": Design(
        1 + 2 + 2 + 1 + 1 + 3 * SCALE,
        2 + 2 + 1 + 1 + 2 * SCALE,
        fused=SQUARE_ROOT_AND_QUOTIENT + MOMENTS,
        lookups=1,
    ),
    # one scale per tensor: what measures only reads
    "largest of a tensor": Design(2, 0, vector=2),
    "quantize a tensor": Design(2, 1 + SCALE, e4m3=1, vector=2),
    "sum of a tensor measures": Design(2 * (1 + SCALE), 0, fused=1),
    "sum of a tensor writes": Design(2 * (1 + SCALE), 1 + SCALE, fused=1, e4m3=1),
    "sweep of tensors measures": Design(1 + 2 + 1 + 2 + 4 * SCALE, 0, fused=SQUARE_ROOT_AND_QUOTIENT),
    "sweep of tensors writes": Design(
        1 + 2 + 1 + 2 + 4 * SCALE, 2 + 1 + 2 + 2 + 3 * SCALE, fused=SQUARE_ROOT_AND_QUOTIENT, e4m3=1
    ),
}
# What is not a tile: tensor -> bytes of an access, and how many of them a program may touch.
SMALL = {
    "control": (4, 8),
    "tile_segments": (4, 8),
    "table": (4, 24),
    "squares": (8, 8 * 16),  # one sum a block
    "partial": (8, 16),
    "amax": (4, 96),
    "places": (8, 12 * 8),
}


@dataclass(frozen=True)
class Walk:
    """What one program did."""

    threads: int
    executed: dict[str, int]  # statements by operation
    tensors: dict[str, str]  # tensor that a statement reaches
    asked: dict[str, int]  # "ld codes" -> bytes, as often as threads ask for them
    touched: dict[str, int]  # "ld codes" -> bytes, each once

    def tiles(self, figures: dict[str, int], kind: str) -> int:
        """Sum over what is a tile or its scales."""
        return sum(n for name, n in figures.items() if name.startswith(kind) and name.split()[1] not in SMALL)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    ptx: str
    resources: dict[str, int]
    rows: int  # blocks of a whole program
    widths: dict[str, int]  # bytes of an access, by statement
    whole: Walk
    last: Walk  # `left` blocks, of whose elements `missing` are not there
    left: int
    missing: int

    @property
    def elements(self) -> int:
        return self.rows * BLOCK

    def narrow(self, walk: Walk) -> dict[str, Counter[int]]:
        """Accesses of less than 16 bytes that a program makes: tensor -> bytes -> statements."""
        found: dict[str, Counter[int]] = {}
        for statement, tensor in walk.tensors.items():
            if self.widths[statement] < WORD:
                found.setdefault(tensor, Counter())[self.widths[statement]] += 1
        return found


@dataclass(frozen=True)
class Kernels:
    triton: tuple[int, ...]
    by_name: dict[str, Kernel]
    norm_parts: dict[str, int]  # resources of the kernel that adds sums of squares


def obstacle() -> str | None:
    """Why nothing can be compiled here."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "Triton is a dependency on Linux x86_64 only"
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "the package triton is not installed"
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return None if tool.exists() else f"no {tool}, which says how many registers a kernel takes"


pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


def kernel_of(figures: dict[str, Any], left: int, missing: int) -> Kernel:
    walks = {name: Walk(**figures[name]) for name in ("whole", "last")}
    return Kernel(**(figures | walks), left=left, missing=missing)


@pytest.fixture(
    scope="module",
    params=[90, *(pytest.param(each, marks=pytest.mark.slow) for each in (80, 89))],
    ids="sm_{}".format,
)
def architecture(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def kernels(architecture: int, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder = tmp_path_factory.mktemp("ptx")
    environment = {"TRITON_CACHE_DIR": str(folder / "cache"), **os.environ}
    environment.pop("TRITON_INTERPRET", None)
    paths = [str(Path(ds_fp8.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(Path(__file__).with_name("ptx.py")), str(folder / "figures.json")]
    command.append(str(architecture))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((folder / "figures.json").read_text())
    made = functools.partial(kernel_of, left=figures["left"], missing=figures["missing"])
    version = tuple(int(each) for each in figures["triton"].split(".")[:2])
    return Kernels(
        version, {name: made(each) for name, each in figures["kernels"].items()}, figures["norm_parts"]
    )


each_name = pytest.mark.parametrize("name", DESIGN)


def traffic(kernels: Kernels) -> str:
    """Bytes an element, as in the docstring of `test_bytes_per_element`."""
    lines = [f"{'':40} {'loads':>9} {'design':>9} {'stores':>9} {'design':>9}"]
    for name, kernel in kernels.by_name.items():
        design = DESIGN[name]
        loads, stores = (
            kernel.whole.tiles(kernel.whole.touched, kind) / kernel.elements for kind in ("ld", "st")
        )
        lines.append(f"{name:40} {loads:9.6f} {design.loads:9.6f} {stores:9.6f} {design.stores:9.6f}")
    return "\n".join(lines)


@each_name
def test_bytes_per_element(kernels: Kernels, name: str) -> None:
    """Each byte of a tile is moved once, and there are no more of them than the design counts.

                                       loads    stores
    quantize                        2.000000  1.007812
    dequantize                      1.007812  4.000000
    accumulate 2 into an overwritten e4m3  2.015625  1.007812
    accumulate 8 into an overwritten e4m3  8.062500  1.007812
    sweep O1                       13.007812 14.000000
    sweep O2                        6.031250  7.023438
    """
    kernel, design = kernels.by_name[name], DESIGN[name]
    walk = kernel.whole
    assert walk.tiles(walk.touched, "ld") == design.loads * kernel.elements, traffic(kernels)
    assert walk.tiles(walk.touched, "st") == design.stores * kernel.elements, traffic(kernels)
    for tensor, asked in walk.asked.items():
        if not tensor.endswith("scales") and tensor.split()[1] not in SMALL:
            assert asked == walk.touched[tensor], f"{tensor}: {asked / kernel.elements} bytes per element"


@each_name
def test_tiles_move_in_16_byte_words(kernels: Kernels, name: str) -> None:
    """All but scales, one byte a row, and what is no tile: control words, table, partial figures."""
    kernel = kernels.by_name[name]
    for tensor, widths in kernel.narrow(kernel.whole).items():
        if tensor in SMALL:
            width, most = SMALL[tensor]
            assert set(widths) == {width}, tensor
            assert all(n <= most for each, n in kernel.whole.touched.items() if each[3:] == tensor)
        else:
            assert tensor.endswith("scales"), f"{tensor}: bytes -> accesses {dict(widths)}"
            assert set(widths) == {1}, tensor


@each_name
def test_no_other_access_is_in_the_ptx(kernels: Kernels, name: str) -> None:
    """Narrow ones that a whole program never reaches: a short last block's, and the sweep's next segments'.

    The former are as many as a thread has elements, and each is one element wide.
    """
    kernel = kernels.by_name[name]
    design, walks = DESIGN[name], (kernel.whole, kernel.last)
    unexplained = [
        width for at, width in kernel.widths.items() if all(at not in each.tensors for each in walks)
    ]
    assert not unexplained, f"bytes of accesses that neither program makes: {unexplained}"
    behind_a_branch = {
        tensor: widths - kernel.narrow(kernel.whole).get(tensor, Counter())
        for tensor, widths in kernel.narrow(kernel.last).items()
    }
    expected: dict[str, Counter[int]] = {}
    if design.vector:
        expected["values"] = Counter({design.vector: kernel.elements // kernel.whole.threads})
    if design.lookups:  # where the segment begins, its block, the parameter
        expected["table"] = Counter({4: 3 * design.lookups})
    assert {tensor: widths for tensor, widths in behind_a_branch.items() if widths} == expected


@each_name
def test_nothing_beyond_the_end_is_touched(kernels: Kernels, name: str) -> None:
    kernel = kernels.by_name[name]
    for tensor, touched in kernel.last.touched.items():
        if tensor.split()[1] not in SMALL:
            there = kernel.whole.touched[tensor] * kernel.left // kernel.rows
            short = kernel.missing * DESIGN[name].vector if tensor.endswith(" values") else 0
            assert touched == there - short, tensor


@each_name
def test_the_hardware_converts_fp8(kernels: Kernels, name: str, architecture: int) -> None:
    """One instruction for two values, and one rounding: Triton before 3.9 rounds twice on sm_89."""
    kernel = kernels.by_name[name]
    first = 89 if kernels.triton >= SINGLE_ROUNDING else 90
    stored = DESIGN[name].e4m3 if architecture >= first else 0
    converted = {op: n for op, n in kernel.whole.executed.items() if re.match(r"cvt.*\.e4m3x2\.\w+$", op)}
    made = {op: 2 * n * kernel.whole.threads / kernel.elements for op, n in converted.items()}
    assert made == ({TO_E4M3: stored} if stored else {})
    assert stored or TO_E4M3 not in kernel.ptx


@each_name
def test_multiply_and_add_are_fused_where_the_source_says(kernels: Kernels, name: str) -> None:
    """In the sweep's square root and quotient and in the sum over ranks.

    Products and sums without .rn are left to the assembler to fuse, so there must be none.
    """
    kernel = kernels.by_name[name]
    fused = kernel.whole.executed.get(FUSED, 0) * kernel.whole.threads / kernel.elements
    assert fused == DESIGN[name].fused
    found = set(re.findall(r"\b(?:fma|mad|mul|add|sub)\.[\w.]*f(?:16|32|64)\w*", kernel.ptx))
    assert found <= {FUSED, *(f"{op}.rn.f{bits}" for op in ("mul", "add", "sub") for bits in (32, 64))}


@each_name
def test_registers_are_enough(kernels: Kernels, name: str) -> None:
    resources = kernels.by_name[name].resources
    assert (resources["STACK"], resources["LOCAL"]) == (0, 0), f"spills: {resources}"
    assert resources["REG"] < 128


def test_norm_parts_take_few_registers(kernels: Kernels) -> None:
    resources = kernels.norm_parts
    assert (resources["STACK"], resources["LOCAL"]) == (0, 0), f"spills: {resources}"
    assert resources["REG"] < 128
