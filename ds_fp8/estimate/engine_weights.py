"""The FP8 weights of an engine, for `describe`."""

from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter

from ds_fp8.estimate import memory
from ds_fp8.ops.formats import E4M3
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
    fp8 = sum(parameters[index].numel() for index in products.chosen)
    fp8 += sum(each.codes.numel() for each in handler.parts.frozen.matrices())
    elements = sum(each.numel() for each in engine.module.parameters())
    names = {products.names[index] for index in products.chosen}
    names |= {each.name for each in handler.parts.frozen.matrices()}
    return {
        "products": products.choice.way.name,
        "products_instead": products.choice.instead,
        "fp8_elements": fp8,
        "fp8_share": fp8 / elements,
        "fp8_weights": [name for name, _ in engine.module.named_parameters() if name in names],
        "bf16_matrices": _others(engine, products),
        **_bytes(handler, engine.module.parameters(), elements, products),
    }


def _others(engine: Any, products: Products) -> dict[str, str]:
    """Why each other matrix stays as the model, by name."""
    choice, trained = products.choice, {products.names[index] for index in products.chosen}
    eligible = set(map(id, choice.parameters))
    named = ((name, each) for name, each in engine.module.named_parameters() if id(each) in eligible)
    return {**choice.reasons, **{name: NOT_OPTIMISED for name, _ in named if name not in trained}}


def _bytes(handler: Any, members: Any, elements: int, products: Products) -> dict[str, Any]:
    """Bytes of all weights on this rank, and bytes that it hands to the gathers of a step."""
    parameters: Mapping[int, Parameter] = handler.parameters

    def is_codes(bucket: Bucket) -> bool:
        return bucket.slots[0].parameter in products.chosen

    def itemsize(bucket: Bucket) -> int:
        return E4M3.itemsize if is_codes(bucket) else parameters[bucket.slots[0].parameter].element_size()

    buckets = handler.parts.buckets
    coded = [each for each in buckets if is_codes(each)]
    shapes = {index: memory.shape_of(parameters[index]) for index in products.chosen}
    held = {id(each) for each in parameters.values()}
    plain = sum(memory.weight_bytes(itemsize(each), [each]) for each in buckets if not is_codes(each))
    others = [each for each in members if id(each) not in held]
    frozen = [memory.shape_of(each) for each in others if isinstance(each, FP8Parameter)]
    plain += sum(each.numel() * each.element_size() for each in others if not isinstance(each, FP8Parameter))
    weights = memory.code_bytes(coded, shapes) + memory.frozen_bytes(frozen) + plain
    return {
        "weight_bytes": weights,
        "weight_bytes_per_parameter": weights / elements,
        "weight_room_bytes": memory.room_bytes(coded),
        "gather_bytes": sum(memory.handed_bytes(itemsize(each), [each]) for each in buckets),
        "agreement_bytes": memory.agreement_bytes(coded, shapes),
    }
