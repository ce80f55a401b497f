"""Norm, clip factor and control word are the same bits on every backend and however a gradient is shared."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_support import CPP, ISAS, running
from kernel_checks import SHARDS
from kernel_support import CPU
from torch import Tensor
from triton_support import TRITON, conversion

from ds_fp8.ops.backend import REFERENCE, Backend
from ds_fp8.ops.blocks import Blocks, decode, quantize
from ds_fp8.ops.exact import digits_of
from ds_fp8.ops.formats import E4M3, FP32, Format
from ds_fp8.ops.reduction import norm_of, norm_square
from ds_fp8.zero_fp8 import verdict as verdict_module
from ds_fp8.zero_fp8.verdict import Counted, Verdict

ROWS, BLOCK = 24, 128
SCALE = 1 / 3  # of the gradient, so that the norm is rounded

each_shard = pytest.mark.parametrize("fmt", SHARDS, ids=lambda fmt: fmt.name)


def gradient(spread: float, seed: int) -> Tensor:
    """Rows, and values within them, of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-8, 9, (ROWS, BLOCK), generator=generator) * spread / 40
    rows = torch.randint(-8, 9, (ROWS, 1), generator=generator) * spread / 8
    return torch.randn(ROWS, BLOCK, generator=generator) * torch.exp2(sizes + rows)


def backends() -> Iterator[tuple[str, Backend, Any]]:
    yield "reference", REFERENCE, nullcontext()
    for isa in ISAS:
        yield isa, CPP.ops, running(isa, 2)
    yield "triton", TRITON.ops, conversion(hardware=False)


def shared(values: Tensor, ranks: int, backend: Backend, fmt: Format) -> list[Any]:
    """Shards, as uneven as they can be, whose figures come from a backend."""
    wire = Blocks.zeros(ROWS, BLOCK, FP32, CPU)
    quantize(values.view(-1), wire)
    cuts = [ROWS * each * each // ranks**2 for each in range(ranks + 1)]
    shards = []
    for first, last in pairwise(cuts):
        shard = Blocks.zeros(last - first, BLOCK, fmt, CPU)
        parts = backend.accumulate([wire[first:last]], shard, overwrite=True)
        shards.append(SimpleNamespace(norm_parts=parts))
    return shards


def verdict(shards: list[Any], clip: float) -> tuple[float, list[int]]:
    """The norm, and the bits of the control word."""
    ranks: Any = None
    found = Verdict(
        shards, [True] * len(shards), own=Counted(received=1), gradient_scale=SCALE, clip=clip, ranks=ranks
    )
    return found.read().norm, found.control.view(torch.int32).tolist()


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks' figures add up to is at hand already."""
    monkeypatch.setattr(verdict_module, "sum_over_ranks", lambda figures, group: None)


@each_shard
def test_norm_and_factor_are_the_same_bits_on_every_backend_and_world_size(fmt: Format) -> None:
    """With an active clip, and values that span 2^7 and 2^70."""
    for seed, spread in enumerate((3.0, 30.0)):
        values = gradient(spread, seed)
        clip = float(values.square().sum().sqrt()) / 7
        expected = verdict(shared(values, 1, REFERENCE, fmt), clip)
        assert expected[0] > clip
        factor = torch.tensor(expected[1][:1], dtype=torch.int32).view(torch.float32).item()
        assert 0 < factor < SCALE
        for name, backend, chosen in backends():
            with chosen:
                for ranks in (1, 2, 3, 4) if name != "triton" else (1, 3):
                    shards = shared(values, ranks, backend, fmt)
                    assert verdict(shards, clip) == expected, f"{name}, {ranks} ranks"


@each_shard
def test_the_norm_is_that_of_what_is_stored(fmt: Format) -> None:
    values = gradient(20.0, 7)
    shard = Blocks.zeros(ROWS, BLOCK, fmt, CPU)
    quantize(values.view(-1), shard)
    exact = decode(shard).double().square().sum().sqrt().item() * SCALE
    assert verdict(shared(values, 2, REFERENCE, fmt), 0.0)[0] == pytest.approx(exact, rel=1e-12)


def test_the_root_is_rounded_as_on_a_gpu() -> None:
    """torch's root on a CPU is off by one in the last place for one number in a hundred."""
    for number in torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e13:
        parts = torch.cat([digits_of(number[None]), torch.zeros(1, dtype=torch.int64)])
        assert norm_square(parts) == number
        assert norm_of(parts).item() == math.sqrt(number)


def test_a_gradient_beyond_the_largest_norm_is_not_taken() -> None:
    """Its squares are beyond FP32: no block is to blame, the step is skipped all the same."""
    values = torch.zeros(ROWS, BLOCK)
    values[3, 4] = 2.0**70
    for fmt in (FP32, E4M3):
        found, control = verdict(shared(values, 2, REFERENCE, fmt), 0.0)
        assert found == torch.inf
        assert control[1] == 0
