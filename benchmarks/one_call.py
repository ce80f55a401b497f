"""Check the calls of C++ that launch all kernels of a product: they have the bits of their parts."""

from collections.abc import Iterator

import torch
from product_operands import at_odd_address, gaussian, pairs, stored
from torch import Tensor

from ds_fp8.ops.product_backend import MULTIPLY, Products
from ds_fp8.ops.products import Operand, Weight


def by_one_call(ours: Products, device: torch.device, shapes: list[tuple[int, int, int]]) -> Iterator[str]:
    """Yield one line per case: a product that prepares its weight, and a backward, have the bits of parts.

    The weight as it is, and stored transposed. Each call runs twice: the first may be made of parts.
    """
    assert ours.multiply_weight is not None
    assert ours.differentiate is not None
    for tokens, inner, outer in shapes:
        x, dy = (gaussian(tokens, each, device=device, seed=each) for each in (inner, outer))
        w, bias = gaussian(outer, inner, device=device, seed=2), gaussian(outer, device=device, seed=1)
        operands = pairs(ours, x, w, dy)
        wanted = [MULTIPLY["cublas"](*operands["forward"], each) for each in (bias, None)]
        dx, dw = (MULTIPLY["cublas"](*operands[each], None) for each in ("dgrad", "wgrad"))
        for swapped in (False, True):
            weight = at_odd_address(stored(ours, w.t().contiguous() if swapped else w))
            ours.expand(*weight), ours.transpose(*weight)  # so that both are known
            case = f"{tokens} tokens, {inner} -> {outer}{', transposed' if swapped else ''}"
            left = operands["forward"][0]
            for _ in range(2):
                found = [ours.multiply_weight(left, weight, each, swapped) for each in (bias, None)]
                assert all(map(torch.equal, found, wanted)), f"{case}: forward"
            assert launched(left, weight, bias, swapped), f"{case}: forward is made of parts"
            db = ours.cast_gradient(dy, dgrad=True, wgrad=True, bias=True).bias
            assert db is not None
            made = ours.differentiate(dy, weight, operands["wgrad"][1], (True, True, True), swapped)
            assert len(made) == 3, f"{case}: backward is made of parts"
            assert torch.equal(made[0], dx[:tokens]), f"{case}: dgrad"
            assert torch.equal(made[1], dw.t() if swapped else dw), f"{case}: wgrad"
            assert torch.equal(made[2], db), f"{case}: bias"
            yield case


def launched(left: Operand, weight: Weight, bias: Tensor, swapped: bool) -> bool:
    """Whether C++ makes a product by one call."""
    stream = torch.cuda.current_stream().cuda_stream
    launch = torch.ops.ds_fp8_launches.multiply_weight
    return bool(launch(left.codes, left.scales, *weight, bias, swapped, stream))
