"""A device that launches what Triton compiled and cuBLASLt planned: functions that read the host's memory.

`ops/hopper/launches.cpp` calls them in the place of CUDA's.
"""

import ctypes
from collections import Counter
from ctypes import CFUNCTYPE, POINTER, c_int, c_int32, c_int64, c_size_t, c_uint, c_void_p
from types import SimpleNamespace
from typing import Any

import cublas_support
import pytest
import torch
from cublas_support import Library, read
from torch import Tensor

from ds_fp8.ops import products
from ds_fp8.ops.hopper import build, functions
from ds_fp8.ops.hopper.functions import LAUNCHES
from ds_fp8.ops.products import CastGradient, CastInput, Operand, padded_tokens, scale_shape, tiles
from ds_fp8.ops.triton.products.casts import SUMMED
from ds_fp8.ops.triton.products.weights import MANY

E4M3, FP32 = torch.float8_e4m3fn, torch.float32
THREADS, SHARED = 256, 4096
TURNED_AS_ROWS, SUMS = 2, 8  # bits of a kind of cast


def laid(operand: Operand | None) -> Operand | None:
    """Scales of rows as cuBLAS reads them."""
    if operand is None or operand.scales.shape == scale_shape(*operand.codes.shape):
        return operand
    rows, columns = operand.scales.shape
    return Operand(operand.codes, torch.empty(columns, rows).copy_(operand.scales.t()).t())


def cast_input(x: Tensor, *, wgrad: bool) -> CastInput:
    cast = products.cast_input(x, wgrad=wgrad)
    forward = laid(cast.forward)
    assert forward is not None
    return CastInput(forward, cast.wgrad)


def cast_gradient(dy: Tensor, **wanted: bool) -> CastGradient:
    cast = products.cast_gradient(dy, **wanted)
    return CastGradient(laid(cast.dgrad), laid(cast.wgrad), cast.bias)


def cast_and_sum_tiles(dy: Tensor, *, bias: bool, **wanted: bool) -> tuple[CastGradient, Tensor | None]:
    return cast_gradient(dy, bias=False, **wanted), sums_of_tiles(dy) if bias else None


def sums_of_tiles(dy: Tensor) -> Tensor:
    """Parts that give the sums of `ops.products`: all in the last."""
    parts = torch.zeros(tiles(padded_tokens(len(dy))), dy.shape[1])
    parts[-1] = dy.float().sum(0)
    return parts


class Device:
    """What is launched, by C functions that call Python."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.launches = self.products = 0
        self.context = 1  # of the calling thread
        unsigned = [c_uint] * 7
        self.functions = (
            CFUNCTYPE(c_int, c_void_p, *unsigned, c_void_p, POINTER(c_void_p), c_void_p)(self.launch),
            CFUNCTYPE(c_int, POINTER(c_void_p))(self.get_context),
            CFUNCTYPE(c_int, c_void_p, c_int, c_void_p, c_size_t)(self.set_attribute),
            CFUNCTYPE(c_int, *[c_void_p] * 14, c_size_t, c_void_p)(self.multiply),
        )

    def launched(self) -> Counter[str]:
        return Counter(kernels=self.launches, products=self.products)

    def addresses(self) -> list[int | None]:
        return [ctypes.cast(each, c_void_p).value for each in self.functions]

    def get_context(self, context: Any) -> int:
        context[0] = self.context
        return 0

    def launch(self, function: int, *arguments: Any) -> int:
        """A kernel's handle is its kind and 100."""
        *grid, shared, stream, given, _ = arguments
        assert (grid[1:], shared, stream) == ([1, 1, THREADS, 1, 1], SHARED, 7)
        self.launches += 1
        if function < 94:
            self.sum(grid[0], given)
        elif function < 96:
            self.expand(grid[0], given)
        elif function < 100:
            self.transpose(grid[0], given)
        else:
            self.cast(function - 100, grid[0], given)
        return 0

    def transpose(self, programs: int, given: Any) -> None:
        at = [c_int64.from_address(given[each]).value for each in range(4)]
        rows, columns, groups = (c_int32.from_address(given[each]).value for each in (4, 5, 6))
        assert [c_int64.from_address(given[each]).value for each in (7, 8)] == [0, 0]
        assert programs == tiles(rows) * tiles(columns)
        exponents = read(at[1], (tiles(rows), tiles(columns)), torch.uint8)
        turned = products.transpose(read(at[0], (rows, columns), E4M3), exponents)
        assert turned.scales.shape[1] == groups
        read(at[2], (columns, rows), E4M3).copy_(turned.codes)
        read(at[3], tuple(turned.scales.shape), FP32).copy_(turned.scales)

    def expand(self, programs: int, given: Any) -> None:
        at = [c_int64.from_address(given[each]).value for each in range(2)]
        rows, columns, groups = (c_int32.from_address(given[each]).value for each in (2, 3, 4))
        assert [c_int64.from_address(given[each]).value for each in (5, 6)] == [0, 0]
        assert programs == -(-rows * groups // MANY)
        codes = torch.empty(rows * products.TILE, columns * products.TILE, dtype=E4M3)
        scales = products.expand(codes, read(at[0], (rows, columns), torch.uint8)).scales
        read(at[1], (rows, groups), FP32).copy_(scales)

    def sum(self, programs: int, given: Any) -> None:
        at = [c_int64.from_address(given[each]).value for each in range(2)]
        count, features = (c_int32.from_address(given[each]).value for each in (2, 3))
        assert [c_int64.from_address(given[each]).value for each in (4, 5)] == [0, 0]
        assert programs == -(-features // SUMMED)
        sums = read(at[0], (count, features), FP32).sum(0)
        read(at[1], (features,), torch.bfloat16).copy_(sums)

    def cast(self, kind: int, programs: int, given: Any) -> None:
        at = [c_int64.from_address(given[each]).value for each in range(6)]
        sizes = [c_int32.from_address(given[each]).value for each in range(6, 11)]
        tokens, padded, features, stride, groups = sizes
        assert [c_int64.from_address(given[each]).value for each in (11, 12)] == [0, 0]
        assert (padded, groups) == (padded_tokens(tokens), scale_shape(features, padded)[1])
        assert programs == tiles(padded) * tiles(features)
        values = read(at[0], (tokens, stride), torch.bfloat16)[:, :features]
        if kind & 1:
            rows = products.cast_input(values, wgrad=False).forward
            read(at[1], (padded, features), E4M3).copy_(rows.codes)
            read(at[2], (tiles(features), padded), FP32).copy_(rows.scales.t())
        if kind & (TURNED_AS_ROWS | 4):
            as_rows = bool(kind & TURNED_AS_ROWS)
            gradient = products.cast_gradient(values, dgrad=False, wgrad=True, bias=False).wgrad
            turned = gradient if as_rows else products.cast_input(values, wgrad=True).wgrad
            assert turned is not None
            read(at[3], (features, padded), E4M3).copy_(turned.codes)
            shape = (tiles(padded), features) if as_rows else (tiles(features), groups)
            read(at[4], shape, FP32).copy_(turned.scales.t() if as_rows else turned.scales)
        if kind & SUMS:
            read(at[5], (tiles(padded), features), FP32).copy_(sums_of_tiles(values))

    def set_attribute(self, matmul: int, which: int, value: int, size: int) -> int:
        found = SimpleNamespace(_obj=c_int64.from_address(value))
        return self.library._set(SimpleNamespace(value=matmul), which, found, c_size_t(size))

    def multiply(self, *arguments: Any) -> int:
        self.products += 1
        taken = list(arguments)
        for each in (2, 7):
            taken[each] = SimpleNamespace(_obj=ctypes.c_float.from_address(arguments[each]))
        for each in (1, 4, 6, 9, 11):
            taken[each] = SimpleNamespace(value=arguments[each])
        return self.library._multiply(*taken)


def install(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Make `ops.hopper` use one, which has no kernels yet."""
    assert build.load() is None
    device = Device(cublas_support.install(monkeypatch))
    LAUNCHES.start(device.addresses())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)

    def sum_parts(parts: Tensor) -> Tensor:
        learning(monkeypatch, LAUNCHES.sum_kind())
        return parts.sum(0).to(torch.bfloat16)

    for function in (cast_input, cast_and_sum_tiles, sum_parts):
        monkeypatch.setattr(functions.casts, function.__name__, function)
    for function in (products.transpose, products.expand):
        monkeypatch.setattr(functions.weights, function.__name__, function)
    return device


def learning(monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """Triton has just compiled a kernel of this kind."""
    metadata = SimpleNamespace(num_warps=THREADS // 32, shared=SHARED)
    compiled = SimpleNamespace(metadata=metadata, function=100 + kind)
    monkeypatch.setattr(functions, "latest", lambda: compiled)


def same(found: Operand | None, wanted: Operand | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    strides = found.scales.stride() == wanted.scales.stride()
    return (
        strides
        and torch.equal(found.scales, wanted.scales)
        and torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    )
