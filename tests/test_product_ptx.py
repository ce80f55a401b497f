"""What a Hopper GPU would run for FP8 products: wide accesses, its own conversions, enough registers."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_ptx import TO_E4M3, obstacle

import ds_fp8

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
TILE = 128 * 128
WORD = 16  # bytes a thread moves at once
MOST_REGISTERS = 128  # with 256 threads a multiprocessor then holds two programs


@dataclass(frozen=True)
class Design:
    """What a kernel does with an element of its tile."""

    loads: int  # bytes
    stores: int
    e4m3: int = 0  # values rounded to E4M3
    narrow: int = 0  # accesses that a thread makes in less than 16 bytes: scales, exponents, sums


DESIGN = {
    "x": Design(2, 1, e4m3=1, narrow=1),
    "x for wgrad": Design(2, 2, e4m3=2, narrow=2),
    "dy": Design(2, 2, e4m3=2, narrow=2),
    "dy and sums": Design(2, 2, e4m3=2, narrow=3),
    "find": Design(2, 0, narrow=2),
    "encode": Design(2, 1, e4m3=1, narrow=2),
    "find of runs": Design(2, 0, narrow=2 + 7 + 2),  # two to find a run among three, which has seven numbers
    "encode of runs": Design(2, 1, e4m3=1, narrow=2 + 8 + 2),
    "decode": Design(1, 2, narrow=1),
    "transpose": Design(1, 1, narrow=2),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ptx")
    environment = {"TRITON_CACHE_DIR": str(folder / "cache"), **os.environ}
    environment.pop("TRITON_INTERPRET", None)
    paths = [str(Path(ds_fp8.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    out = folder / "figures.json"
    command = [sys.executable, str(Path(__file__).with_name("product_ptx.py")), str(out), "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def accesses(ptx: str, kind: str) -> Counter[int]:
    """Bytes of the accesses of global memory that a thread makes."""
    found = re.findall(rf"\b{kind}\.global(?:\.L1::\w+)?(?:\.v(\d))?\.b(\d+)", ptx)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)


each_name = pytest.mark.parametrize("name", DESIGN)


@each_name
def test_tiles_are_moved_in_wide_words_and_once(kernels: dict[str, Any], name: str) -> None:
    kernel, design = kernels[name], DESIGN[name]
    elements = TILE // kernel["threads"]
    loads, stores = (accesses(kernel["ptx"], kind) for kind in ("ld", "st"))
    assert (loads.pop(WORD, 0), stores.pop(WORD, 0)) == (
        design.loads * elements // WORD,
        design.stores * elements // WORD,
    )
    assert sum((loads + stores).values()) == design.narrow


@each_name
def test_the_hardware_converts(kernels: dict[str, Any], name: str) -> None:
    kernel = kernels[name]
    elements = TILE // kernel["threads"]
    assert kernel["ptx"].count(TO_E4M3) == DESIGN[name].e4m3 * elements // 2
    assert "fma" not in kernel["ptx"]


@pytest.mark.parametrize("name", [*DESIGN, "expand", "sums of parts"])
def test_registers_are_enough(kernels: dict[str, Any], name: str) -> None:
    resources = kernels[name]["resources"]
    assert (resources["STACK"], resources["LOCAL"]) == (0, 0), f"spills: {resources}"
    assert resources["REG"] <= MOST_REGISTERS
