"""Check FP8 products against their contract before timing: bits of casts and weights, errors of products.

One run finds all errors, which matters on a borrowed GPU. The reference runs on the CPU.
A product's error is its distance to the product of the same codes in FP64, beyond the error of rounding that
to BF16: at most BEYOND for the contract's FP32 sums and for cuBLAS's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from one_call import by_one_call
from product_operands import gaussian, inputs, pairs
from torch import Tensor

from ds_fp8.ops import products
from ds_fp8.ops.product_backend import MULTIPLY, REFERENCE, Products
from ds_fp8.ops.products import TILE, Operand, tiles
from ds_fp8.ops.weight_runs import Grid, Run, WeightRuns

TOKENS = (0, 1, 3, 17, 100, 4097)
SIZES = ((208, 272), (528, 128), (2048, 1040))  # K and N
TINY_TOKENS, TINY_SIZES = (0, 1, 17), ((208, 272),)
BEYOND = 1e-4
NAMES = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True)
class Error:
    """Error of one product of one shape, as shares of the exact product's norm."""

    product: str
    multiply: str  # cublas or emulated
    tokens: int
    inner: int  # K
    outer: int  # N
    rounding: float  # of the exact product, rounded to BF16
    beyond: float  # by which the error is larger than the rounding


@dataclass(frozen=True)
class Verified:
    """What was compared, and what is wrong."""

    lines: list[str]
    errors: list[Error]
    wrong: list[str]


def same_operand(name: str, found: Operand | None, wanted: Operand | None) -> None:
    """Compare bits of codes and scales; blocks that are not finite must decode to no finite value."""
    assert found is not None, name
    assert wanted is not None, name
    scales, decoded = found.scales.cpu(), Operand(found.codes.cpu(), found.scales.cpu()).decode()
    assert torch.equal(scales, wanted.scales), f"{name}: other scales"
    finite = Operand(torch.ones_like(wanted.codes, dtype=torch.float32), wanted.scales).decode().isfinite()
    differ = (found.codes.cpu().view(torch.uint8) != wanted.codes.view(torch.uint8)) & finite
    assert not differ.any(), f"{name}: {int(differ.sum())} codes differ"
    assert not decoded[~finite].isfinite().any(), f"{name}: finite values of a block that is not"


def casts(ours: Products, device: torch.device, shapes: list[tuple[int, int]]) -> Iterator[str]:
    """Compare casts; yield one line per case."""
    options = {"dgrad": True, "wgrad": True, "bias": True}
    for tokens, features in shapes:
        for kind, values in inputs(tokens, features, tokens + features):
            name = f"{kind}, {tokens} tokens, {features} features"
            x, expected = (
                ours.cast_input(values.to(device), wgrad=True),
                REFERENCE.cast_input(values, wgrad=True),
            )
            dy = ours.cast_gradient(values.to(device), **options)
            wanted = REFERENCE.cast_gradient(values, **options)
            same_operand(f"{name}: x", x.forward, expected.forward)
            same_operand(f"{name}: x for wgrad", x.wgrad, expected.wgrad)
            same_operand(f"{name}: dy", dy.dgrad, wanted.dgrad)
            same_operand(f"{name}: dy for wgrad", dy.wgrad, wanted.wgrad)
            same_sums(f"{name}: sums", dy.bias, values)
            yield name


def same_sums(name: str, found: Tensor | None, values: Tensor) -> None:
    assert found is not None, name
    exact, size = values.double().sum(0), values.double().abs().sum(0)
    finite = exact.isfinite() & (size < 1e38)
    low, high = ((exact + error * size).bfloat16() for error in (-1e-5, 1e-5))
    assert ((low <= found.cpu()) & (found.cpu() <= high))[finite].all(), name


def weights(ours: Products, device: torch.device, sizes: list[tuple[int, int]]) -> Iterator[str]:
    """Compare weights; yield one line per case: a matrix cut into three runs."""
    for columns, rows in sizes:
        for kind, values in inputs(rows, columns, rows):
            flat, name = values.reshape(-1), f"{kind}, {rows} x {columns}"
            exponents = torch.zeros(tiles(rows), tiles(columns), dtype=torch.uint8)
            codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
            products.find_exponents(flat, 0, columns, exponents)
            products.encode_weight(flat, 0, columns, exponents, codes.view(-1))
            ends = [0, len(flat) // 3 // TILE * TILE, len(flat) // 2 + 1, len(flat)]
            found, made = torch.zeros_like(exponents, device=device), torch.empty_like(codes, device=device)
            runs = [(flat[a:b].to(device, copy=True), a, b) for a, b in pairwise(ends)]
            for run, first, _ in runs:
                ours.find_exponents(run, first, columns, found)
            assert torch.equal(found.cpu(), exponents), f"{name}: other exponents"
            for run, first, last in runs:
                ours.encode_weight(run, first, columns, found, made.view(-1)[first:last])
            ones = Operand(codes, products.power_of_two(exponents))
            same_operand(name, Operand(made, ones.scales.to(device)), ones)
            decoded_and_turned(ours, name, codes, exponents, device)
            yield name


def together(ours: Products, device: torch.device, sizes: list[tuple[int, int]]) -> Iterator[str]:
    """Compare weights of all sizes at once with each alone; of the first a rank has the second half.

    Codes lie elsewhere than values, at whole words and not.
    """
    matrices = [dict(inputs(rows, columns, rows)) for columns, rows in sizes]
    for kind, apart in (("normal", 0), ("wide", 16), ("denormal", 7)):
        grids: list[Grid] = []
        runs: list[Run] = []
        parts: list[Tensor] = []
        for values in (each[kind] for each in matrices):
            rows, columns = values.shape
            first = 0 if grids else values.numel() // 2 // TILE * TILE
            start, shape = grids[-1].place.stop if grids else 0, (tiles(rows), tiles(columns))
            grids.append(Grid(columns, shape, slice(start, start + shape[0] * shape[1])))
            taken = sum(map(len, parts))
            parts.append(values.reshape(-1)[first:].to(device))
            runs.append(Run(grids[-1], first, len(parts[-1]), taken, taken + apart))
        made = [
            encoded(functions(ours, runs), grids, torch.cat(parts), apart)
            for functions in (ours.weight_runs, WeightRuns)
        ]
        assert all(map(torch.equal, *made)), f"{kind}: {len(sizes)} matrices at once"
        yield kind


def encoded(runs: WeightRuns, grids: list[Grid], values: Tensor, apart: int) -> list[Tensor]:
    exponents = torch.zeros(grids[-1].place.stop, dtype=torch.uint8, device=values.device)
    runs.find_exponents(values, exponents)
    codes = torch.zeros(len(values) + apart, dtype=torch.uint8, device=values.device)
    for go in (0.0, 1.0):  # a step that is skipped, and one that is not
        control = torch.tensor([1.0, go], device=values.device)
        runs.encode(values, exponents, codes.view(torch.float8_e4m3fn), control)
        assert go or not codes.any(), "a skipped step writes codes"
    return [exponents, codes]


def decoded_and_turned(
    ours: Products, name: str, codes: Tensor, exponents: Tensor, device: torch.device
) -> None:
    """Compare decoding, the transpose, and scales as cuBLAS reads them."""
    rows, columns = codes.shape
    turned = ours.transpose(codes.to(device), exponents.to(device))
    assert torch.equal(turned.codes.cpu().view(torch.uint8), codes.t().view(torch.uint8)), (
        f"{name}: transpose"
    )
    scales = REFERENCE.transpose(codes, exponents).scales
    assert torch.equal(turned.scales.cpu(), scales), f"{name}: transpose, scales"
    for dtype in (torch.bfloat16, torch.float32):
        found, wanted = (torch.empty(rows, columns, dtype=dtype, device=each) for each in (device, "cpu"))
        ours.decode_weight(codes.to(device), exponents.to(device), found)
        products.decode_weight(codes, exponents, wanted)
        same = (found.cpu() == wanted) | ~(found.cpu().isfinite() | wanted.isfinite())
        assert same.all(), f"{name}: decoded to {dtype}"
    expanded = ours.expand(codes.to(device), exponents.to(device)).scales
    assert torch.equal(expanded.cpu(), REFERENCE.expand(codes, exponents).scales), f"{name}: expanded scales"


def errors(
    ours: Products, ways: list[str], device: torch.device, shape: tuple[int, int, int]
) -> Iterator[Error | str]:
    """Yield the error of every product of a linear layer by every way, or a description of what is wrong."""
    tokens, inner, outer = shape
    x, dy = (gaussian(tokens, each, device=device, seed=each) for each in (inner, outer))
    w, bias = gaussian(outer, inner, device=device, seed=2), gaussian(outer, device=device, seed=1)
    found = pairs(ours, x, w, dy)
    cases = [(name, *found[name], None) for name in NAMES]
    cases.append(("forward with bias", *found["forward"], bias))
    for name, left, right, added in cases:
        exact = left.decode().double() @ right.decode().double().t() + (0 if added is None else added)
        for way in ways:
            case = (name, way, *shape)
            try:
                yield error_of(MULTIPLY[way](left, right, added), exact, case)
            except (AssertionError, RuntimeError, ValueError) as error:
                yield f"{case}: {type(error).__name__}: {str(error).splitlines()[0][:300]}"


def error_of(found: Tensor, exact: Tensor, case: tuple[str, str, int, int, int]) -> Error:
    """Return the error of a product. Raises AssertionError if it is too large."""

    def relative(values: Tensor) -> float:
        return float((values.double() - exact).norm() / exact.norm()) if exact.any() else 0.0

    rounding = relative(exact.to(torch.bfloat16))
    error = Error(*case, rounding, relative(found) - rounding)
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}"
    assert found.isfinite().all(), "values that are not finite"
    assert error.beyond <= BEYOND, f"{error.beyond:.1e} beyond rounding's {rounding:.1e}, allowed: {BEYOND}"
    return error


def bad_values(ours: Products, way: str, device: torch.device) -> Iterator[str]:
    """Yield one line per case: inf and NaN reach their row of every product, and rows of zeros give zeros."""
    w = gaussian(272, 208, device=device, seed=2)
    for bad in (torch.inf, -torch.inf, torch.nan):
        x, dy = (gaussian(100, each, device=device, seed=each) for each in (208, 272))
        x[7, 5] = dy[9, 200] = bad
        x[8] = dy[10] = 0
        found = {name: MULTIPLY[way](*each, None) for name, each in pairs(ours, x, w, dy).items()}
        rows_are(found["forward"], {7}, f"{bad}: forward")
        rows_are(found["dgrad"], {9}, f"{bad}: dgrad")
        assert not found["forward"][8].any(), "a row of zeros"
        assert not found["dgrad"][10].any(), "a row of zeros"
        assert not found["wgrad"][200].isfinite().any(), f"{bad}: wgrad, from dy"
        assert not found["wgrad"][:, :TILE].isfinite().any(), f"{bad}: wgrad, from x's tile"
        yield f"{way}, {bad}"


def rows_are(found: Tensor, bad: set[int], name: str) -> None:
    finite = found.isfinite()
    rows = set((~finite.all(1)).nonzero().flatten().tolist())
    assert rows == bad, f"{name}: rows {rows} are not finite, expected {bad}"
    assert not finite[list(bad)].any(), f"{name}: not the whole row"


def verify(ours: Products, ways: list[str], device: torch.device, tiny: bool) -> Verified:
    """Compare everything; a kind of case ends with the first failure, products continue."""
    tokens, sizes = (TINY_TOKENS, TINY_SIZES) if tiny else (TOKENS, SIZES)
    shapes = [(each, features) for each in tokens for features in {size for pair in sizes for size in pair}]
    kinds: dict[str, Callable[[], Iterator[str]]] = {
        "casts": lambda: casts(ours, device, shapes),
        "weights": lambda: weights(ours, device, list(sizes)),
        "weights at once": lambda: together(ours, device, list(sizes)),
        **{f"inf, NaN and zeros, {way}": partial(bad_values, ours, way, device) for way in ways},
    }
    if ours.multiply_weight is not None:
        linears = [(count, *size) for size in sizes for count in tokens if count]
        kinds["products by one call"] = lambda: by_one_call(ours, device, linears)
    lines, wrong = [], []
    for name, cases in kinds.items():
        try:
            lines.append(f"{name}: {sum(1 for _ in cases())} correct cases")
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
    found = [
        each for size in sizes for count in tokens for each in errors(ours, ways, device, (count, *size))
    ]
    right = [each for each in found if isinstance(each, Error)]
    for way in ways:
        beyond = [each.beyond for each in right if each.multiply == way]
        lines.append(f"{way}: {len(beyond)} products, at most {max(beyond, default=0):.1e} beyond rounding")
    return Verified(lines, right, wrong + [each for each in found if isinstance(each, str)])
