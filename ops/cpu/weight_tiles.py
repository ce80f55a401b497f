"""Weights of products on a CPU: what `ops.products` does to them, in C++ (`csrc/weights.h`), bit for bit."""

from ctypes import byref

import torch
from torch import Tensor

from ds_fp8.ops import guards
from ds_fp8.ops.cpu.kernels import c_values, load
from ds_fp8.ops.cpu.structures import CRun


def find_exponents(values: Tensor, first: int, columns: int, exponents: Tensor) -> None:
    """`ops.products.find_exponents`."""
    guards.check_run(values, first, columns, exponents)
    run = CRun(first, values.numel(), columns)
    load().find_exponents(values.data_ptr(), byref(run), exponents.data_ptr(), torch.get_num_threads())


def encode_weight(
    values: Tensor,
    first: int,
    columns: int,
    exponents: Tensor,
    codes: Tensor,
    control: Tensor | None = None,
) -> None:
    """`ops.products.encode_weight`."""
    guards.check_run(values, first, columns, exponents, codes)
    if control is not None and not control[1]:
        return
    run, threads = CRun(first, values.numel(), columns), torch.get_num_threads()
    load().encode_weight(values.data_ptr(), byref(run), exponents.data_ptr(), codes.data_ptr(), threads)


def decode_weight(codes: Tensor, exponents: Tensor, out: Tensor) -> None:
    """`ops.products.decode_weight`."""
    guards.check_decode(codes, exponents, out)
    run, threads = CRun(0, codes.numel(), codes.shape[1]), torch.get_num_threads()
    load().decode_weight(codes.data_ptr(), byref(run), exponents.data_ptr(), byref(c_values(out)), threads)
