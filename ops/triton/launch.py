"""How kernels are launched. What Triton compiled for a kind of call is kept, so that the next one is cheap.

Triton looks up a compiled kernel by the types of all arguments and by what they are divisible by, which
takes it tens of microseconds of Python. Here the same is asked once per argument, and pointers are passed as
integers: a few microseconds.
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
        kernel[(programs,)](**arguments)
        return
    kind: list[object] = [kernel.fn, warps, maxnreg, torch.cuda.current_device()]
    values = [_describe(arguments[each.name], each, kind) for each in kernel.params]
    key = tuple(kind)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*values)
        return
    options = {"num_warps": warps, "enable_fp_fusion": False, "maxnreg": maxnreg}
    _compiled[key] = kernel[(programs,)](**arguments, **options)


def _describe(value: Any, parameter: Any, kind: list[object]) -> object:
    """An argument as a compiled kernel takes it; into `kind` goes what Triton compiles a kernel for."""
    if isinstance(value, Tensor):
        pointer = value.data_ptr()
        kind += (value.dtype, pointer % ALIGNMENT)
        return pointer
    kind.append(type(value))
    if parameter.is_constexpr:
        kind.append(value)
    elif isinstance(value, int):
        kind.append(-(2**31) <= value < 2**31)
        if not parameter.do_not_specialize:
            kind += (value == 1, value % ALIGNMENT == 0)
    return value
