"""Whether the bytes of a tensor may be reached through a pointer.

A kernel is given an address and sizes, and writes. A sharded or wrapped tensor has no such address, a sparse
one has several, and a view can exceed its storage. Each case is recognised here and described by words that
an error can say. Neither values nor the device are asked, so a GPU is not waited for.
"""

import torch
from torch import Tensor

ALLOWED = "allowed: a dense tensor of this process"


def check_weight(name: str, parameter: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse, by a ValueError that begins with the name, a parameter that kernels cannot read and write."""
    flaw = flaw_of(parameter)
    if flaw is None and _overlaps(parameter):
        flaw = "a parameter whose elements share memory"
    if flaw is None and parameter.is_inference() and not torch.is_inference_mode_enabled():
        flaw = "a parameter made in inference mode"
    if flaw is not None:
        raise ValueError(f"{name}: received {flaw}, {ALLOWED}")
    if parameter.dtype not in dtypes:
        allowed = ", ".join(map(str, dtypes))
        raise ValueError(f"{name}: received a parameter of {parameter.dtype}, allowed: {allowed}")


def check_gradient(name: str, parameter: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse, by a ValueError that begins with the name, a gradient that is not this parameter's."""
    gradient = parameter.grad
    assert gradient is not None
    flaw = flaw_of(gradient)
    if flaw is not None:
        raise ValueError(f"{name}: received {flaw} as its gradient, {ALLOWED}")
    if gradient.dtype not in dtypes:
        allowed = ", ".join(map(str, dtypes))
        raise ValueError(f"{name}: received a gradient of {gradient.dtype}, allowed: {allowed}")
    if gradient.shape != parameter.shape or gradient.device != parameter.device:
        raise ValueError(
            f"{name}: received a gradient of shape {list(gradient.shape)} on {gradient.device}, "
            f"allowed: {list(parameter.shape)} on {parameter.device}"
        )


def flaw_of(tensor: Tensor) -> str | None:
    """The flaw that forbids a pointer into this tensor, as words after "received"; None if there is none."""
    kind = kind_of(tensor)
    if kind is not None:
        return kind
    if tensor.is_meta:
        return "a tensor on device meta, without values"
    if tensor.is_conj() or tensor.is_neg():
        return "a lazily conjugated or negated view"
    if _bytes_reached(tensor) > tensor.untyped_storage().nbytes():
        held = tensor.untyped_storage().nbytes()
        return f"a view of {_bytes_reached(tensor)} bytes into a storage of {held}"
    return None


def kind_of(tensor: Tensor) -> str | None:
    """The kind of a tensor without a strided storage of its own, such as "a DTensor"; else None."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.layout is not torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.').removesuffix('_coo')} tensor"
    return None


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements may share a place, as in an expanded tensor: then none can be written."""
    if tensor.is_contiguous():
        return False
    reach = 0
    steps = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    for stride, size in steps:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _bytes_reached(tensor: Tensor) -> int:
    """Bytes of the storage from its beginning to the end of the view."""
    count = tensor.numel()
    if count and not tensor.is_contiguous():
        count = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + count) * tensor.itemsize if count else 0
