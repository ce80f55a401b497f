"""Given the same reduced gradient, codes, scales, masters and weights are the same bits at any N."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import assert_same_bits, build, ds_config, packed, weight_bits, whole_states
from grids import some_of
from ranks import RankPools
from torch import Tensor, nn

from ds_fp8.ops.backend import REFERENCE
from ds_fp8.ops.blocks import quantize
from ds_fp8.ops.formats import BY_NAME, E4M3
from ds_fp8.ops.rounding import Rounding
from ds_fp8.zero_fp8.checkpoint import writer
from ds_fp8.zero_fp8.health import Counts
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.placement.partition import Bucket, ParameterSpec, partition
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.wiring import resident, room, shard_of

SIZES = (1, 7, 129, 1000, 333, 128, 2047)  # nothing divides, blocks of 128 among 4 ranks
STEPS = 20


def gradient(step: int, index: int) -> Tensor:
    """The gradient of one parameter at one step, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    spread = torch.randn(SIZES[index], generator=generator).exp()
    return torch.randn(SIZES[index], generator=generator) * spread * 1e-3


class Dictated(nn.Module):
    """Parameters whose gradients at each step are `gradient(step, index)` rounded to BF16."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES
        )

    def forward(self, step: int) -> Tensor:
        terms = [
            (each * gradient(step, index).bfloat16()).sum().float() for index, each in enumerate(self.weights)
        ]
        return torch.stack(terms).sum()


def train(
    fp8: dict[str, Any], clipping: float, bucket: int
) -> tuple[dict[str, Any], dict[str, Tensor], list[float]]:
    """Twenty steps; this rank's packed states, all weights, and the norms."""
    engine = build(ds_config(fp8, clipping=clipping, bucket=bucket), Dictated())
    norms = []
    for step in range(STEPS):
        engine.backward(engine(step))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    states, weights = packed(engine.optimizer), weight_bits(engine)
    engine.destroy()
    return states, weights, norms


RECIPES: list[dict[str, Any]] = [
    {"opt_level": "O2"},
    {"opt_level": "O1"},
    {"opt_level": "O2+"},
    {"block_size": 32, "optimizer": {"exp_avg_sq_dtype": "bf16", "exp_avg_dtype": "e5m2"}},
    {"optimizer": {"master_dtype": "split8", "rounding": "stochastic", "exp_avg_sq_dtype": "e4m3"}},
    {"optimizer": {"rounding": "stochastic", "exp_avg_sq_dtype": "e5m2"}},
]
CLIPPED = [(fp8, (0.0, 0.01)[number % 2]) for number, fp8 in enumerate(RECIPES)]
OTHERS = [(fp8, 0.01 - clipping) for fp8, clipping in CLIPPED]


@some_of(["fp8", "clipping"], [*CLIPPED, *OTHERS], len(CLIPPED))
def test_states_do_not_depend_on_the_world_size(
    ranks: RankPools, fp8: dict[str, Any], clipping: float
) -> None:
    runs = {n: ranks.run(n, train, fp8, clipping, 2500) for n in (1, 2, 4)}
    alone = whole_states([runs[1][0][0]])
    for n in (2, 4):
        assert_same_bits(whole_states([packed for packed, *_ in runs[n]]), alone)
        for _, weights, norms in runs[n]:
            assert_same_bits(weights, runs[1][0][1])
            assert norms == runs[1][0][2]


def test_states_do_not_depend_on_the_bucket_size(ranks: RankPools) -> None:
    large, small = (
        whole_states([each for each, *_ in ranks.run(2, train, {}, 0.0, size)]) for size in (10**6, 100)
    )
    assert_same_bits(large, small)


RECIPE = Recipe(
    block_size=128,
    wire=E4M3,
    reduced=E4M3,
    promote=True,
    master=BY_NAME["fp16"],
    rounding=Rounding(3, stochastic=True),
    exp_avg=E4M3,
    exp_avg_sq=BY_NAME["fp16"],
    clamp=True,
)


def inject(world_size: int) -> dict[str, Tensor]:
    """The same training without collectives: each rank's shard is given its reduced gradient."""
    specs = [
        ParameterSpec(index, size, 0, "bf16", Fleet("data", world_size)) for index, size in enumerate(SIZES)
    ]
    buckets = partition(specs, bucket_elements=2500, block_size=128)
    names = {index: f"weights.{index}" for index in range(len(SIZES))}
    start = [each.detach().bfloat16() for each in Dictated().weights]
    pieces = []
    for rank in range(world_size):
        cpu = torch.device("cpu")
        shards = [
            shard_of(bucket, rank, RECIPE, resident(RECIPE, cpu), REFERENCE, Counts()) for bucket in buckets
        ]
        reduced = [room(bucket, rank, RECIPE.reduced, cpu) for bucket in buckets]
        weights = [SimpleNamespace(room=_own_weights(bucket, rank, start)) for bucket in buckets]
        for shard, each in zip(shards, weights, strict=True):
            shard.take_masters(each.room, shard.pieces)
        optimizer = FP8AdamW([torch.zeros(1)], weight_decay=0.1, betas=(0.9, 0.95))
        for step in range(STEPS):
            scalars = optimizer.scalars(clamp=True)[0]
            for shard, blocks, each in zip(shards, reduced, weights, strict=True):
                for piece in shard.pieces:
                    whole = gradient(step, piece.slot.parameter)
                    quantize(whole[piece.elements], blocks[piece.rows])
                shard.sweep(blocks, each, scalars, torch.tensor([0.5, 1.0]))
            optimizer.advance(clamp=True)
        pieces.append(writer.pack(shards, names))
    return whole_states(pieces)


def _own_weights(bucket: Bucket, rank: int, start: list[Tensor]) -> Tensor:
    rows = torch.zeros(bucket.blocks_per_rank, 128, dtype=torch.bfloat16)
    for piece in bucket.pieces(rank):
        flat = rows[piece.rows].view(-1)
        flat[: piece.numel] = start[piece.slot.parameter][piece.elements]
    return rows


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_injected_gradients_give_the_same_bits(world_size: int) -> None:
    assert_same_bits(inject(world_size), inject(1))


def test_the_comparison_notices_one_bit() -> None:
    first, second = inject(1), inject(1)
    second["weights.3/master"].view(-1)[17] ^= 1
    with pytest.raises(AssertionError, match=r"weights\.3/master"):
        assert_same_bits(first, second)
