"""Compare kernels with the plain-PyTorch reference on the same device; benchmarks do so before they time."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, product

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, Sweep
from ds_fp8.ops.backend import REFERENCE, Backend
from ds_fp8.ops.blocks import NOT_FINITE, Blocks
from ds_fp8.ops.formats import (
    BF16,
    BY_NAME,
    E4M3,
    E5M2,
    FP16,
    FP32,
    INT8,
    SPLIT8,
    SPLIT16,
    UE4M4,
    Format,
)
from ds_fp8.ops.health import GRADIENT_COUNTS, STATE_COUNTS
from ds_fp8.ops.masters import store_masters
from ds_fp8.ops.rounding import Rounding

TO_NEAREST = [fmt for fmt in BY_NAME.values() if fmt.dtype.is_floating_point]
BLOCK = 128
BLOCKS = 300 if torch.cuda.is_available() else 16  # the interpreter is slow
STATES = {
    "O1": (FP32, FP32, FP32),
    "O2": (FP16, INT8, FP16),
    "O2 of e4m3": (FP16, E4M3, FP16),
    "bf16, e5m2, bf16": (BF16, E5M2, BF16),
    "fp16, fp16, fp32": (FP16, FP16, FP32),
    "fp32, bf16, fp16": (FP32, BF16, FP16),
    "O2+": (SPLIT16, INT8, UE4M4),
    "O2+ of e4m3": (SPLIT16, E4M3, UE4M4),
    "fp32, int8, fp32": (FP32, INT8, FP32),
    "split8, e4m3, e4m3": (SPLIT8, E4M3, E4M3),
    "fp32, e4m3, e5m2": (FP32, E4M3, E5M2),
}
ROUNDED = (
    "O2",
    "O2 of e4m3",
    "bf16, e5m2, bf16",
    "split8, e4m3, e4m3",
)  # masters are also rounded stochastically


def verify(backend: Backend, device: torch.device, sweeps: bool = False) -> list[str]:
    """Return one line per kernel and kind of input, with the number of equal cases. Raises AssertionError.

    sweeps: only those of an exp_avg in int8.
    """
    states = {name: formats for name, formats in STATES.items() if not sweeps or formats[1] is INT8}
    checks = {"adam_step": stepped(backend, device, states)}
    if not sweeps:
        checks |= {
            "adam_step beside edited weights": edited(backend, device),
            "quantize, dequantize": quantized(backend, device),
            "quantize_vectors": quantized_together(backend, device),
            "accumulate": accumulated(backend, device),
        }
    return [f"{name}: {sum(1 for _ in cases)} cases equal the reference" for name, cases in checks.items()]


def inputs(device: torch.device) -> dict[str, Tensor]:
    """Return vectors of values that do not end with a block."""
    generator = torch.Generator().manual_seed(0)
    size = BLOCKS * BLOCK - 77
    normal = torch.randn(size, generator=generator)
    wide = normal * torch.randn(size, generator=generator).mul(8).exp()
    nasty = normal.clone()
    nasty[5], nasty[2 * BLOCK], nasty[3 * BLOCK + 1] = torch.inf, torch.nan, -torch.inf
    for row, factor in enumerate((0.0, 1e-37, 1e-44, 1e37, -0.0, 3e38), start=5):
        nasty[row * BLOCK : (row + 1) * BLOCK] *= factor
    named = {"normal": normal * 1e-3, "wide": wide, "nasty": nasty}
    return {name: values.to(device) for name, values in named.items()}


def empty(fmt: Format, device: torch.device, blocks: int = BLOCKS) -> Blocks:
    """Return blocks full of garbage, so that elements a kernel does not write show."""
    garbage = Blocks.zeros(blocks, BLOCK, fmt, device)
    garbage.codes.view(torch.uint8).fill_(0xA5)
    if garbage.scales is not None:
        garbage.scales.fill_(0x5A)
    return garbage


def copy(blocks: Blocks) -> Blocks:
    scales = None if blocks.scales is None else blocks.scales.clone()
    return Blocks(blocks.codes.clone(), scales, blocks.format)


def assert_equal(found: Blocks, expected: Blocks, what: str) -> None:
    """Compare bits of codes and scales where blocks and values are finite; elsewhere neither may be."""
    finite = torch.ones(len(found), dtype=torch.bool, device=found.codes.device)
    if found.scales is not None and expected.scales is not None:
        assert torch.equal(found.scales, expected.scales), f"{what}: scales differ"
        finite = expected.scales < NOT_FINITE
    assert_same(found.codes[finite], expected.codes[finite], what)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    same = (found.view(torch.uint8) == expected.view(torch.uint8)).view(*found.shape, -1).all(dim=-1)
    different = ~(same | ~(found.float().isfinite() | expected.float().isfinite()))
    if different.any():
        where = tuple(different.nonzero()[0].tolist())
        values = found[where].float().item(), expected[where].float().item()
        raise AssertionError(f"{what}: {int(different.sum())} differ, first at {where}: {values}")


def quantized(backend: Backend, device: torch.device) -> Iterator[None]:
    for (name, values), dtype, fmt in product(
        inputs(device).items(), (torch.float32, torch.bfloat16, torch.float16), TO_NEAREST
    ):
        what = f"quantize {name} {dtype} to {fmt.name}"
        found, expected = empty(fmt, device, BLOCKS + 2), empty(fmt, device, BLOCKS + 2)
        counts = [torch.zeros(GRADIENT_COUNTS, dtype=torch.float64, device=device) for _ in range(2)]
        backend.quantize(values.to(dtype), found, counts[0])
        REFERENCE.quantize(values.to(dtype), expected, counts[1])
        assert_equal(found, expected, what)
        torch.testing.assert_close(counts[0], counts[1], rtol=1e-9, atol=0, msg=f"{what}: counts")
        back, expected_back = torch.full_like(values, 7.0), torch.full_like(values, 9.0)
        backend.dequantize(found, back)
        REFERENCE.dequantize(found, expected_back)
        assert_same(back, expected_back, f"de{what}")
        yield


def quantized_together(backend: Backend, device: torch.device) -> Iterator[None]:
    """Quantise a hundred vectors that begin anywhere in memory, or aligned to 16 bytes."""
    for (name, values), dtype, fmt, step in product(
        inputs(device).items(), (torch.float32, torch.bfloat16), (E4M3, E5M2, BF16), (1, 16)
    ):
        what = f"quantize_vectors of {name} {dtype} to {fmt.name}, {step} elements apart"
        vectors = [values.to(dtype)[step * number :][: 1 + 37 * number] for number in range(100)]
        ends = list(accumulate(-(-vector.numel() // BLOCK) for vector in vectors))
        rows = [slice(*each) for each in pairwise([0, *ends])]
        found, expected = (empty(fmt, device, ends[-1]) for _ in range(2))
        backend.quantize_vectors(vectors, [found[each] for each in rows])
        REFERENCE.quantize_vectors(vectors, [expected[each] for each in rows])
        assert_equal(found, expected, what)
        yield


def pieces_of(values: Tensor, ranks: int, fmt: Format) -> list[Blocks]:
    """Return the values, rolled for each rank, as messages in one buffer."""
    codes = torch.zeros(ranks, BLOCKS, BLOCK, dtype=fmt.dtype, device=values.device)
    scales = torch.ones(ranks, -(-BLOCKS // 16) * 16, dtype=torch.uint8, device=values.device)
    pieces = [
        Blocks(codes[rank], scales[rank, :BLOCKS] if fmt.scaled else None, fmt) for rank in range(ranks)
    ]
    for rank, piece in enumerate(pieces):
        REFERENCE.quantize(values.roll(1000 * rank), piece)
    return pieces


def accumulated(backend: Backend, device: torch.device) -> Iterator[None]:
    for (name, values), wire, shard, ranks, overwrite in product(
        inputs(device).items(), (E4M3, E5M2, BF16), (E4M3, FP32, BF16), (1, 2, 3, 8), (True, False)
    ):
        what = f"accumulate {ranks} ranks of {name} {wire.name} into {shard.name}, overwrite {overwrite}"
        pieces = pieces_of(values, ranks, wire)
        found, expected = empty(shard, device), empty(shard, device)
        if not overwrite:
            REFERENCE.quantize(inputs(device)["normal"], expected)
            found = copy(expected)
        parts = backend.accumulate(pieces, found, overwrite=overwrite)
        expected_parts = REFERENCE.accumulate(pieces, expected, overwrite=overwrite)
        assert_equal(found, expected, what)
        assert torch.equal(parts, expected_parts), f"{what}: parts of the norm"
        yield


SEGMENTS = (
    Segment(slice(0, BLOCKS // 2), 4, BLOCK * 7),
    Segment(slice(BLOCKS // 2, BLOCKS // 2 + 1), 2, 0),
    Segment(slice(BLOCKS // 2 + 1, BLOCKS), 9, 0),
)


def stepped(
    backend: Backend, device: torch.device, states: dict[str, tuple[Format, Format, Format]]
) -> Iterator[None]:
    for (name, formats), wire, decoupled, dtype, stochastic in product(
        states.items(), (E4M3, FP32, BF16), (True, False), (torch.bfloat16, torch.float32), (False, True)
    ):
        if (stochastic and name not in ROUNDED) or (formats[0].split and dtype is not torch.bfloat16):
            continue
        what = f"adam_step {name}, gradient {wire.name}, decoupled {decoupled}, weights {dtype}"
        spread = formats[1] is INT8
        how = (device, formats, wire, decoupled, dtype, Rounding(5, stochastic, spread))
        expected, counts = take_steps(REFERENCE, *how)
        found, found_counts = take_steps(backend, *how)
        assert torch.equal(found_counts, counts), f"{what}: counts {found_counts}, expected {counts}"
        for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
            assert_equal(ours, theirs, what)
        assert_same(found[-1].codes, expected[-1].codes, f"{what}: weights")
        yield


def edited(backend: Backend, device: torch.device) -> Iterator[None]:
    """Compare after weights were set in place (masks, clamps), with 0, -0 and lower halves of either sign."""
    every = 1 if device.type == "cuda" else 32  # the interpreter is slow
    high = torch.arange(0, 1 << 16, every).to(torch.int16).view(torch.bfloat16)
    for fmt, stochastic in ((SPLIT16, False), (SPLIT8, False), (SPLIT8, True)):
        top = 1 << 8 * fmt.itemsize - 1
        low = torch.tensor([0, 1, top - 1, -top, 1 - top, -1, 5, -5])
        codes = low.to(fmt.dtype).repeat(len(high)).view(-1, BLOCK).to(device)
        rows = len(codes)
        results = []
        for each in (backend, REFERENCE):
            weights = high.repeat_interleave(len(low)).view(-1, BLOCK).to(device)
            moments = (Blocks.zeros(rows, BLOCK, moment, device) for moment in (E4M3, UE4M4))
            state = AdamState(Blocks(codes.clone(), None, fmt), *moments)
            gradient = Blocks.zeros(rows, BLOCK, FP32, device)
            plan = each.plan([Segment(slice(0, rows), 3, 0)], rows, BLOCK, device)
            scalars = AdamScalars(1, 1e-3, 0.9, 0.95, 1e-8, 0.0, True, True, 1.165)
            control = torch.tensor([1.0, 1.0], device=device)
            rounding = Rounding(5, stochastic)
            each.adam_step(Sweep(state, gradient, weights, plan, scalars, control, rounding))
            results.append((state.master, weights))
        (master, weights), (expected, expected_weights) = results
        what = f"adam_step beside edited weights, {fmt.name}, stochastic {stochastic}"
        assert_same(weights, expected_weights, f"{what}: weights")
        assert torch.equal(master.codes, expected.codes), f"{what}: masters"
        yield


def take_steps(
    backend: Backend,
    device: torch.device,
    formats: Sequence[Format],
    wire: Format,
    decoupled: bool,
    dtype: torch.dtype,
    rounding: Rounding,
) -> tuple[list[Blocks], Tensor]:
    """Return states, weights as blocks, and counts after three steps and a skipped one; two are counted."""
    state = AdamState(*(Blocks.zeros(BLOCKS, BLOCK, fmt, device) for fmt in formats))
    weights = torch.full((BLOCKS, BLOCK), 7.0, dtype=dtype, device=device)
    store_masters(inputs(device)["normal"].nan_to_num(0, 0, 0) * 20, state.master, weights)
    counts = torch.zeros(STATE_COUNTS, dtype=torch.float64, device=device)
    plan = backend.plan(SEGMENTS, BLOCKS, BLOCK, device)
    gradient = Blocks.zeros(BLOCKS, BLOCK, wire, device)
    for step, go in enumerate((1.0, 1.0, 0.0, 1.0), start=1):
        source = inputs(device)["wide" if step == 2 else "normal"]
        REFERENCE.quantize(source.clamp(-1e15, 1e15).roll(33 * step), gradient)
        scalars = AdamScalars(step, 1e-3, 0.9, 0.95, 1e-8, 0.1, decoupled, True, 1.165)
        control = torch.tensor([0.3, go], device=device)
        counted = counts if step > 2 else None
        backend.adam_step(Sweep(state, gradient, weights, plan, scalars, control, rounding, counted))
    shown = {torch.bfloat16: BF16, torch.float32: FP32}[dtype]
    return [state.master, state.exp_avg, state.exp_avg_sq, Blocks(weights, None, shown)], counts
