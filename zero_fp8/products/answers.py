"""The functions that an FP8 weight supports without being decoded, and those that it refuses.

The tables hold torch's functions themselves, as `__torch_function__` receives them; names that a version of
torch lacks are left out.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, overrides
from torch._guards import TracingContext

# About the parameter and its gradient, not its values: answered by the tensor without values behind it.
ASKS = """size dim numel nelement ndimension is_floating_point is_complex element_size get_device is_pinned
is_signed is_conj is_neg is_inference is_set_to is_shared storage_offset requires_grad_ register_hook
register_post_accumulate_grad_hook retain_grad detach_ backward __hash__ __len__ __dlpack_device__ _is_view
_is_zerotensor _has_symbolic_sizes_strides"""
ASKS_OF_TORCH = """is_floating_point is_complex is_conj is_neg is_inference numel is_signed _is_zerotensor
_has_compatible_shallow_copy_type is_same_size get_device"""
PROPERTIES = """shape dtype device requires_grad grad is_leaf grad_fn ndim layout is_cuda is_cpu is_sparse
is_quantized is_meta names itemsize output_nr _version _backward_hooks _grad _base name retains_grad is_xla
is_mps is_xpu is_mkldnn is_mtia is_maia is_vulkan is_sparse_csr is_nested nbytes is_ipu is_hpu
_post_accumulate_grad_hooks grad_dtype volatile"""
SETTABLE = "requires_grad grad _backward_hooks _grad _post_accumulate_grad_hooks grad_dtype"

LAYOUT = "is_contiguous stride dim_order"  # answered as for a row-major tensor

# These return the parameter itself if nothing changes, and its values otherwise.
CONVERSIONS = "to cpu cuda xpu type type_as float double half bfloat16 contiguous"

POINTERS = """data_ptr const_data_ptr mutable_data_ptr untyped_storage storage _typed_storage __dlpack__
share_memory_ set_ resize_"""

# Functions that write into their first argument; names without an underscore at the end.
_OPERATORS = "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul"
WRITING = {f"__i{name}__" for name in _OPERATORS.split()} | {"__setitem__", "__set__", "__delete__"}

Function = Callable[..., Any]


def _members(owner: Any, names: str) -> set[Any]:
    return {getattr(owner, name) for name in names.split() if hasattr(owner, name)}


def _accessors(names: str, accessor: str) -> set[Any]:
    found = _members(Tensor, names)
    return {getattr(each, accessor) for each in found if hasattr(each, accessor)}


PLAIN = (
    _members(Tensor, ASKS)
    | _members(torch, ASKS_OF_TORCH)
    | _accessors(PROPERTIES, "__get__")
    | _accessors(SETTABLE, "__set__")
    | _accessors("grad", "__delete__")
    | {torch.autograd.grad, torch.autograd.backward}
)
LAYING_OUT = _members(Tensor, LAYOUT)
CONVERTING = _members(Tensor, CONVERSIONS)
POINTING = _members(Tensor, POINTERS) | _accessors("__cuda_array_interface__", "__get__")
DETACHING = {Tensor.detach} | _accessors("data", "__get__")
REPLACING = _accessors("data", "__set__")
NODE = {Tensor.view_as, Tensor.expand_as}  # of a tensor and itself: how libraries find its gradient's node
FOREACH = {name: each for name, each in vars(torch).items() if name.startswith("_foreach_")}
# Names of functions that a compiled graph cannot hold: refused ones, and ones whose values refuse writes.
LEAVES_GRAPH = (
    "detach",
    *(name for name in (*dir(Tensor), *FOREACH) if name.endswith("_") and not name.endswith("__")),
    *WRITING - {"__set__", "__delete__"},
    *POINTERS.split(),
    "record_stream",
)


def _let_dynamo_dispatch() -> None:
    """Let compiled code, too, call an FP8 weight's answers to functions that torch does not list.

    Dynamo dispatches the functions of a table that torch makes once. It lacks private ones, and torch's own
    linear if DeepSpeed has replaced `F.linear` before; without dispatch a graph would read NaN. Dynamo keeps
    a copy from its first compilation on.
    """
    overrides.get_overridable_functions()[torch].extend((torch._C._nn.linear, *FOREACH.values()))
    variables = sys.modules.get("torch._dynamo.variables.torch")
    forget = getattr(getattr(variables, "get_overridable_functions", None), "cache_clear", None)
    if forget is not None:
        forget()


_let_dynamo_dispatch()


def compiler_asks() -> bool:
    """Whether torch.compile inspects a weight to make a fake one; older versions set no flag then."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None
