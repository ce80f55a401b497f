"""The FP8 weights of an engine, for `describe`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.nn import Parameter

from ds_fp8.estimate import memory
from ds_fp8.ops.formats import E4M3
from ds_fp8.zero_fp8.placement.parameters import held_of, numel_of
from ds_fp8.zero_fp8.placement.partition import Bucket
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.weights.tiled import Products

NOT_OPTIMISED = "not given to the optimizer"


def weights_of(engine: Any) -> dict[str, Any]:
    """Which matrices are FP8 and why others are not, how they are multiplied, bytes; empty if none is FP8."""
    handler = engine.optimizer
    products: Products | None = handler.parts.products
    if products is None:
        return {}
    parameters: Mapping[int, Parameter] = handler.parameters
    fp8 = sum(numel_of(parameters[index]) for index in products.chosen)
    fp8 += sum(each.codes.numel() for each in handler.parts.frozen.matrices())
    elements = sum(map(numel_of, engine.module.parameters()))
    names = {products.names[index] for index in products.chosen}
    names |= {each.name for each in handler.parts.frozen.matrices()}
    return {
        "products": products.choice.way.name,
        "products_instead": products.choice.instead,
        "fp8_elements": fp8,
        "fp8_share": fp8 / elements,
        "fp8_weights": [name for name, _ in engine.module.named_parameters() if name in names],
        "bf16_matrices": _others(engine, products),
        **_bytes(handler, list(engine.module.parameters()), elements, products),
    }


def _others(engine: Any, products: Products) -> dict[str, str]:
    """Why each other matrix stays as the model, by name."""
    choice, trained = products.choice, {products.names[index] for index in products.chosen}
    eligible = set(map(id, choice.parameters))
    named = ((name, each) for name, each in engine.module.named_parameters() if id(each) in eligible)
    return {**choice.reasons, **{name: NOT_OPTIMISED for name, _ in named if name not in trained}}


def _bytes(handler: Any, members: Sequence[Parameter], elements: int, products: Products) -> dict[str, Any]:
    """Of all weights on this rank, and what it sends of them in a step."""
    sliced = handler.settings.stage == 3
    coded = [each for each in handler.parts.buckets if each.slots[0].parameter in products.chosen]
    shapes = {index: memory.shape_of(handler.parameters[index]) for index in products.chosen}
    weights = (_sliced if sliced else _whole)(handler, members, coded, shapes)
    sent = sum(memory.handed_bytes(_itemsize(handler, each, coded), [each]) for each in handler.parts.buckets)
    return {
        "weight_bytes": weights,
        "weight_bytes_per_parameter": weights / elements,
        "weight_room_bytes": memory.room_bytes(coded),
        "gather_bytes": 0 if sliced else sent,
        "agreement_bytes": memory.agreement_bytes(coded, shapes),
    }


def _itemsize(handler: Any, bucket: Bucket, coded: Sequence[Bucket]) -> int:
    parameter: Parameter = handler.parameters[bucket.slots[0].parameter]
    return E4M3.itemsize if bucket in coded else parameter.element_size()


def _whole(
    handler: Any, members: Sequence[Parameter], coded: Sequence[Bucket], shapes: Mapping[int, memory.Shape]
) -> int:
    """Bytes of weights under ZeRO 1 and 2."""
    trained = {id(each) for each in handler.parameters.values()}
    others = [each for each in members if id(each) not in trained]
    frozen = [memory.shape_of(each) for each in others if isinstance(each, FP8Parameter)]
    plain = sum(each.numel() * each.element_size() for each in others if not isinstance(each, FP8Parameter))
    buckets = [each for each in handler.parts.buckets if each not in coded]
    plain += sum(memory.weight_bytes(_itemsize(handler, each, coded), [each]) for each in buckets)
    return memory.code_bytes(coded, shapes) + memory.frozen_bytes(frozen) + plain


def _sliced(
    handler: Any, members: Sequence[Parameter], coded: Sequence[Bucket], shapes: Mapping[int, memory.Shape]
) -> int:
    """Bytes of slices under ZeRO 3, and of exponents, which every rank has."""
    cut = memory.Cut(handler.recipe.block_size, handler.parts.buckets[0].fleet)
    trained = {id(each) for each in handler.parameters.values()}
    frozen = {index for index, each in enumerate(members) if id(each) not in trained}
    itemsizes = [held_of(each).element_size() for each in members]
    slices = memory.sliced_bytes(itemsizes, list(map(numel_of, members)), frozen, cut)
    others = [memory.shape_of(each.codes) for each in handler.parts.frozen.matrices()]
    return slices + memory.beside_codes(shapes.values()) + memory.beside_codes(others)
