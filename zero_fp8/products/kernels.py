"""The functions that cast, multiply and decode, in one object, called eagerly or, in a graph, as custom ops.

torch.compile sees the names and shapes of the ops and traces into none. They are functional, so that it finds
common casts and drops unused results, and sizes may be symbols. Backward is one op: if its transposed weight
were a value of the graph, the compiler would make it in forward, where all its inputs are known, and keep it
until backward.

All that a graph passes on is contiguous: scales of rows are transposed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_fp8.ops import product_backend, products
from ds_fp8.ops.product_backend import Products
from ds_fp8.ops.products import CastGradient, CastInput, Operand, Weight, padded_tokens, scale_shape, tiles
from ds_fp8.zero_fp8.product_health import IN_GRAPHS

_CODES = torch.float8_e4m3fn
_tracing = ContextVar("tracing", default=False)
_known: dict[str, "Kernels"] = {}


@dataclass(frozen=True)
class Kernels(Products):
    """Functions that cast, encode and multiply; a process has one set per name."""

    multiply: Callable[[Operand, Operand, Tensor | None], Tensor] = products.multiply

    def __post_init__(self) -> None:
        known = _known.setdefault(self.name, self)
        assert known == self, f"two sets of kernels have the name {self.name}"

    @classmethod
    def of(cls, name: str, functions: Products, multiply: Callable[..., Tensor]) -> "Kernels":
        return cls(**{**vars(functions), "name": name, "instead": None, "multiply": multiply})


REFERENCE = Kernels.of("reference", product_backend.REFERENCE, products.multiply)


def named(name: str) -> Kernels:
    """Return the kernels of this name: a custom op takes names, not functions."""
    return _known[name]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    input: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of a product; None for those that are not wanted."""

    input: Tensor | None  # [tokens, K] bfloat16
    weight: Tensor | None  # as the matrix is stored, bfloat16
    bias: Tensor | None  # [N] bfloat16


def in_graph() -> bool:
    """Whether the current call becomes part of a compiled graph."""
    return torch.compiler.is_compiling() or _tracing.get()


@contextmanager
def tracing(on: bool = True) -> Iterator[None]:
    """Mark code that the compiler runs to see its ops; torch before 2.12 does not report it."""
    token = _tracing.set(on)
    try:
        yield
    finally:
        _tracing.reset(token)


def cast_input(kernels: Kernels, x: Tensor, *, wgrad: bool) -> CastInput:
    if not in_graph():
        return kernels.cast_input(x, wgrad=wgrad)
    codes, scales, *turned = _cast_input(kernels.name, x, wgrad)
    return CastInput(Operand(codes, scales), Operand(*turned) if wgrad else None)


def multiply(kernels: Kernels, x: Operand, weight: Weight, bias: Tensor | None, swapped: bool) -> Tensor:
    """Return x W^T + bias. swapped: the weight is stored as [K, N]."""
    if not in_graph():
        return _run_product(kernels, x, weight, bias, swapped)
    y: Tensor = _multiply(kernels.name, x.codes, x.scales, *weight, bias, swapped)
    return y


def differentiate(
    kernels: Kernels,
    dy: Tensor,
    weight: Weight,
    x: Operand | None,
    needs: Needs,
    swapped: bool,
    count: Callable[[CastGradient], None] | None = None,
) -> Gradients:
    """Return the gradients of a product for dy, [tokens, N] bfloat16, contiguous.

    x: of `cast_input`, if the weight's gradient is wanted. swapped: the weight is stored as [K, N]. count:
    called with the cast of dy; graphs look up their counters when they run.
    """
    if in_graph():
        codes, scales = (None, None) if x is None else (x.codes, x.scales)
        found = _differentiate(kernels.name, dy, *weight, codes, scales, [*needs], swapped)
    else:
        found = _run_gradients(kernels, dy, weight, x, needs, swapped, count)
    wanted = iter(found)
    return Gradients(*(next(wanted) if each else None for each in needs))


def decode(kernels: Kernels, codes: Tensor, exponents: Tensor) -> Tensor:
    if not in_graph():
        return _run_decode(kernels, codes, exponents)
    values: Tensor = _decode(kernels.name, codes, exponents)
    return values


def _run_product(kernels: Kernels, x: Operand, weight: Weight, bias: Tensor | None, swapped: bool) -> Tensor:
    if kernels.multiply_weight is not None:
        return kernels.multiply_weight(x, weight, bias, swapped)
    right = kernels.transpose(*weight) if swapped else kernels.expand(*weight)
    return kernels.multiply(x, right, bias)


def _run_gradients(
    kernels: Kernels,
    dy: Tensor,
    weight: Weight,
    x: Operand | None,
    needs: Sequence[bool],  # as `Needs`
    swapped: bool,
    count: Callable[[CastGradient], None] | None,
) -> list[Tensor]:
    """Return the wanted gradients, by one call if there is one and nothing counts the cast."""
    if kernels.differentiate is not None and count is None:
        found = kernels.differentiate(dy, weight, x, needs, swapped)
        if found:
            return found
    found = []
    dgrad, wgrad, bias = needs
    cast = kernels.cast_gradient(dy, dgrad=dgrad, wgrad=wgrad, bias=bias)
    if count is not None:
        count(cast)
    if cast.dgrad is not None:
        right = kernels.expand(*weight) if swapped else kernels.transpose(*weight)
        dx = kernels.multiply(cast.dgrad, right, None)
        found.append(dx if len(dx) == len(dy) else dx[: len(dy)])
    if cast.wgrad is not None and x is not None:
        dw = kernels.multiply(cast.wgrad, x, None)
        found.append(dw.t().contiguous() if swapped else dw)
    if cast.bias is not None:
        found.append(cast.bias)
    return found


def _run_decode(kernels: Kernels, codes: Tensor, exponents: Tensor) -> Tensor:
    """Decode a weight to bfloat16."""
    out = codes.new_empty(codes.shape, dtype=torch.bfloat16)
    kernels.decode_weight(codes, exponents, out)
    return out


# The ops. A list has the wanted results only.


def _op(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op without what `torch.library.custom_op` wraps around each call; autograd never sees it.

    CUDA graphs of the compiler (`mode="reduce-overhead"`) leave it out: a replay runs no Python, and so would
    count nothing on measured steps.
    """
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    torch.library.define(f"ds_fp8::{name}", signature, tags=tags)
    torch.library.impl(f"ds_fp8::{name}", "default", run)
    torch.library.register_fake(f"ds_fp8::{name}", fake)
    op: Callable[..., Any] = getattr(torch.ops.ds_fp8, name).default
    return op


def _run_cast_input(kernels: str, x: Tensor, wgrad: bool) -> list[Tensor]:
    cast = named(kernels).cast_input(x, wgrad=wgrad)
    IN_GRAPHS.cast(x, cast.forward, wgrad)
    turned = () if cast.wgrad is None else (cast.wgrad.codes, cast.wgrad.scales)
    return [cast.forward.codes, cast.forward.scales.t().contiguous(), *turned]


def _fake_cast_input(kernels: str, x: Tensor, wgrad: bool) -> list[Tensor]:
    tokens, features = padded_tokens(x.shape[0]), x.shape[1]
    turned = _fake(x, (features, tokens), scale_shape(features, tokens)) if wgrad else ()
    return [*_fake(x, (tokens, features), (tiles(features), tokens)), *turned]


def _run_multiply(
    kernels: str,
    x: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    swapped: bool,
) -> Tensor:
    IN_GRAPHS.multiply(x, codes)
    weight = Weight(codes, exponents)
    return _run_product(named(kernels), Operand(x, x_scales.t()), weight, bias, swapped)


def _run_differentiate(
    kernels: str,
    dy: Tensor,
    codes: Tensor,
    exponents: Tensor,
    x: Tensor | None,
    x_scales: Tensor | None,
    needs: list[bool],
    swapped: bool,
) -> list[Tensor]:
    right = None if x is None or x_scales is None else Operand(x, x_scales)
    weight, count = Weight(codes, exponents), IN_GRAPHS.gradient(dy, codes)
    return _run_gradients(named(kernels), dy, weight, right, needs, swapped, count)


def _fake_differentiate(
    kernels: str,
    dy: Tensor,
    codes: Tensor,
    exponents: Tensor,
    x: Tensor | None,
    x_scales: Tensor | None,
    needs: list[bool],
    swapped: bool,
) -> list[Tensor]:
    features = codes.shape[0 if swapped else 1]
    shapes = ((dy.shape[0], features), codes.shape, (dy.shape[1],))
    return [dy.new_empty(shape) for shape, each in zip(shapes, needs, strict=True) if each]


def _fake(like: Tensor, codes: tuple[int, int], scales: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return like.new_empty(codes, dtype=_CODES), like.new_empty(scales, dtype=torch.float32)


_cast_input = _op(
    "cast_input",
    "(str kernels, Tensor x, bool wgrad) -> Tensor[]",
    _run_cast_input,
    _fake_cast_input,
)
_multiply = _op(
    "multiply",
    "(str kernels, Tensor x, Tensor x_scales, Tensor codes, Tensor exponents, Tensor? bias, bool swapped) "
    "-> Tensor",
    _run_multiply,
    lambda kernels, x, x_scales, codes, exponents, bias, swapped: x.new_empty(
        x.shape[0], codes.shape[1 if swapped else 0], dtype=torch.bfloat16
    ),
)
_differentiate = _op(
    "differentiate",
    "(str kernels, Tensor dy, Tensor codes, Tensor exponents, Tensor? x, Tensor? x_scales, bool[] needs, "
    "bool swapped) -> Tensor[]",
    _run_differentiate,
    _fake_differentiate,
)
_decode = _op(
    "decode_weight",
    "(str kernels, Tensor codes, Tensor exponents) -> Tensor",
    lambda kernels, codes, exponents: _run_decode(named(kernels), codes, exponents),
    lambda kernels, codes, exponents: codes.new_empty(codes.shape, dtype=torch.bfloat16),
)
