"""`F.linear` and `torch.addmm` with an FP8 weight, as autograd functions.

The part of x that backward needs is saved, as codes or as x itself; the weight is the owner's buffer, which
must still hold the codes that forward multiplied. Autograd casts gradients to the dtypes of x and bias.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from ds_fp8.zero_fp8.plain_tensors import ALLOWED, kind_of
from ds_fp8.zero_fp8.products.kernels import Gradients, Needs, in_graph, named, tracing
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.ways import Way, way_of

INSTEAD = "weights.exclude with its name keeps a weight in BF16"
_graphs: set[tuple[str, str]] = set()  # names of kernels and ways whose products were traced
_BATCHED = torch._C._dispatch_key_parse("Batched")  # a tensor of is_grads_batched
Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def _once(backward: Backward) -> Backward:
    """Have a second derivative fail, by an error that names the weight.

    torch's `once_differentiable` looks at dy only: dx would be a constant, though it depends on the weight.
    """

    @functools.wraps(backward)
    def run(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, dy)
        depends = dy.requires_grad or all(ctx.needs_input_grad[:2])  # dx on the weight, dw on x
        if not torch.is_grad_enabled() or not depends:
            return found
        text = f"{ctx.matrix.name}: an FP8 product can be differentiated once only; {INSTEAD}"
        fail = torch._C._functions.DelayedError(text.encode(), len(found))
        return fail(*(each if each is None else each.detach().requires_grad_() for each in found))  # type: ignore[arg-type]

    return run


class Product(torch.autograd.Function):
    """x W^T + bias; `swapped`: the weight is stored as [K, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., K]
        weight: Tensor,  # the parameter that gets the gradient
        bias: Tensor | None,  # [N]
        matrix: Matrix,
        way: Way,
        swapped: bool,
        wgrad: bool,
    ) -> Tensor:
        y, saved = _multiply(x, bias, matrix, way, swapped, wgrad)
        compiling = in_graph()
        ctx.save_for_backward(*saved, *([matrix.codes] if compiling else []))
        ctx.matrix, ctx.way, ctx.swapped = matrix, way, swapped
        ctx.input_shape = x.shape
        ctx.generation = None if compiling else matrix.generation
        shape = *x.shape[:-1], y.shape[-1]
        return torch.ops.aten._unsafe_view(y, shape)  # type: ignore[no-any-return]  # a view of y forbids edits

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *_ = ctx.needs_input_grad
        if ctx.generation is not None:
            check_transforms(dy, ctx.matrix)
            if x:
                check_generation(ctx.matrix, ctx.generation)
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        with tracing(ctx.generation is None):
            found = _differentiate(flat, ctx, Needs(x, weight, bias))
        dx = None if found.input is None else found.input.reshape(ctx.input_shape)
        return dx, found.weight, found.bias, None, None, None, None


def check_generation(matrix: Matrix, forward: int) -> None:
    """Fail as torch does if what forward saved was overwritten, or was released."""
    if not matrix.is_here:
        raise RuntimeError(
            f"{matrix.name}: backward needs the codes of this FP8 weight, which ZeRO 3 has released: it was "
            "used outside the forward of its module, without deepspeed.zero.register_external_parameter, or "
            "backward runs within deepspeed.zero.GatheredParameters and its forward did not"
        )
    if matrix.generation != forward:
        raise RuntimeError(
            f"{matrix.name}: one of the variables needed for gradient computation has been modified: the "
            f"codes of this FP8 weight are of version {matrix.generation}; expected version {forward}"
        )


def multiply_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, matrix: Matrix, way: Way, swapped: bool
) -> Tensor:
    """Return the product, with the dtypes that torch would use.

    Raises:
        RuntimeError: x or bias has a dtype, shape or layout that cannot be multiplied with the weight, or the
            call is traced by torch.jit or transformed by torch.func.
    """
    if torch.compiler.is_dynamo_compiling() and matrix.travels:
        y: Tensor = _multiply_outside(x, weight, bias, matrix=matrix, way=way, swapped=swapped)
        return y
    if not torch.compiler.is_compiling():
        x = _dense(x, matrix)
        check_transforms(x, matrix)
        matrix.was_multiplied = True
    if torch.is_autocast_enabled(x.device.type):
        check_autocast(x, matrix)
    else:
        check_dtypes(x, bias, matrix)
    check_shapes(x, bias, matrix, swapped)
    wgrad = torch.is_grad_enabled() and weight.requires_grad
    if torch.compiler.is_dynamo_compiling():
        buffers = matrix.codes, matrix.exponents
        with torch._C.DisableTorchFunctionSubclass():
            names = matrix.kernels.name, way.name
            return _trace(x, weight, bias, buffers, names, swapped, wgrad)  # type: ignore[no-any-return]
    return Product.apply(x, weight, bias, matrix, way, swapped, wgrad)  # type: ignore[no-any-return,no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _multiply_outside(*arguments: Any, **options: Any) -> Tensor:
    """Multiply outside the graph, which would keep fetched codes until its backward."""
    return multiply_input(*arguments, **options)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _trace(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffers: tuple[Tensor, Tensor],  # of the matrix
    names: tuple[str, str],  # of kernels and way
    swapped: bool,
    wgrad: bool,
) -> Tensor:
    """Add a product to Dynamo's graph as one call that it does not trace, for a weight of any name.

    The call's content is traced with autograd, which is by far faster.
    """
    _graphs.add(names)
    kernels = named(names[0])
    matrix, way = Matrix("traced", *buffers, kernels=kernels), way_of(names[1], kernels)
    with tracing():
        return Product.apply(x, weight, bias, matrix, way, swapped, wgrad)  # type: ignore[no-any-return,no-untyped-call]


def never_used(matrices: Iterable[Matrix]) -> list[str]:
    """Name weights that were neither multiplied nor read; none if there are graphs, which do not tell."""
    return [] if _graphs else [each.name for each in matrices if not each.was_multiplied and not each.decodes]


def _dense(x: Tensor, matrix: Matrix) -> Tensor:
    """Refuse inputs that have no address, such as nested or sparse ones; wait for one that is on its way."""
    if type(x) is Tensor and x.layout is torch.strided and not x.is_nested:
        return x
    if isinstance(x, AsyncCollectiveTensor):
        return x.wait()
    kind = kind_of(x)
    if kind is not None:
        raise RuntimeError(f"{matrix.name}: received {kind} as input of an FP8 product, {ALLOWED}; {INSTEAD}")
    return x


def check_transforms(tensor: Tensor, matrix: Matrix) -> None:
    """Refuse what does not see into an FP8 product. tensor: x, or the gradient of y."""
    doer = "torch.jit.trace" if torch._C._get_tracing_state() is not None else None
    if torch._C._are_functorch_transforms_active():
        doer = "torch.func"
    elif torch._C._dispatch_keys(tensor).has(_BATCHED):
        doer = "torch.autograd.grad with is_grads_batched"
    elif forward_ad._current_level >= 0 and _has_tangent(tensor):
        doer = "forward-mode differentiation"
    if doer is not None:
        raise RuntimeError(f"{matrix.name}: {doer} cannot look into an FP8 product; {INSTEAD}")


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def check_autocast(x: Tensor, matrix: Matrix) -> None:
    """Refuse other autocast dtypes; x is cast later, so that q, k and v share the cast of their input."""
    dtype = torch.get_autocast_dtype(x.device.type)
    if dtype is not torch.bfloat16:
        raise RuntimeError(f"{matrix.name}: received autocast to {dtype}, allowed with FP8: torch.bfloat16")
    if not x.is_floating_point() or x.dtype is torch.float64:  # autocast does not cast these
        check_dtypes(x, None, matrix)


def check_dtypes(x: Tensor, bias: Tensor | None, matrix: Matrix) -> None:
    """Refuse dtypes other than bfloat16; torch does not multiply different dtypes either."""
    for what, tensor in (("an input", x), ("a bias", bias)):
        if tensor is not None and tensor.dtype is not torch.bfloat16:
            raise RuntimeError(f"{matrix.name}: received {what} of {tensor.dtype}, allowed: torch.bfloat16")


def check_shapes(x: Tensor, bias: Tensor | None, matrix: Matrix, swapped: bool) -> None:
    """Refuse wrong shapes, which kernels do not check."""
    rows, columns = matrix.codes.shape
    outputs, inputs = (columns, rows) if swapped else (rows, columns)
    if x.dim() == 0 or x.shape[-1] != inputs or x.device != matrix.codes.device:
        raise RuntimeError(
            f"{matrix.name}: received an input of shape {list(x.shape)} on {x.device}, allowed: [..., "
            f"{inputs}] on {matrix.codes.device}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise RuntimeError(
            f"{matrix.name}: received a bias of shape {list(bias.shape)}, allowed: [{outputs}]"
        )


def _multiply(
    x: Tensor, bias: Tensor | None, matrix: Matrix, way: Way, swapped: bool, wgrad: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return y, [tokens, N], and the tensors for backward; without tokens nothing is launched."""
    if x.numel() == 0:
        outputs = matrix.codes.shape[1 if swapped else 0]
        return x.new_empty(0, outputs, dtype=torch.bfloat16), ()
    bias = None if bias is None else bias.to(torch.bfloat16).contiguous()
    return way.forward(x, matrix, bias, swapped=swapped, wgrad=wgrad)


def _differentiate(dy: Tensor, ctx: Any, needs: Needs) -> Gradients:
    """Return gradients for dy, [tokens, N]; zeros without tokens."""
    matrix: Matrix = ctx.matrix
    if dy.numel() == 0:
        shapes = (ctx.input_shape, matrix.codes.shape, dy.shape[1:])
        return Gradients(
            *(dy.new_zeros(shape) if each else None for shape, each in zip(shapes, needs, strict=True))
        )
    saved, codes, way = ctx.saved_tensors, matrix.codes, ctx.way
    if ctx.generation is None:  # saved codes have a version, which the compiled graph checks
        *saved, codes = saved
    found: Gradients = way.backward(dy, saved, matrix, codes, needs=needs, swapped=ctx.swapped)
    return found
