"""What the tests of FP8 products share: operands that go wrong easily, and how two operands are the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from kernel_support import assert_same, garbage, not_finite, raw, rows_of
from torch import Tensor

from ds_fp8.ops import products
from ds_fp8.ops.product_backend import REFERENCE, Products
from ds_fp8.ops.products import TILE, Operand, padded_tokens, scale_shape, tiles
from ds_fp8.ops.weight_runs import Grid, Run, WeightRuns

KINDS = ("normal", "zero", "tiny", "denormal", "huge", "sparse")
WITH_BAD = (*KINDS, "inf", "nan", "bits")
SHAPES = ((0, 16), (1, 208), (3, 528), (17, 128), (300, 272))  # tokens, features


def matrix(rows: int, columns: int, kinds: Sequence[str], seed: int = 0) -> Tensor:
    """[rows, columns] bfloat16 in patches, of every kind; a tile may be all zeros."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(kinds), (rows,), generator=generator).tolist()
    values = rows_of([kinds[each] for each in chosen], columns, seed).to(torch.bfloat16)
    values[TILE : 2 * TILE, :TILE] = 0
    return values


def scales_as_rows(operand: Operand) -> Tensor:
    """A scale per element, [rows, inner]."""
    return Operand(torch.ones_like(operand.codes, dtype=torch.float32), operand.scales).decode()


def assert_same_operand(actual: Operand | None, expected: Operand | None, what: str) -> None:
    """Codes and scales, bit for bit; what the codes of a block that is not finite are means nothing."""
    if actual is None or expected is None:
        assert actual is expected, what
        return
    assert actual.codes.is_contiguous(), what
    assert_same(actual.scales, expected.scales, f"{what}, scale")
    free = not_finite(scales_as_rows(expected)) if expected.codes.numel() else None
    assert_same(actual.codes, expected.codes, f"{what}, code", free=free)
    assert_same(actual.decode(), expected.decode(), f"{what}, value", alike=not_finite)


def check_casts(ours: Products, values: Tensor, where: torch.device) -> None:
    """x and dy, with everything that can be wanted of them."""
    found, wanted = ours.cast_input(values.to(where), wgrad=True), REFERENCE.cast_input(values, wgrad=True)
    assert_same_operand(found.forward, wanted.forward, "forward")
    assert_same_operand(found.wgrad, wanted.wgrad, "wgrad of x")
    options = {"dgrad": True, "wgrad": True, "bias": True}
    gradient = ours.cast_gradient(values.to(where), **options)
    expected = REFERENCE.cast_gradient(values, **options)
    assert_same_operand(gradient.dgrad, expected.dgrad, "dgrad")
    assert_same_operand(gradient.wgrad, expected.wgrad, "wgrad of dy")
    assert gradient.bias is not None
    check_sums(values, gradient.bias.cpu())
    check_strides(found.forward, found.wgrad, gradient.dgrad, gradient.wgrad)


def check_sums(values: Tensor, sums: Tensor, error: float = 1e-5) -> None:
    """FP32 sums over the tokens, in whatever order, rounded to BF16."""
    exact, size = values.double().sum(0), values.double().abs().sum(0)
    finite = exact.isfinite() & (size < torch.finfo(torch.float32).max / 2)
    low, high = ((exact + sign * error * size).bfloat16() for sign in (-1, 1))
    assert bool(((low <= sums) & (sums <= high))[finite].all())
    assert not bool(sums[~exact.isfinite()].isfinite().any())


def check_strides(*operands: Operand | None) -> None:
    """Scales lie as cuBLAS reads them."""
    for operand in operands:
        assert operand is not None
        rows, inner = operand.codes.shape
        of_tiles = len(operand.scales) != rows
        expected = (scale_shape(rows, inner)[1], 1) if of_tiles else (1, rows)
        if operand.scales.numel():
            assert operand.scales.stride() == expected


@dataclass(frozen=True)
class Weight:
    """A matrix and what the reference makes of it."""

    values: Tensor  # [rows, columns] bfloat16
    exponents: Tensor
    codes: Tensor  # [rows, columns]

    @staticmethod
    def of(values: Tensor) -> "Weight":
        rows, columns = values.shape
        exponents = torch.zeros(tiles(rows), tiles(columns), dtype=torch.uint8)
        products.find_exponents(values.reshape(-1), 0, columns, exponents)
        codes = torch.empty(rows * columns, dtype=torch.float8_e4m3fn)
        products.encode_weight(values.reshape(-1), 0, columns, exponents, codes)
        return Weight(values, exponents, codes.view(rows, columns))

    @property
    def free(self) -> Tensor:
        """Codes that mean nothing: those of a tile that is not finite."""
        rows, columns = self.codes.shape
        spread = self.exponents.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
        return spread == 255


def check_runs(ours: Products, weight: Weight, cuts: Sequence[int], where: torch.device) -> None:
    """Exponents and codes of a matrix that is cut into runs are those of the whole."""
    rows, columns = weight.values.shape
    flat, ends = weight.values.reshape(-1), sorted({0, *cuts, weight.values.numel()})
    exponents = torch.zeros_like(weight.exponents, device=where)
    runs = [(flat[a:b].to(where, copy=True), a) for a, b in pairwise(ends)]
    for values, first in runs:
        ours.find_exponents(values, first, columns, exponents)
    assert_same(exponents, weight.exponents, "exponent")
    made = []
    for values, first in runs:
        codes = garbage(len(values) + 2 * TILE, dtype=torch.float8_e4m3fn).to(where)
        ours.encode_weight(values, first, columns, exponents, codes[TILE:-TILE])
        for edge in (codes[:TILE], codes[-TILE:]):
            assert_same(edge, garbage(TILE, dtype=torch.float8_e4m3fn), "a neighbour's code")
        made.append(codes[TILE:-TILE].cpu())
    assert_same(torch.cat(made).view(rows, columns), weight.codes, "code", free=weight.free)


def check_weight_runs(ours: Products, weights: Sequence[Weight], cut: int, gap: int) -> None:
    """Many matrices at once are each as alone; a step that is skipped writes no code.

    A rank has the elements of the first matrix from `cut` on, those up to `cut` of the last, and the others
    whole. Between two runs are `gap` elements, of values and codes, that belong to nobody.
    """
    grids: list[Grid] = []
    runs: list[Run] = []
    parts = [torch.empty(0)]
    for weight in weights:
        (rows, columns), (down, across) = weight.values.shape, weight.exponents.shape
        start = grids[-1].place.stop if grids else 0
        grids.append(Grid(columns, (down, across), slice(start, start + down * across)))
        first = cut if weight is weights[0] else 0
        last = cut if weight is weights[-1] else rows * columns
        taken = sum(map(len, parts)) + gap
        runs.append(Run(grids[-1], first, last - first, taken, taken + gap))
        parts += [torch.full((gap,), 9.0), weight.values.reshape(-1)[first:last]]
    values = torch.cat(parts).to(torch.bfloat16)
    found, wanted = (
        results(functions.weight_runs(functions, runs), grids, values, gap) for functions in (ours, REFERENCE)
    )
    for key, each in wanted.items():
        assert_same(found[key], each, key)


def results(together: WeightRuns, grids: Sequence[Grid], values: Tensor, gap: int) -> dict[str, Tensor]:
    exponents = torch.zeros(grids[-1].place.stop, dtype=torch.uint8)
    together.find_exponents(values, exponents)
    skipped = garbage(len(values) + gap, dtype=torch.float8_e4m3fn)
    together.encode(values, exponents, skipped, torch.tensor([1.0, 0.0]))
    codes, first = skipped.clone(), skipped.clone()
    together.encode(values, exponents, codes, torch.tensor([1.0, 1.0]))
    together.encode(values, exponents, first)
    return {
        "exponent": exponents,
        "skipped code": skipped,
        "code": codes,
        "first code": first,
    }


def check_weight(ours: Products, weight: Weight, where: torch.device) -> None:
    """Decoding, transposing and the scales that cuBLAS reads."""
    rows, columns = weight.codes.shape
    codes, exponents = weight.codes.to(where), weight.exponents.to(where)
    for dtype in (torch.float32, torch.bfloat16):
        found, wanted = (torch.empty(rows, columns, dtype=dtype, device=each) for each in (where, "cpu"))
        ours.decode_weight(codes, exponents, found)
        products.decode_weight(weight.codes, weight.exponents, wanted)
        assert_same(found, wanted, "value", alike=not_finite)
    turned = ours.transpose(codes, exponents)
    assert turned.codes.is_contiguous()
    assert_same(turned.codes, weight.codes.t().contiguous(), "transposed code")
    wanted = products.transpose(weight.codes, weight.exponents).scales
    assert turned.scales.is_contiguous()
    assert_same(turned.scales, wanted, "scale of a transposed tile")
    expanded = ours.expand(codes, exponents)
    assert expanded.codes is codes
    assert expanded.scales.is_contiguous()
    assert_same(expanded.scales, products.expand(weight.codes, weight.exponents).scales, "scale of a tile")


def padding_is_neutral(operand: Operand, tokens: int, axis: int) -> bool:
    """Whether codes of tokens that are not there are zeros, and scales of theirs alone 1."""
    codes = raw(operand.codes).narrow(axis, tokens, padded_tokens(tokens) - tokens)
    alone = operand.scales[tokens:] if axis == 0 else operand.scales.new_ones(1)
    return not bool(codes.any()) and bool((alone == 1).all())
