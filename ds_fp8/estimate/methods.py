"""What a GPU holds of a model's weights, states and gradients, with FP8 and with stock DeepSpeed BF16.

Nothing is allocated: `memory` and `stock` have the arithmetic, whose results the tests compare with engines.
Weights are BF16 and in one param group. Activations are not included, nor what libraries and the allocator
keep for themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod

from ds_fp8.config.refusals import refusal
from ds_fp8.config.section import LEVELS, FP8Config
from ds_fp8.estimate import codes, fetching, memory, stock
from ds_fp8.estimate.runs import MOST_PARAMETERS, Model, Run, model_of_size, of_rank, refuse_absurd
from ds_fp8.ops.formats import BF16, E4M3, FP32, Format
from ds_fp8.zero_fp8.offload.sizes import Expected
from ds_fp8.zero_fp8.placement.partition import (
    Bucket,
    ParameterSpec,
    partition,
    partition_sliced,
    partition_whole,
)
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.recipe import Offload, Recipe, recipe_of

WEIGHT = BF16.itemsize
# Beyond these an estimate would take minutes.
MOST_SHARES = 4_000_000  # buckets times GPUs, with one scale per tensor


@dataclass(frozen=True)
class Held:
    """Bytes on the GPU that holds most, when it holds most."""

    weights: int  # frozen ones among them; under ZeRO 3 slices
    states: int  # master weights, exp_avg, exp_avg_sq
    gradients: int  # kept from micro-step to micro-step: the reduced gradient, under ZeRO 1 every `.grad`
    buffers: int  # buckets on their way, copies for the step, room in which FP8 weights are made
    persistent: int = 0  # under ZeRO 3: small parameters, whole between steps, too
    fetched: int = 0  # under ZeRO 3: other parameters, whole while they are needed
    host: int = 0  # in host memory, and so not in the total: offloaded states

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self) if each.name != "host")


@dataclass(frozen=True)
class Method:
    """A way to train, and the bytes that it holds."""

    name: str
    count: Callable[[Model, Run], Held]  # of a model, or a part of one, that all GPUs have
    config: FP8Config | None = None  # of ds_fp8

    def held(self, model: Model, run: Run) -> Held:
        """Bytes that a GPU holds of the model, or of its part."""
        return self.count(*of_rank(model, run))

    def refusal(self, model: Model, run: Run) -> str | None:
        """Why this method refuses the model; None if it does not."""
        return codes.refusal_of(self.config, model, run) if self.config else None

    @property
    def codes(self) -> bool:
        """Whether weights are FP8 codes."""
        return self.config is not None and self.config.has_codes

    def note(self, model: Model) -> str | None:
        """A remark on what the estimate assumes; None if there is none."""
        return codes.note_of(self.config, model) if self.config else None


def refusals(methods: Sequence[Method], model: Model, run: Run) -> dict[str, str]:
    """Reasons by name of the methods that refuse the model."""
    reasons = {method.name: method.refusal(model, run) for method in methods}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def with_fp8(name: str, config: FP8Config, offload: Offload | None = None) -> Method:
    """The method that trains with this "fp8" section."""
    return Method(name, partial(_with_fp8, config, offload), config)


def levels(offload: Offload | None = None) -> dict[str, Method]:
    """One method per level of ds_fp8."""
    how = f", {offload.executor}" if offload else ""
    return {
        level: with_fp8(
            f"ds_fp8 {level}{how}", FP8Config.model_validate({"enabled": True, "opt_level": level}), offload
        )
        for level in LEVELS
    }


def _refuse_many_shares(buckets: int, ranks: int) -> None:
    if buckets * ranks > MOST_SHARES:
        allowed = f"at most {MOST_SHARES // ranks:,} on {ranks:,} GPUs in an estimate"
        raise refusal('buckets with fp8.scaling "tensor"', buckets, allowed)


def _with_fp8(config: FP8Config, offload: Offload | None, model: Model, run: Run) -> Held:
    refuse_absurd(model.parameters, len(model.sizes), run)
    refused = codes.refusal_of(config, model, run)
    if refused:
        raise ValueError(refused)
    recipe = recipe_of(config, accumulating=run.accumulating, ranks=run.gpus)
    if recipe.by_tensor:
        _refuse_many_shares(sum(model.trained) // run.bucket_elements, run.gpus)
    chosen = codes.codes_of(config, model)
    buckets = _buckets(recipe, model, run, chosen)
    grad = run.grad_itemsize(WEIGHT)
    backward = memory.backward_bytes(recipe, grad, buckets, stage=run.stage, overlap=run.overlap)
    kept = memory.grad_bytes(grad, buckets) if run.stage == 1 else 0
    ranks = memory.rank_bytes(recipe, buckets, accumulating=run.accumulating)
    fullest = ranks.index(max(ranks))
    reduced = memory.gradient_bytes(recipe, buckets, fullest, accumulating=run.accumulating)
    held = Held(
        weights=memory.weight_bytes(WEIGHT, buckets) + WEIGHT * model.frozen,
        states=memory.state_bytes(recipe, buckets, fullest),
        gradients=reduced + kept,
        buffers=max(backward, memory.gather_bytes(recipe, WEIGHT, buckets)) - kept,
    )
    if offload is not None:
        several = run.accumulating
        away = memory.offloaded_bytes(recipe, offload, WEIGHT, buckets, fullest, several=several)
        held = _with_offload(held, away, reduced)
    if config.has_codes:
        held = _with_codes(held, config, model, buckets, chosen)
    return _with_slices(held, config, model, run, chosen) if run.stage == 3 else held


def _with_offload(held: Held, away: Expected, reduced: int) -> Held:
    """Return `held` with the states in host memory. reduced: bytes of the reduced gradient."""
    return replace(
        held,
        states=away.resident,
        gradients=held.gradients - (0 if away.gradient_on_device else reduced),
        buffers=held.buffers + away.buffers,
        host=away.host + away.landing,
    )


def _buckets(recipe: Recipe, model: Model, run: Run, chosen: codes.Codes) -> tuple[Bucket, ...]:
    fleet, cut = Fleet("data", run.gpus), partition_whole if recipe.by_tensor else partition
    specs = [
        ParameterSpec(
            index,
            numel,
            0,
            (E4M3 if index in chosen.shapes else BF16).name,
            fleet,
            replicated=index in model.replicated_at,
        )
        for index, numel in enumerate(model.sizes)
        if index not in model.frozen_at
    ]
    return (partition_sliced if run.stage == 3 else cut)(
        [each for each in specs if each.numel],
        bucket_elements=run.bucket_elements,
        block_size=recipe.block_size,
    )


def _with_codes(
    held: Held, config: FP8Config, model: Model, buckets: Sequence[Bucket], chosen: codes.Codes
) -> Held:
    """Return `held` with FP8 weights, the rows they are made from, and the largest one transposed."""
    if model.module is None:
        saved, room, largest = codes.guessed(model, buckets)
    else:
        coded = [each for each in buckets if each.slots[0].parameter in chosen.shapes]
        saved = memory.weight_bytes(WEIGHT, coded) - memory.code_bytes(coded, chosen.shapes)
        frozen = chosen.frozen.values()
        saved += WEIGHT * sum(map(prod, frozen)) - memory.frozen_bytes(frozen)
        room, largest = memory.room_bytes(coded), chosen.largest
    scratch = largest * (WEIGHT if config.products.dtype == "bf16" else E4M3.itemsize)
    return replace(held, weights=held.weights - saved, buffers=held.buffers + room + scratch)


def _with_slices(held: Held, config: FP8Config, model: Model, run: Run, chosen: codes.Codes) -> Held:
    """The same with the weights as ZeRO 3 holds them in backward."""
    cut = memory.Cut(config.block_size, Fleet("data", run.gpus))
    coded = {*chosen.shapes, *chosen.frozen}
    itemsizes = [E4M3.itemsize if index in coded else WEIGHT for index in range(len(model.sizes))]
    kept = [memory.persistent_bytes(1, [numel], cut.fleet) for numel in model.sizes]
    gathered = [memory.gathered_bytes(1, [numel], *cut) for numel in model.sizes]
    always, at_a_time = fetching.whole(model.sizes, kept, gathered, run.fetching, itemsizes)
    weights = memory.sliced_bytes(itemsizes, model.sizes, model.frozen_at, cut)
    weights += memory.beside_codes(chosen.shapes.values())
    weights += memory.beside_codes(chosen.frozen.values())
    if config.has_codes and model.module is None:
        elements, beside = codes.guessed_slices(model)
        saved = WEIGHT - E4M3.itemsize
        weights += beside - saved * elements // run.gpus
        at_a_time -= round(saved / WEIGHT * at_a_time * elements / model.parameters)
    return replace(held, weights=weights, persistent=always, fetched=at_a_time)


def _stock(state: Format, model: Model, run: Run) -> Held:
    """state: of master weights, states and the step's gradient."""
    refuse_absurd(model.parameters, len(model.sizes), run)
    if run.stage == 3:
        return _stock_sliced(state, model, run)
    sizes = [numel for numel in model.trained if numel]
    part = stock.part_of_rank(sizes, run.gpus)
    bucket = run.bucket_elements * (2 if run.overlap else 1)
    # The step makes a flat copy, and another if the master is wider.
    step = part * (1 + (state.itemsize // WEIGHT if state.itemsize > WEIGHT else 0))
    moments = []
    for reaching, padding in stock.gradients_of_ranks(sizes, run.gpus):
        reduced = reaching + padding
        moments += [(reduced, step)]  # ZeRO 1 has let go of every `.grad` by then
        if run.stage == 1:
            moments += [(sum(sizes), bucket)]
        else:
            moments += [(reduced, bucket + (reaching if run.accumulating else 0))]
    gradients, buffers = max(moments, key=sum)
    return Held(
        weights=WEIGHT * (run.gpus * part + model.frozen),
        states=3 * state.itemsize * part,
        gradients=WEIGHT * gradients,
        buffers=WEIGHT * buffers,
    )


def _stock_sliced(state: Format, model: Model, run: Run) -> Held:
    """Bytes under stock ZeRO 3, which keeps its bucket between steps, too."""
    sizes, keys = model.trained, run.fetching
    part = sum(stock.slices(sizes, run.gpus))
    gathered, itemsizes = stock.gathered(model.sizes, run.gpus), [WEIGHT for _ in model.sizes]
    always, at_a_time = fetching.whole(model.sizes, gathered, gathered, keys, itemsizes)
    # The step makes a flat copy of several parameters' gradient, and another if the master is wider.
    wide = state.itemsize // WEIGHT if state.itemsize > WEIGHT else 0
    groups = stock.sub_groups(sizes, run.gpus, keys.sub_group_size)
    step = max(elements * ((members > 1) + wide) for elements, members in groups)
    backward = stock.largest_reduction(sizes, run.gpus, run.bucket_elements)
    fetched, copied = max((at_a_time // WEIGHT, backward), (0, step), key=sum)
    return Held(
        weights=WEIGHT * sum(stock.slices(model.sizes, run.gpus)),
        states=3 * state.itemsize * part,
        gradients=WEIGHT * part,
        buffers=WEIGHT * (run.bucket_elements + copied),
        persistent=always,
        fetched=WEIGHT * fetched,
    )


STOCK = Method("DeepSpeed BF16", partial(_stock, FP32))
# with bf16_master_weights_and_grads, which it needs
STOCK_BF16_STATES = Method("DeepSpeed BF16 states", partial(_stock, BF16))


def largest(method: Method, run: Run, memory_bytes: int) -> int:
    """Parameters of the largest model that fits the memory of each GPU, to a millionth; 0 if none does.

    What a method refuses is taken to be small: of a large model nothing but the stage of ZeRO is refused.
    """
    low, high = 0, memory_bytes // (E4M3.itemsize if method.codes else WEIGHT)  # the weights alone fill it
    if run.stage == 3 or run.model_parallel_size > 1:
        high = min(high * run.gpus, MOST_PARAMETERS)
    while high - low > low // 1_000_000:
        middle = (low + high + 1) // 2
        model = model_of_size(middle, run)
        small = method.refusal(model, run) is not None
        if small or method.held(model, run).total <= memory_bytes:
            low = middle
        else:
            high = middle - 1
    return low
