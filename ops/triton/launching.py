"""How Triton's kernels are launched: on the tensors' device, without looking them up at every call.

Triton looks up a compiled kernel by the types of all arguments and by what they are divisible by, which takes
it tens of microseconds of Python. `launch` asks the same once per argument, and passes pointers as integers.
Codes of 8 bits are bytes to a kernel, which every architecture can load.
"""

import os
import threading
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALIGNMENT = 16  # bytes of a pointer, and of an integer what divides it: Triton compiles for both cases

_compiled: dict[tuple[object, ...], Any] = {}
_thread = threading.local()


def launch(kernel: Any, programs: int, warps: int, /, *, maxnreg: object = None, **arguments: object) -> None:
    """Launch on the tensors' device, without fused multiply-adds: they round once, the reference twice.

    maxnreg: registers of a thread at most; None: the assembler chooses. arguments: every parameter of the
    kernel by its name, so that none can take another's place.
    """
    if INTERPRETED:
        kernel[(programs,)](**as_bytes(arguments))
        return
    device = next(each for each in arguments.values() if isinstance(each, Tensor)).get_device()
    if device == torch._C._cuda_getDevice():
        _launch_here(kernel, programs, warps, maxnreg, arguments)
        return
    with torch.cuda.device(device):
        _launch_here(kernel, programs, warps, maxnreg, arguments)


def _launch_here(
    kernel: Any, programs: int, warps: int, maxnreg: object, arguments: dict[str, object]
) -> None:
    """Launch on the current device."""
    kind: list[object] = [kernel.fn, warps, maxnreg, torch._C._cuda_getDevice()]
    values, key = [_describe(arguments[each.name], each, kind) for each in kernel.params], tuple(kind)
    _thread.compiled = _compiled.get(key)
    if _thread.compiled is not None:
        _thread.compiled[(programs, 1, 1)](*values)
        return
    options = {"num_warps": warps, "enable_fp_fusion": False, "maxnreg": maxnreg}
    compiled = kernel[(programs,)](**as_bytes(arguments), **options)
    _thread.compiled = _compiled.setdefault(key, compiled)  # of two threads' one stays, as C++ needs it to


def latest() -> Any:
    """Triton's compilation of the kernel that this thread launched last."""
    return _thread.compiled


def as_bytes(arguments: dict[str, object]) -> dict[str, object]:
    return {name: raw(each) if isinstance(each, Tensor) else each for name, each in arguments.items()}


def raw(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) if codes.element_size() == 1 else codes


def _describe(value: Any, parameter: Any, kind: list[object]) -> object:
    """An argument as a compiled kernel takes it; into `kind` goes what Triton compiles a kernel for."""
    if isinstance(value, Tensor):
        pointer, dtype = value.data_ptr(), value.dtype
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
