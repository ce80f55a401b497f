"""cuBLASLt's FP8 matrix product with block scales, through ctypes.

`torch._scaled_mm` asks cuBLASLt which algorithm to use at every call, which takes the host longer than all
the rest of a product. Here a `Plan` asks once, for a shape, and gets what torch would get. Names, numbers and
structures are those of cublasLt.h, which has kept them since CUDA 12.9.

Its matrices are column-major: y = left right^T of ours, row by row, is y^T = right left^T of cuBLASLt.
"""

import ctypes
import threading
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

# cudaDataType_t, cublasComputeType_t, cublasOperation_t
FP32, BF16, E4M3 = 0, 14, 28
SUM_IN_FP32 = 68
TRANSPOSED = 1
# cublasLtMatmulDescAttributes_t
TRANSA, EPILOGUE, BIAS_POINTER, A_SCALE_POINTER, B_SCALE_POINTER = 3, 7, 8, 17, 18
FAST_ACCUM, BIAS_DATA_TYPE, A_SCALE_MODE, B_SCALE_MODE = 25, 26, 31, 32
# cublasLtEpilogue_t, cublasLtMatmulMatrixScale_t
EPILOGUE_BIAS = 4
OF_ROWS, OF_TILES = 4, 5
# cublasLtMatmulPreferenceAttributes_t
MAX_WORKSPACE_BYTES, MIN_ALIGNMENT_BYTES = 1, (5, 6, 7, 8)

WORKSPACE = 32 << 20  # bytes at most, as torch allows on Hopper
ONE, ZERO = c_float(1), c_float(0)


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True)
class Shape:
    """The key of a plan: shapes and formats."""

    rows: int  # of the left operand and the product
    columns: int  # rows of the right operand
    inner: int
    right_in_tiles: bool  # else a scale per row and 128 elements, as the left one has
    with_bias: bool
    alignment: int  # bytes that divide the addresses of all operands


def find_library() -> ctypes.CDLL | None:
    """The cuBLASLt that torch has loaded; None if there is none of that name."""
    if torch.version.cuda is None:
        return None
    try:
        return ctypes.CDLL(f"libcublasLt.so.{Version(torch.version.cuda).major}")
    except OSError:
        return None


class Plan:
    """A product of one shape on one device, to run any number of times, from any thread."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        """Raises RuntimeError if cuBLASLt has no algorithm for the shape."""
        library = find_library()
        assert library is not None, "cublas.obstacle"
        self._library = library
        self._handle, self._device = _handle(device), device
        self._lock = threading.Lock()  # the descriptor holds the addresses of scales
        self._matmul = _create(library.cublasLtMatmulDescCreate, SUM_IN_FP32, FP32)
        self._set_pointer = library.cublasLtMatmulDescSetAttribute
        self._run = library.cublasLtMatmul
        self._run.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
        self._describe(shape)
        sizes = ((shape.inner, shape.columns), (shape.inner, shape.rows), (shape.columns, shape.rows))
        self._right, self._left, self._product = (
            _create(library.cublasLtMatrixLayoutCreate, dtype, c_uint64(high), c_uint64(wide), c_int64(high))
            for dtype, (high, wide) in zip((E4M3, E4M3, BF16), sizes, strict=True)
        )
        found = self._find(shape)
        self._algorithm, self._workspace = found.algorithm, int(found.workspace)
        self._pointer = c_void_p()
        self._shape, self._columns = shape, shape.columns

    def __call__(
        self, left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The product, [rows, columns] bfloat16, on its device's current stream. Nothing is checked."""
        product = torch.empty(len(left), self._columns, dtype=torch.bfloat16, device=self._device)
        workspace = None
        if self._workspace:
            workspace = torch.empty(self._workspace, dtype=torch.uint8, device=self._device)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)  # as Triton asks: cheaper
        address = product.data_ptr()
        with self._lock, torch.cuda.device(self._device):
            self._point(A_SCALE_POINTER, right_scales)
            self._point(B_SCALE_POINTER, left_scales)
            if bias is not None:
                self._point(BIAS_POINTER, bias)
            status = self._run(
                self._handle,
                self._matmul,
                byref(ONE),
                right.data_ptr(),
                self._right,
                left.data_ptr(),
                self._left,
                byref(ZERO),
                address,
                self._product,
                address,
                self._product,
                self._algorithm,
                None if workspace is None else workspace.data_ptr(),
                self._workspace,
                stream,
            )
        _check(status, "cublasLtMatmul")
        return product

    def copy(self) -> "Plan":
        """A plan of the same product whose descriptor is its own."""
        return Plan(self._shape, self._device)

    def described(self) -> tuple[list[int], list[int], list[int], int]:
        """The device and the shape, handles, the algorithm and the bytes of its workspace, as numbers."""
        handles = self._handle, self._matmul, self._right, self._left, self._product
        return (
            [-1 if self._device.index is None else self._device.index, *map(int, astuple(self._shape))],
            [each.value or 0 for each in handles],
            [c_int64(each).value for each in self._algorithm],
            self._workspace,
        )

    def _describe(self, shape: Shape) -> None:
        self._set(TRANSA, c_int32(TRANSPOSED))
        self._set(FAST_ACCUM, c_int8(0))
        self._set(A_SCALE_MODE, c_int32(OF_TILES if shape.right_in_tiles else OF_ROWS))
        self._set(B_SCALE_MODE, c_int32(OF_ROWS))
        pointers = [A_SCALE_POINTER, B_SCALE_POINTER]
        if shape.with_bias:
            self._set(EPILOGUE, c_int32(EPILOGUE_BIAS))
            self._set(BIAS_DATA_TYPE, c_int32(BF16))
            pointers.append(BIAS_POINTER)
        for each in pointers:  # no address yet, but what divides it
            self._set(each, c_void_p(shape.alignment))

    def _find(self, shape: Shape) -> _Found:
        """The first algorithm that cuBLASLt proposes, always the same for a shape."""
        preference = _create(self._library.cublasLtMatmulPreferenceCreate)
        prefer = self._library.cublasLtMatmulPreferenceSetAttribute
        wishes: list[tuple[int, ctypes._SimpleCData[int]]] = [(MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE))]
        wishes += [(each, c_uint32(shape.alignment)) for each in MIN_ALIGNMENT_BYTES]
        for which, wish in wishes:
            _check(prefer(preference, which, byref(wish), c_size_t(ctypes.sizeof(wish))), "a preference")
        found, count = _Found(), c_int()
        layouts = (self._right, self._left, self._product, self._product)
        search = self._library.cublasLtMatmulAlgoGetHeuristic
        status = search(self._handle, self._matmul, *layouts, preference, 1, byref(found), byref(count))
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        _check(status or found.status or (not count.value), f"no algorithm for {shape}")
        return found

    def _point(self, which: int, tensor: Tensor) -> None:
        self._pointer.value = tensor.data_ptr()
        self._set_pointer(self._matmul, which, byref(self._pointer), c_size_t(8))

    def _set(self, which: int, value: "ctypes._SimpleCData[Any]") -> None:
        size = c_size_t(ctypes.sizeof(value))
        _check(self._set_pointer(self._matmul, which, byref(value), size), f"attribute {which}")


@cache
def _handle(device: torch.device) -> c_void_p:
    library = find_library()
    assert library is not None
    with torch.cuda.device(device):
        return _create(library.cublasLtCreate)


def _create(create: Callable[..., int], *arguments: object) -> c_void_p:
    """The object that a function of cuBLASLt creates and returns through its first argument."""
    made = c_void_p()
    _check(create(byref(made), *arguments), getattr(create, "__name__", "create"))
    return made


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt: {what}: status {status}")
