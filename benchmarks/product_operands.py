"""Matrices for checks and timings of FP8 products: values of several kinds, weights, operands."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_fp8.ops.product_backend import Products
from ds_fp8.ops.products import Operand, Weight, tiles


def inputs(rows: int, columns: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield matrices of several kinds, [rows, columns] bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    spread = torch.randn(rows, columns, generator=generator).mul(8).exp()
    bits = torch.randint(-(2**15), 2**15, (rows, columns), generator=generator).to(torch.int16)
    some = torch.rand(rows, 1, generator=generator) < 0.3
    yield "normal", normal.bfloat16()
    yield "wide", (normal * spread).bfloat16()
    yield "rows of zeros", torch.where(some, 0.0, normal).bfloat16()
    yield "denormal", (bits & 0x807F - 0x10000).view(torch.bfloat16)
    yield "any bits", bits.view(torch.bfloat16)


def gaussian(*shape: int, device: torch.device, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def stored(ours: Products, values: Tensor) -> Weight:
    """Return a weight of these values."""
    rows, columns = values.shape
    exponents = torch.zeros(tiles(rows), tiles(columns), dtype=torch.uint8, device=values.device)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=values.device)
    ours.find_exponents(values.view(-1), 0, columns, exponents)
    ours.encode_weight(values.view(-1), 0, columns, exponents, codes.view(-1))
    return Weight(codes, exponents)


def at_odd_address(weight: Weight) -> Weight:
    """Exponents as in a bucket, where they begin at any byte."""
    room = weight.exponents.new_empty(weight.exponents.numel() + 3)
    exponents = room[3:].view(weight.exponents.shape).copy_(weight.exponents)
    return weight._replace(exponents=exponents)


def pairs(ours: Products, x: Tensor, w: Tensor, dy: Tensor) -> dict[str, tuple[Operand, Operand]]:
    """Return left and right of every product of a linear layer."""
    weight = stored(ours, w)
    forward, dgrad = ours.expand(*weight), ours.transpose(*weight)
    of_x = ours.cast_input(x, wgrad=True)
    of_dy = ours.cast_gradient(dy, dgrad=True, wgrad=True, bias=False)
    assert of_x.wgrad is not None
    assert of_dy.dgrad is not None
    assert of_dy.wgrad is not None
    return {
        "forward": (of_x.forward, forward),
        "dgrad": (of_dy.dgrad, dgrad),
        "wgrad": (of_dy.wgrad, of_x.wgrad),
    }
