"""How kernels are launched. What Triton compiled for a kind of call is kept, so that the next one is cheap.

Triton looks up a compiled kernel by the types of all arguments and by what they are divisible by, which
takes it tens of microseconds of Python. Here the same is asked once per argument, and pointers are passed as
integers: a few microseconds. Codes of 8 bits are bytes to a kernel, which every architecture can load.
"""

import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALIGNMENT = 16  # bytes of a pointer, and of an integer what divides it: Triton compiles for both cases

_compiled: dict[tuple[object, ...], Any] = {}


def launch(kernel: Any, programs: int, warps: int, /, *, maxnreg: object = None, **arguments: object) -> None:
    """Launch without fused multiply-adds, which round once where the reference rounds twice.

    maxnreg: registers of a thread at most; None: the assembler chooses. arguments: every parameter of the
    kernel by its name, so that none can take another's place.
    """
    if INTERPRETED:
        kernel[(programs,)](**as_bytes(arguments))
        return
    kind: list[object] = [kernel.fn, warps, maxnreg, torch._C._cuda_getDevice()]
    values = [_describe(arguments[each.name], each, kind) for each in kernel.params]
    key = tuple(kind)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*values)
        return
    options = {"num_warps": warps, "enable_fp_fusion": False, "maxnreg": maxnreg}
    _compiled[key] = kernel[(programs,)](**as_bytes(arguments), **options)


def as_bytes(arguments: dict[str, object]) -> dict[str, object]:
    return {name: raw(each) if isinstance(each, Tensor) else each for name, each in arguments.items()}


def raw(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) if codes.element_size() == 1 else codes


def _describe(value: Any, parameter: Any, kind: list[object]) -> object:
    """An argument as a compiled kernel takes it; into `kind` goes what Triton compiles a kernel for."""
    if isinstance(value, Tensor):
        pointer = value.data_ptr()
        dtype = value.dtype
        kind += (torch.uint8 if dtype.itemsize == 1 else dtype, pointer % ALIGNMENT)
        return pointer
    kind.append(type(value))
    if parameter.is_constexpr:
        kind.append(value)
    elif isinstance(value, int):
        kind.append(-(2**31) <= value < 2**31)
        if not parameter.do_not_specialize:
            kind += (value == 1, value % ALIGNMENT == 0)
    return value
