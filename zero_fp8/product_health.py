"""Health of FP8 products: what casting did to x, dy and w of each matrix, on the steps that are measured.

On such a step a matrix has counts, to which products and the encoding of its codes add; on every other it
has none, and nothing is computed. Counting is plain PyTorch on the device; nothing waits. Elements of a block
with inf or NaN do not count.

A compiled graph is one for many matrices and for all steps. So its ops ask when they run (`IN_GRAPHS`), and
find the matrix by the address of the codes that they are given: of exponents, which may begin at any byte,
the compiler makes aligned copies.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from ds_fp8.ops.blocks import NOT_FINITE, power_of_two
from ds_fp8.ops.capture import captured
from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.products import TILE, CastGradient, Operand
from ds_fp8.zero_fp8.comm.collectives import max_over_ranks, sum_over_ranks

OPERANDS = ("x", "dy", "w")
SUMS = 3  # non-zero elements; those whose code is zero; those at the largest code
# Beside them the largest scale, and the smallest with its sign changed, so that both are maxima.
_NOTHING = (*[0.0] * SUMS, 0.0, -math.inf)
_ZEROS = 1  # the byte of a tile of zeros
_LARGEST = int(torch.tensor(E4M3.max).to(E4M3.dtype).view(torch.uint8))  # the code of 448

Shares = dict[str, float]


class ProductCounts:
    """The counts of one matrix."""

    def __init__(self, counts: Tensor) -> None:
        """counts: [operands, sums and extremes] float64, added to."""
        self._x, self._dy, self._w = counts

    def of_input(self, x: Tensor, cast: Operand) -> None:
        """x: [tokens, K] bfloat16; cast: with a scale per token and 128 features."""
        self.add_input(*_of_rows(x, cast))

    def add_input(self, sums: Tensor, extremes: Tensor) -> None:
        """What has been counted of x before."""
        _add(self._x, sums, extremes)

    def of_gradient(self, dy: Tensor, cast: CastGradient) -> None:
        """dy: [tokens, N] bfloat16; as cast for dgrad, or for wgrad if there is no other."""
        if cast.dgrad is not None:
            _add(self._dy, *_of_rows(dy, cast.dgrad))
        elif cast.wgrad is not None:
            _add(self._dy, *_of_rows(dy.t(), cast.wgrad))

    def of_weight(self, values: Tensor, codes: Tensor, exponents: Tensor) -> None:
        """values: [n] bfloat16, a rank's part; codes: [n]; exponents: of all tiles of the matrix, uint8."""
        live = (exponents > _ZEROS) & (exponents < NOT_FINITE)
        counts = torch.stack([mask.sum() for mask in _masks(values, codes)])
        _add(self._w, counts, _extremes(power_of_two(exponents), live))


class Measured(Protocol):
    """A matrix that has counts on measured steps."""

    name: str
    counts: ProductCounts | None
    codes: Tensor


class InGraphs:
    """The counts of matrices whose products are ops of compiled graphs, of all engines of a process.

    q, k and v share the op that casts their input, so it counts before it is known for which matrices: each
    product then adds what was counted of the codes that it is given.
    """

    def __init__(self) -> None:
        self._matrices: WeakSet[Measured] = WeakSet()  # an engine that goes lets its matrices go
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # sums and extremes by the address of codes

    def follow(self, matrices: Sequence[Measured]) -> None:
        self._matrices.update(matrices)

    def leave(self, matrices: Sequence[Measured]) -> None:
        self._matrices.difference_update(matrices)
        self._inputs.clear()

    def cast(self, x: Tensor, cast: Operand, wgrad: bool) -> None:
        """x was cast; it counts if a weight's gradient wants it. Codes may have the memory of older ones."""
        if not self._measures(x):
            return
        self._inputs.pop(cast.codes.data_ptr(), None)
        if wgrad:
            self._inputs[cast.codes.data_ptr()] = _of_rows(x, cast)

    def multiply(self, x: Tensor, codes: Tensor) -> None:
        """x, codes of an input, meets the weight that has these codes; if x does not count, nothing."""
        counts, counted = self._of(codes), self._inputs.get(x.data_ptr())
        if counts is not None and counted is not None:
            counts.add_input(*counted)

    def gradient(self, dy: Tensor, codes: Tensor) -> Callable[[CastGradient], None] | None:
        """What counts casts of dy for the weight that has these codes, if something does."""
        counts = self._of(codes)
        return None if counts is None else partial(counts.of_gradient, dy)

    def _of(self, codes: Tensor) -> ProductCounts | None:
        """The counts of the weight that has these codes, while ops count."""
        if not self._measures(codes):
            return None
        address = codes.data_ptr()
        return next((each.counts for each in self._matrices if each.codes.data_ptr() == address), None)

    def _measures(self, values: Tensor) -> bool:
        """Whether an op of these values counts; not in a CUDA graph, which is replayed on every step."""
        return bool(self._matrices) and not captured(values)


IN_GRAPHS = InGraphs()


class ProductHealth:
    """Counts of all matrices, and the figures made of them."""

    def __init__(self, matrices: Sequence[Measured], device: torch.device) -> None:
        """Without matrices nothing is allocated."""
        self._matrices = matrices
        self._nothing = torch.tensor(_NOTHING if matrices else (), dtype=torch.float64, device=device)
        self._counts = self._nothing.repeat(len(matrices), len(OPERANDS), 1)
        self._measuring = False

    def measure(self, measuring: bool) -> None:
        """Count from now on, or stop."""
        if measuring == self._measuring:
            return
        self._measuring = measuring
        for matrix, counts in zip(self._matrices, self._counts, strict=True):
            matrix.counts = ProductCounts(counts) if measuring else None
        if measuring:
            IN_GRAPHS.follow(self._matrices)
        else:
            IN_GRAPHS.leave(self._matrices)

    def forget(self) -> None:
        """Reset: the counted gradients have been dropped."""
        if self._measuring:
            self._counts.copy_(self._nothing)

    def forget_weights(self) -> None:
        if self._measuring:
            self._counts[:, OPERANDS.index("w")] = self._nothing

    def collect(self, group: ProcessGroup, *, stepped: bool) -> dict[str, Shares]:
        """Shares by name over all ranks, and their means as "total"; of weights if the step changed them.

        An operand of which nothing was counted is left out; empty without matrices.
        """
        if not self._matrices:
            return {}
        sums, extremes = (each.contiguous() for each in self._counts.tensor_split([SUMS], dim=-1))
        sum_over_ranks(sums, group)
        max_over_ranks(extremes, group)
        operands = OPERANDS if stepped else OPERANDS[:-1]
        shares = {}
        for matrix, counts in zip(self._matrices, torch.cat([sums, extremes], dim=-1).tolist(), strict=True):
            found = dict(_shares(dict(zip(operands, counts, strict=False))))
            if found:
                shares[matrix.name] = found
        return {"total": _means(list(shares.values())), **shares}


def _masks(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements are not zero, which of these became zero, which are at the largest code."""
    nonzero, magnitude = values != 0, codes.view(torch.uint8) & 0x7F
    return nonzero, nonzero & (magnitude == 0), magnitude == _LARGEST


def _of_rows(values: Tensor, cast: Operand) -> tuple[Tensor, Tensor]:
    """Sums and extremes of values, [rows, inner]; the cast may have more rows and elements, of padding."""
    rows, inner = values.shape
    scales = cast.scales[:rows]
    finite = scales.isfinite()
    by_block = [
        functional.pad(mask, (0, -inner % TILE)).reshape(rows, -1, TILE).sum(-1) * finite
        for mask in _masks(values, cast.codes[:rows, :inner])
    ]
    return torch.stack([each.sum() for each in by_block]), _extremes(scales, by_block[0] > 0)


def _extremes(scales: Tensor, live: Tensor) -> Tensor:
    """Extremes of the scales of blocks that are finite and not all zeros."""
    largest, smallest = torch.where(live, scales, 0.0), torch.where(live, -scales, -math.inf)
    return torch.stack([largest.amax(), smallest.amax()])


def _add(counts: Tensor, sums: Tensor, extremes: Tensor) -> None:
    counts[:SUMS] += sums
    counts[SUMS:] = torch.maximum(counts[SUMS:], extremes.to(torch.float64))


def _shares(counts: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    for operand, (nonzero, underflows, saturated, largest, smallest) in counts.items():
        if nonzero and largest:
            yield f"{operand}_underflow", underflows / nonzero
            yield f"{operand}_saturated", saturated / nonzero
            yield f"{operand}_amax_spread", math.log2(largest / -smallest)


def _means(shares: Sequence[Shares]) -> Shares:
    """Over the matrices that have each."""
    names = dict.fromkeys(name for each in shares for name in each)
    values = {name: [each[name] for each in shares if name in each] for name in names}
    return {name: sum(each) / len(each) for name, each in values.items()}
