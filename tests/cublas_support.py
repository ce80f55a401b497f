"""A cuBLASLt that multiplies what lies in the host's memory, as the real one reads a GPU's.

It knows what `ops.cublas_lt` calls, by the numbers of cublasLt.h, and is as strict: without an address of
scales there is no algorithm.
"""

import ctypes
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_fp8.ops import cublas, cublas_lt, products
from ds_fp8.ops.products import Operand, scale_shape, tiles

VECTORS, BLOCKS = 4, 5  # CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F, _BLK128x128_32F
INVALID, NOT_SUPPORTED = 7, 15


def read(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


class Library:
    """Functions by their names in the library; what they make are entries of `made`."""

    def __init__(self) -> None:
        self.made: dict[int, dict[int, Any]] = {}
        self.searches = 0
        for kind in ("MatmulDesc", "MatmulPreference"):
            setattr(self, f"cublasLt{kind}Create", lambda out, *_: self._make(out, {}))
            setattr(self, f"cublasLt{kind}SetAttribute", self._set)
        self.cublasLtCreate = lambda out: self._make(out, {})
        self.cublasLtMatmulPreferenceDestroy = lambda preference: 0
        self.cublasLtMatrixLayoutCreate = self._layout
        self.cublasLtMatmulAlgoGetHeuristic = self._search
        self.cublasLtMatmul = partial(self._multiply)  # which takes attributes, as ctypes' functions do

    def _make(self, out: Any, entry: dict[int, Any]) -> int:
        out._obj.value = len(self.made) + 1
        self.made[out._obj.value] = entry
        return 0

    def _layout(self, out: Any, dtype: int, rows: Any, columns: Any, leading: Any) -> int:
        assert leading.value == rows.value
        return self._make(out, {0: dtype, 2: rows.value, 3: columns.value})

    def _set(self, made: Any, which: int, value: Any, size: Any) -> int:
        assert size.value == ctypes.sizeof(value._obj)
        self.made[made.value][which] = value._obj.value
        return 0

    def _search(self, _: Any, matmul: Any, a: Any, b: Any, c: Any, d: Any, wishes: Any, *rest: Any) -> int:
        self.searches += 1
        described, preferred = self.made[matmul.value], self.made[wishes.value]
        assert rest[0] == 1
        assert preferred[1] == 32 << 20
        assert [preferred[each] % 16 for each in (5, 6, 7, 8)] == [0] * 4
        if not described.get(17) or not described.get(18):
            return INVALID
        left, right = (self.made[each.value] for each in (b, a))
        if left[3] % 16 or left[2] % 16 or right[3] % 16:
            return NOT_SUPPORTED
        rest[1]._obj.workspace, rest[2]._obj.value = 64, 1
        return 0

    def _multiply(self, *arguments: Any) -> int:
        _, matmul, one, right, of_right, left, of_left, zero, c, of_c, out, of_out, _, space, size, _ = (
            arguments
        )
        described = self.made[matmul.value]
        assert (one._obj.value, zero._obj.value, c, size) == (1.0, 0.0, out, 64)
        assert space
        assert of_c.value == of_out.value
        assert (described[3], described[25]) == (1, 0), "A transposed, no fast accumulation"
        a, b, d = (self.made[each.value] for each in (of_right, of_left, of_out))
        assert (a[0], b[0], d[0]) == (28, 28, 14), "E4M3, E4M3, BF16"
        assert (a[2], a[3], b[3]) == (b[2], d[2], d[3])
        bias = None
        if described.get(7) == 4:
            assert described[26] == 14
            bias = read(described[8], (a[3],), torch.bfloat16)
        operands = (
            self._operand(left, b, described[18], described[32]),
            self._operand(right, a, described[17], described[31]),
        )
        read(out, (b[3], a[3]), torch.bfloat16).copy_(products.multiply(*operands, bias))
        return 0

    def _operand(self, address: int, layout: dict[int, Any], scales: int, mode: int) -> Operand:
        inner, rows = layout[2], layout[3]
        codes = read(address, (rows, inner), torch.float8_e4m3fn)
        if mode == BLOCKS:
            return Operand(codes, read(scales, scale_shape(rows, inner), torch.float32))
        assert mode == VECTORS
        return Operand(codes, read(scales, (tiles(inner), rows), torch.float32).t())


def install(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Make `ops.cublas` use one, on the host."""
    library = Library()
    cublas._plan.cache_clear()
    cublas_lt._handle.cache_clear()
    monkeypatch.setattr(cublas_lt, "find_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    return library
