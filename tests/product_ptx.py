"""The child of test_product_ptx.py: compiles the kernels of FP8 products for a GPU that is not here.

As in `ptx.py`, whose launches these are: the launch code runs, on tensors without memory.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ptx import META, Launch, compiled, resources
from torch import Tensor

from ds_fp8.ops.product_backend import triton_products
from ds_fp8.ops.products import tiles
from ds_fp8.ops.triton.products import casts, runs, weights
from ds_fp8.ops.weight_runs import Grid, Run

TOKENS = 4097
ROWS, COLUMNS = 1040, 528  # multiples of 16 only
FIRST, COUNT = 1600, 30 * 1600


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def cast(function: Any, **wanted: bool) -> Launch:
    return Launch(casts, "cast_kernel", partial(function, empty(TOKENS, COLUMNS), **wanted))


def launches() -> dict[str, Launch]:
    """What test_product_ptx.DESIGN names."""
    codes = empty(ROWS, COLUMNS, dtype=torch.float8_e4m3fn)
    exponents = empty(tiles(ROWS), tiles(COLUMNS), dtype=torch.uint8)
    run = (empty(COUNT), FIRST, COLUMNS, exponents)
    made = empty(COUNT, dtype=torch.float8_e4m3fn)
    grid = Grid(COLUMNS, (tiles(ROWS), tiles(COLUMNS)), slice(0, exponents.numel()))
    together = runs.WeightRuns(triton_products(), 3 * [Run(grid, FIRST, COUNT, 0, 0)])
    flat = exponents.view(-1)
    both, parts = {"dgrad": True, "wgrad": True}, empty(33, COLUMNS, dtype=torch.float32)
    work = {
        "find": partial(weights.find_exponents, *run),
        "encode": partial(weights.encode_weight, *run, made),
        "decode": partial(weights.decode_weight, codes, exponents, empty(ROWS, COLUMNS)),
        "transpose": partial(weights.transpose, codes, exponents),
        "expand": partial(weights.expand, codes, exponents),
    }
    return {
        "x": cast(casts.cast_input, wgrad=False),
        "x for wgrad": cast(casts.cast_input, wgrad=True),
        "dy": cast(casts.cast_and_sum_tiles, **both, bias=False),
        "dy and sums": cast(casts.cast_and_sum_tiles, **both, bias=True),
        "sums of parts": Launch(casts, "sum_kernel", partial(casts.sum_parts, parts)),
        "find of runs": Launch(runs, "find_runs_kernel", partial(together.find_exponents, run[0], flat)),
        "encode of runs": Launch(runs, "encode_runs_kernel", partial(together.encode, run[0], flat, made)),
        **{name: Launch(weights, f"{name}_kernel", code) for name, code in work.items()},
    }


def report(launch: Launch, architecture: int) -> dict[str, Any]:
    """A whole number times 16 is known to be one, as at a launch."""
    fixed = set(launch.kernel.do_not_specialize or ())
    numbers = {name: value for name, value in launch.parameters.items() if isinstance(value, int)}
    whole = [name for name, value in numbers.items() if value % 16 == 0 and name not in fixed]
    kernel = compiled(launch, architecture, whole)
    return {
        "ptx": kernel.asm["ptx"],
        "threads": 32 * launch.options["num_warps"],
        "resources": resources(kernel.asm["cubin"]),
    }


def main(out: str, architecture: int) -> None:
    found = {name: report(launch, architecture) for name, launch in launches().items()}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
