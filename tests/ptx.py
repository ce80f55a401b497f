"""The child of test_ptx.py: compiles the kernels for GPUs that are not here, and walks through their PTX.

A process of its own, because a kernel that is defined under TRITON_INTERPRET=1 cannot be compiled. Nothing
of a launch is written down twice: the launch code itself runs, on tensors without memory and with a recorder
in the kernel's place, and says how many warps, rows and tiles there are and what is constant.

How much a kernel loads and stores cannot be counted in PTX by eye: loops are unrolled or not, and a tile is
spread over threads in one way or another. So a program's statements are executed, for all its threads at
once. Integers are followed, floats are not: no address, mask or number of rounds depends on one.
"""

import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from ptx_program import Program, parse, width_of
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_fp8.config.section import LEVELS, FP8Config
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep, next_clamp
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import E4M3, FP32, Format
from ds_fp8.ops.triton import adam as adam_triton
from ds_fp8.ops.triton import blocks as blocks_triton
from ds_fp8.ops.triton import quantize_many as quantize_many_triton
from ds_fp8.ops.triton import reduction as reduction_triton
from ds_fp8.ops.triton import tiles as tiles_triton
from ds_fp8.zero_fp8.gradients.exchange import blocks_in
from ds_fp8.zero_fp8.placement.messages import Message
from ds_fp8.zero_fp8.recipe import recipe_of

META = torch.device("meta")
BLOCK = 128
BLOCKS = 2**20 + 1
BLOCKS_FAR = 2**24 + 1  # so many that the ranks' messages lie more than 2^31 bytes apart
MISSING = 5  # elements that the last block of a vector is short of
BETAS = (0.9, 0.95)
PROGRAM = 3  # the one that is walked through
LEFT = 3  # blocks that it finds where it is the last
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Launch:
    """Stands where a kernel does and keeps what it is launched with."""

    params = ()  # by which `launch` looks up what was compiled, as if nothing had been

    def __init__(self, module: Any, kernel: str, code: Callable[[], object]) -> None:
        self.kernel = self.fn = getattr(module, kernel)
        device = mock.patch.object(torch._C, "_cuda_getDevice", create=True, return_value=-1)
        with mock.patch.object(module, kernel, self), device:
            code()

    def __getitem__(self, grid: tuple[int, ...]) -> "Launch":
        return self

    def __call__(self, *arguments: object, **named: Any) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | named
        constant = {each.name for each in self.kernel.params if each.is_constexpr}
        self.constants = {name: given[name] for name in names if name in constant}
        self.parameters = {name: given[name] for name in names if name not in constant}
        self.options = {name: value for name, value in given.items() if name not in names}

    @property
    def rows(self) -> int:
        """Blocks a program."""
        return int(self.constants["ROWS"] * self.constants.get("TILES", 1))


def blocks_of(fmt: Format, blocks: int = BLOCKS) -> Blocks:
    return Blocks.zeros(blocks, BLOCK, fmt, META)


def vector(dtype: torch.dtype, blocks: int = BLOCKS) -> Tensor:
    return torch.empty(blocks * BLOCK - MISSING, dtype=dtype, device=META)


def gradients(blocks: int = BLOCKS) -> list[tuple[Tensor, Blocks]]:
    """Three vectors and where they are quantised to."""
    return [(vector(torch.bfloat16, blocks), blocks_of(E4M3, blocks)) for _ in range(3)]


def accumulate(ranks: int, shard: Format, overwrite: bool) -> Launch:
    message = Message(BLOCKS_FAR, BLOCK, E4M3)
    pieces = [
        blocks_in(each, message)
        for each in torch.empty(ranks, message.nbytes, dtype=torch.uint8, device=META)
    ]
    operands = (pieces, blocks_of(shard, BLOCKS_FAR), torch.empty(1, dtype=torch.int32, device=META))
    code = partial(reduction_triton.launch_sum, *operands, "blocks", overwrite=overwrite)
    return Launch(reduction_triton, "accumulate_kernel", code)


def norm_parts() -> Launch:
    """Its rounds depend on floats, so that it is compiled but not walked through."""
    squares = torch.empty(BLOCKS, dtype=torch.float64, device=META)
    code = partial(reduction_triton.norm_parts_of_blocks, squares)
    return Launch(reduction_triton, "norm_parts_kernel", code)


def sweep(opt_level: str) -> Launch:
    recipe = recipe_of(FP8Config.model_validate({"enabled": True, "opt_level": opt_level}))
    clamp = math.sqrt(next_clamp(None, BETAS)) if recipe.clamped else None
    scalars = AdamScalars(7, 1e-3, *BETAS, 1e-8, 0.1, decoupled=True, bias_correction=True, clamp=clamp)
    segments = [Segment(slice(first, first + 1), first, 0) for first in range(3)]
    plan = adam_triton.plan(segments, BLOCKS, BLOCK, META)
    state = AdamState(*map(blocks_of, (recipe.master, recipe.exp_avg, recipe.exp_avg_sq)))
    weights = torch.empty(BLOCKS, BLOCK, dtype=torch.bfloat16, device=META)
    control = torch.empty(2, device=META)
    step = Sweep(state, blocks_of(E4M3), weights, plan, scalars, control, recipe.rounding)
    code = partial(adam_triton.adam_step, step)
    return Launch(adam_triton, "adam_kernel", code)


def tensor_sweep(which: str) -> Launch:
    recipe = recipe_of(FP8Config.model_validate({"enabled": True, "scaling": "tensor"}))
    scalars = AdamScalars(7, 1e-3, *BETAS, 1e-8, 0.1, decoupled=True, bias_correction=True, clamp=None)
    plan = adam_triton.plan([Segment(slice(0, BLOCKS), 0, 0)], BLOCKS, BLOCK, META)
    state = AdamState(*map(blocks_of, (recipe.master, recipe.exp_avg, recipe.exp_avg_sq)), stores_sqrt=False)
    weights = torch.empty(BLOCKS, BLOCK, dtype=torch.bfloat16, device=META)
    amax = torch.empty(3, BLOCKS, dtype=torch.int32, device=META)
    control = torch.empty(2, device=META)
    step = Sweep(state, blocks_of(E4M3), weights, plan, scalars, control, recipe.rounding)
    code = partial(adam_triton.launch_sweep, step, which, amax)
    return Launch(adam_triton, "adam_kernel", code)


def tensor_sum(which: str) -> Launch:
    message = Message(BLOCKS_FAR, BLOCK, E4M3)
    pieces = [
        blocks_in(each, message) for each in torch.empty(2, message.nbytes, dtype=torch.uint8, device=META)
    ]
    amax = torch.empty(BLOCKS, dtype=torch.int32, device=META)
    operands = (pieces, blocks_of(E4M3, BLOCKS_FAR), amax, which)
    code = partial(reduction_triton.launch_sum, *operands, overwrite=True)
    return Launch(reduction_triton, "accumulate_kernel", code)


def of_tensors() -> dict[str, Launch]:
    """One scale per tensor: a sweep that measures, a sweep that writes."""
    values, amax = vector(torch.bfloat16), torch.empty((), dtype=torch.int32, device=META)
    measure = partial(blocks_triton.largest_magnitude, values, BLOCKS, BLOCK)
    write = partial(blocks_triton.launch_quantize, values, blocks_of(E4M3), amax, None)
    return {
        "largest of a tensor": Launch(blocks_triton, "largest_kernel", measure),
        "quantize a tensor": Launch(blocks_triton, "quantize_kernel", write),
        **{f"sum of a tensor {which}s": tensor_sum(which) for which in ("measure", "write")},
        **{f"sweep of tensors {which}s": tensor_sweep(which) for which in ("measure", "write")},
    }


def launches() -> dict[str, Launch]:
    """What test_ptx.DESIGN names."""
    quantize = partial(blocks_triton.quantize, vector(torch.bfloat16), blocks_of(E4M3))
    dequantize = partial(blocks_triton.dequantize, blocks_of(E4M3), vector(torch.float32))
    together = partial(quantize_many_triton.quantize_vectors, *zip(*gradients(), strict=True))
    found = {
        "quantize": Launch(blocks_triton, "quantize_kernel", quantize),
        "quantize vectors": Launch(quantize_many_triton, "quantize_vectors_kernel", together),
        "dequantize": Launch(blocks_triton, "dequantize_kernel", dequantize),
    }
    for ranks in (2, 8):
        for shard in (E4M3, FP32):
            found[f"accumulate {ranks} into an overwritten {shard.name}"] = accumulate(ranks, shard, True)
            found[f"accumulate {ranks} into an old {shard.name}"] = accumulate(ranks, shard, False)
    return found | {f"sweep {level}": sweep(level) for level in LEVELS} | of_tensors()


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(launch: Launch, architecture: int, whole: Collection[str] = ()) -> Any:
    """The kernel for one compute capability; tensors and 64-bit distances are divisible by 16.

    whole: further parameters that are.
    """
    constants = dict(launch.constants)
    if "HARDWARE" in constants:
        constants["HARDWARE"] = divmod(architecture, 10) >= tiles_triton.FIRST_WITH_FP8
    options = dict(launch.options)
    if "M" in constants:
        options["maxnreg"] = adam_triton.most_registers(
            constants["M"], constants["STOCHASTIC"], architecture == 90
        )
    types = {name: type_of(value) for name, value in launch.parameters.items()}
    assert all(value % 16 == 0 for name, value in launch.parameters.items() if types[name] == "i64")
    names = launch.kernel.arg_names
    wide = [name for name, each in types.items() if each == "i64" or each[0] == "*" or name in whole]
    source = ASTSource(
        fn=launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in wide},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(\w+):(\d+)", printed))
    return {name: int(found[name]) for name in ("REG", "STACK", "LOCAL")}


def walked(ptx: str, launch: Launch, *, last: bool) -> dict[str, Any]:
    """What a program does; `last`: at the ragged end of the tensors, and a second segment begins."""
    parameters = dict(launch.parameters)
    blocks = PROGRAM * launch.rows + LEFT if last else BLOCKS
    if last:
        changed = {"blocks": blocks, "numel": blocks * BLOCK - MISSING}
        parameters |= {name: value for name, value in changed.items() if name in parameters}
    one = int(np.float32(1).view(np.int32))  # the step is taken
    memory = {("control", 4): one, ("tile_segments", 4 * (PROGRAM + 1)): int(last)}
    places = itertools.chain(*quantize_many_triton.places_of(gradients(blocks)))
    memory |= {("places", 8 * number): value for number, value in enumerate(places)}
    program = Program(ptx, PROGRAM, parameters, memory).run()
    return {
        "threads": program.threads,
        "executed": program.executed,
        "tensors": program.tensors,
        "asked": program.asked,
        "touched": {name: len(each) for name, each in program.touched.items()},
    }


def report(launch: Launch, architecture: int) -> dict[str, Any]:
    kernel = compiled(launch, architecture)
    ptx = kernel.asm["ptx"]
    return {
        "ptx": ptx,
        "resources": resources(kernel.asm["cubin"]),
        "rows": launch.rows,
        "widths": {at: width_of(each.op) for at, each in enumerate(parse(ptx)[0]) if width_of(each.op)},
        "whole": walked(ptx, launch, last=False),
        "last": walked(ptx, launch, last=True),
    }


def main(out: str, architecture: int) -> None:
    found = {
        "triton": triton.__version__,
        "left": LEFT,
        "missing": MISSING,
        "kernels": {name: report(launch, architecture) for name, launch in launches().items()},
        "norm_parts": resources(compiled(norm_parts(), architecture).asm["cubin"]),
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
