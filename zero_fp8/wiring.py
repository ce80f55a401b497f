"""Builds the parts of a run from plain values, without DeepSpeed's engine: the only place that chooses them.

The axes of a run are fields that are composed here:

- who has a scale and how gradients add up: a block; a tensor, as in FP8-LM; a tensor, with a sum in FP8;
- when gradients travel: as buckets fill (ZeRO 2), where modules end (ZeRO 3) or at the accumulation boundary
  (ZeRO 1);
- what a rank holds of the weights: all of them, or its slices (ZeRO 3), in the model's dtype or as codes;
- where the states live: on the device, or in host memory, from where they visit it or where the host sweeps;
- kernels: those of the device.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import Parameter

from ds_fp8.ops.backend import Backend, choose, choose_for_tensors
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import Format
from ds_fp8.zero_fp8.comm.groups import Nodes, Ranks
from ds_fp8.zero_fp8.gradients.autoscale import Autoscale, FixedScales, GradientScales
from ds_fp8.zero_fp8.gradients.exchange import launch_even, launch_uneven
from ds_fp8.zero_fp8.gradients.fp8_sum import FP8Packer, FP8Sum
from ds_fp8.zero_fp8.gradients.landing import HostSum
from ds_fp8.zero_fp8.gradients.packing import Packer, ScaledPacker
from ds_fp8.zero_fp8.gradients.pending import PendingGradients
from ds_fp8.zero_fp8.gradients.reduced import BlockSum, ReducedGradient, Sum, TensorSum
from ds_fp8.zero_fp8.gradients.reducer import GradientReducer
from ds_fp8.zero_fp8.gradients.schedule import Arrivals, ModuleEnds, Schedule
from ds_fp8.zero_fp8.health import Counts, Health
from ds_fp8.zero_fp8.offload.place import Offloaded, offloaded, stream
from ds_fp8.zero_fp8.offload.sizes import Crossing, formats_of
from ds_fp8.zero_fp8.parts import Parts
from ds_fp8.zero_fp8.placement.partition import (
    Bucket,
    ParameterSpec,
    Piece,
    partition,
    partition_sliced,
    partition_whole,
)
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.product_health import ProductHealth
from ds_fp8.zero_fp8.recipe import Offload, Recipe, ZeroSettings
from ds_fp8.zero_fp8.states.residence import Residence
from ds_fp8.zero_fp8.states.shard import Shard
from ds_fp8.zero_fp8.weights.code_views import CodeViews
from ds_fp8.zero_fp8.weights.frozen import FrozenWeights
from ds_fp8.zero_fp8.weights.sliced.codes import CodeSlices
from ds_fp8.zero_fp8.weights.sliced.frozen import FrozenSlices
from ds_fp8.zero_fp8.weights.sliced.slices import SlicedWeights
from ds_fp8.zero_fp8.weights.store import Weights
from ds_fp8.zero_fp8.weights.tiled import Products, TiledWeights, matrices_of
from ds_fp8.zero_fp8.weights.views import FlatWeights

GradientParts = tuple[Packer, GradientScales, list[ReducedGradient]]


def cut_buckets(specs: Sequence[ParameterSpec], recipe: Recipe, settings: ZeroSettings) -> tuple[Bucket, ...]:
    """The buckets of a run, and who owns which of their blocks."""
    cut = partition_whole if recipe.by_tensor else partition_sliced if settings.stage == 3 else partition
    return cut(specs, bucket_elements=settings.bucket_elements, block_size=recipe.block_size)


def nodes_of_run(ranks: Ranks, recipe: Recipe, settings: ZeroSettings) -> Nodes:
    """The ranks of a run, and the groups in which its gradients travel. Collective.

    Under ZeRO 3 a group of their own: fetches go through `group` while buckets are under way.
    """
    return Nodes(ranks.group, recipe.intra_node_size, apart=settings.stage == 3, all_ranks=ranks)


def backend_for(recipe: Recipe, device: torch.device) -> Backend:
    """The kernels of a run. Raises as `ops.backend.choose`."""
    if recipe.autoscale is not None:
        backend = choose_for_tensors(device)
        lacking = "those of fp8.gradients.reduction fp8, which quantise and add, are not built"
        return replace(backend, instead=backend.instead or lacking)
    return choose_for_tensors(device) if recipe.by_tensor else choose(device)


def build(
    buckets: Sequence[Bucket],
    parameters: Mapping[int, Parameter],
    recipe: Recipe,
    settings: ZeroSettings,
    fleets: Mapping[Fleet, Nodes],
    backend: Backend,
    param_groups: int,
    products: Products | None = None,
) -> Parts:
    """Take over the parameters, by global index: they become views of buffers, or their slices do (ZeRO 3).

    Masters are still to be taken. param_groups: how many the optimizer has.
    """
    device = next(iter(parameters.values())).device
    run = _Run(recipe, parameters, fleets, backend, device)
    weights = [run.weights(bucket, settings, products) for bucket in buckets]
    counted = [settings.counts_replicated or not bucket.replicated for bucket in buckets]
    health = _health(settings.stats_interval, param_groups, recipe, weights, device)
    health.follow([bucket.group for bucket in buckets], counted)
    away = run.offloaded(buckets, settings)
    shards = [
        shard_of(bucket, run.rank_in(bucket), recipe, away.residence, backend, each)
        for bucket, each in zip(buckets, health.by_bucket, strict=True)
    ]
    packer, scales, reduced = run.gradient_parts(buckets, away)
    schedule = run.schedule(buckets, settings)
    pending = PendingGradients(
        parameters, adds_in_fp32=settings.accumulate_in_fp32, micro_steps=settings.micro_steps
    )
    ways = (packer, schedule, fleets, health)
    return Parts(
        buckets=buckets,
        fleets=fleets,
        weights=weights,
        reduced=reduced,
        counted=counted,
        shards=shards,
        packer=packer,
        reducer=GradientReducer(buckets, pending, reduced, *ways, overlap=settings.overlap),
        gradient_scales=scales,
        health=health,
        backend=backend,
        offloaded=away,
        listens=settings.stage >= 2,
        divisor=_divisor(buckets[0].fleet, settings),
        frozen=FrozenSlices(run.first) if settings.stage == 3 else FrozenWeights(),
        products=products,
    )


def _health(
    interval: int, param_groups: int, recipe: Recipe, weights: Sequence[Weights], device: torch.device
) -> Health:
    matrices = list(matrices_of(weights)) if interval else []
    products = ProductHealth(matrices, device)
    return Health(interval, param_groups, device, stores_sqrt=not recipe.by_tensor, products=products)


def _divisor(fleet: Fleet, settings: ZeroSettings) -> int:
    """The number by which a sum over the ranks is divided, as in stock DeepSpeed.

    If ranks share sequences, its ZeRO 1 and 2 take the mean over sequences, its ZeRO 3 that over ranks.
    """
    if not settings.average:
        return 1
    return fleet.size if settings.stage == 3 else fleet.sequences(settings.sequence_parallel_size)


def room(bucket: Bucket, rank: int, fmt: Format, device: torch.device) -> Blocks:
    """Zeros, for what a rank owns of a bucket."""
    return Blocks.zeros(bucket.blocks_of(rank), bucket.block_size, fmt, device)


def resident(recipe: Recipe, device: torch.device) -> Residence:
    """States live on the device."""
    return Residence(recipe.block_size, formats_of(recipe), device, stores_sqrt=not recipe.by_tensor)


def in_host_memory(
    recipe: Recipe, offload: Offload, rows: Sequence[int], device: torch.device, backend: Backend
) -> Residence:
    """States visit the device. rows: of each of the rank's shards.

    Raises ValueError without enough host memory, and for states that cannot live there.
    """
    if recipe.by_tensor:
        raise ValueError('fp8.scaling: received "tensor", allowed for states in host memory: "block"')
    return stream(recipe, offload, rows, device, backend)


def shard_of(
    bucket: Bucket, rank: int, recipe: Recipe, residence: Residence, backend: Backend, counts: Counts
) -> Shard:
    """A rank's states of a bucket, zeros. counts: of the bucket's param group."""
    parts = residence.parts(bucket.blocks_of(rank))
    return Shard(tuple(bucket.pieces(rank)), parts, recipe.rounding, backend, counts)


@dataclass(frozen=True)
class _Run:
    """The settings that the parts of all buckets share."""

    recipe: Recipe
    parameters: Mapping[int, Parameter]
    fleets: Mapping[Fleet, Nodes]
    backend: Backend
    device: torch.device

    def rank_in(self, bucket: Bucket) -> int:
        return self.fleets[bucket.fleet].rank

    @property
    def first(self) -> Nodes:
        """Of the only fleet that there may be under ZeRO 3 and with offload."""
        return next(iter(self.fleets.values()))

    def weights(self, bucket: Bucket, settings: ZeroSettings, products: Products | None) -> Weights:
        """A rank's weights of a bucket."""
        what = (bucket, self.parameters, self.rank_in(bucket))
        if products is not None and bucket.slots[0].parameter in products.chosen:
            store = CodeSlices if settings.stage == 3 else CodeViews
            return TiledWeights(bucket, store(*what, products.choice.way), self.rank_in(bucket), products)
        return SlicedWeights(*what) if settings.stage == 3 else FlatWeights(*what)

    def pieces(self, bucket: Bucket) -> list[Piece]:
        """This rank's shard of a bucket."""
        return list(bucket.pieces(self.rank_in(bucket)))

    def rows(self, buckets: Sequence[Bucket]) -> list[int]:
        """How many rows this rank owns of each."""
        return [bucket.blocks_of(self.rank_in(bucket)) for bucket in buckets]

    def offloaded(self, buckets: Sequence[Bucket], settings: ZeroSettings) -> Offloaded:
        """The residence of the states. Collective if it is host memory."""
        if settings.offload is None:
            return Offloaded(resident(self.recipe, self.device))
        first = self.first
        itemsize = max(each.element_size() for each in self.parameters.values())
        crossing = Crossing(
            self.rows(buckets),
            row_bytes=itemsize * self.recipe.block_size,
            nodes=first.layout,
            several=settings.stage > 1 and settings.micro_steps > 1,
        )
        what = (self.recipe, settings.offload, crossing, self.device, self.backend)
        return offloaded(*what, first.all_ranks)

    def rooms(self, buckets: Sequence[Bucket]) -> list[Blocks]:
        """For this rank's reduced gradients."""
        return [room(bucket, self.rank_in(bucket), self.recipe.reduced, self.device) for bucket in buckets]

    def schedule(self, buckets: Sequence[Bucket], settings: ZeroSettings) -> Schedule:
        """The schedule that decides when buckets are sent."""
        if settings.stage < 3:
            return Arrivals(buckets)
        return ModuleEnds(buckets, self.first, self.device)

    def gradient_parts(self, buckets: Sequence[Bucket], offloaded: Offloaded) -> GradientParts:
        """How gradients are packed, scaled and added up."""
        recipe, backend = self.recipe, self.backend
        if recipe.autoscale is not None:
            return self._fp8_sum(buckets, recipe.autoscale)
        launch = launch_uneven if recipe.by_tensor else launch_even(recipe.between_nodes, backend)
        packer = ScaledPacker(recipe.wire, self.fleets, self.device, backend, launch)
        totals: list[Sum] = [
            TensorSum(backend, self.pieces(bucket)) if recipe.by_tensor else BlockSum(backend)
            for bucket in buckets
        ]
        if offloaded.landing is not None and offloaded.host is not None:
            on_host = [HostSum(total, offloaded.landing) for total in totals]
            return packer, FixedScales(), self._reduced(offloaded.reduced, on_host, offloaded.host)
        return packer, FixedScales(), self._reduced(self.rooms(buckets), totals, backend)

    def _fp8_sum(self, buckets: Sequence[Bucket], policy: str) -> GradientParts:
        """The paper's: sums in FP8, whose scales are FP32."""
        sizes = {index: parameter.numel() for index, parameter in self.parameters.items()}
        fleet, nodes = next(iter(self.fleets.items()))
        totals = [FP8Sum(self.pieces(bucket), self.device) for bucket in buckets]
        scales = Autoscale(policy, sizes, totals, nodes.group, fleet.mean_factor(), self.device)
        packer = FP8Packer(self.recipe.wire, self.fleets, self.device, scales)
        return (
            packer,
            scales,
            self._reduced(map(_with_fp32_scales, self.rooms(buckets)), totals, self.backend),
        )

    def _reduced(
        self, rooms: Iterable[Blocks], totals: Sequence[Sum], backend: Backend
    ) -> list[ReducedGradient]:
        """backend: for where the rooms are."""
        promotes = self.recipe.promote
        return [
            ReducedGradient(blocks, total, backend, self.device, promotes=promotes)
            for blocks, total in zip(rooms, totals, strict=True)
        ]


def _with_fp32_scales(blocks: Blocks) -> Blocks:
    """mu makes a scale no power of two."""
    return blocks if blocks.scales is None else replace(blocks, scales=blocks.scales.to(torch.float32))
