"""Which weights of a model are FP8 codes, for an estimate: as an engine chooses them where shapes are known.

Where only a size is known the model is taken for a Llama with a vocabulary of 32,000, of which everything but
embedding and head is codes: 88 % of 1.3B parameters, 96 % of 7B, 97 % of 13B.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_fp8.config.section import FP8Config
from ds_fp8.estimate.memory import Shape, exponent_bytes, room_bytes, shape_of
from ds_fp8.estimate.runs import Model, Run
from ds_fp8.ops.formats import BF16, E4M3
from ds_fp8.zero_fp8.placement.partition import Bucket
from ds_fp8.zero_fp8.products.choice import eligible

VOCABULARY = 32_000
WIDEST = 4  # the longer side of the largest matrix over the width


@dataclass(frozen=True)
class Codes:
    """The weights of a model that are codes, and why other matrices are not."""

    shapes: Mapping[int, Shape]  # by position among the model's parameters, of those that train
    frozen: Mapping[int, Shape]  # of those that do not
    names: Sequence[str]
    reasons: Mapping[str, str]

    @property
    def elements(self) -> int:
        return sum(rows * columns for rows, columns in self._all)

    @property
    def largest(self) -> int:
        return max((rows * columns for rows, columns in self._all), default=0)

    @property
    def _all(self) -> list[Shape]:
        return [*self.shapes.values(), *self.frozen.values()]


def codes_of(config: FP8Config, model: Model) -> Codes:
    """The FP8 weights of a model; none if its shapes are unknown."""
    if not config.has_codes or model.module is None:
        return Codes({}, {}, (), {})
    section = config.weights
    found, reasons = eligible(
        model.module,
        min_elements=section.min_elements,
        exclude=section.exclude,
        dtype=None,
        trained=config.states.weights is not None,
        frozen=section.frozen == "e4m3",
    )
    positions = {id(each): index for index, each in enumerate(model.module.parameters())}
    shapes = {positions[id(each.parameter)]: shape_of(each.parameter) for each in found}
    frozen = {index: shapes.pop(index) for index in model.frozen_at & shapes.keys()}
    return Codes(shapes, frozen, [each.name for each in found], reasons)


def width_of(parameters: int) -> int:
    """Width of a Llama of this size: 12 width^2 parameters per layer, one layer per 128 of the width."""
    return round(math.pow(parameters * 128 / 12, 1 / 3))


def elements_of(parameters: int) -> int:
    """Number of elements in FP8 of a model of unknown shapes."""
    return max(0, parameters - 2 * VOCABULARY * width_of(parameters))


def guessed(model: Model, buckets: Sequence[Bucket]) -> tuple[int, int, int]:
    """Bytes that codes save, bytes of scratch room, and elements of the largest matrix; shapes are unknown.

    What trains beside frozen parameters is taken for adapters: the codes are then the base's.
    """
    width = width_of(model.parameters)
    rate = E4M3.itemsize + exponent_bytes(width, width) / width**2
    saved = round(_guessed_elements(model) * (BF16.itemsize - rate))
    return saved, 0 if model.frozen else room_bytes(buckets), WIDEST * width**2


def _guessed_elements(model: Model) -> int:
    elements = elements_of(model.parameters)
    return min(elements, model.frozen) if model.frozen else elements


def guessed_slices(model: Model) -> tuple[int, int]:
    """Of a model of unknown shapes: elements that are codes, and bytes beside them on every GPU."""
    elements, width = elements_of(model.parameters), width_of(model.parameters)
    return elements, round(elements * exponent_bytes(width, width) / width**2)


def refusal_of(config: FP8Config, model: Model, run: Run) -> str | None:
    """Why no run has FP8 weights with this model."""
    if not config.has_codes:
        return None
    if run.model_parallel_size > 1:
        return "refused with tensor parallelism: FP8 weights are not measured there yet"
    return _refusal_of_size(config, model) if model.module is None else _refusal_of_matrices(config, model)


def _refusal_of_size(config: FP8Config, model: Model) -> str | None:
    least = config.weights.min_elements
    if config.states.weights is None and not model.frozen:
        return "refused for a model of unknown shapes: --trainable says how much of it is frozen"
    if model.frozen and config.weights.frozen != "e4m3":
        return "refused: what trains is taken for adapters, which are too small for FP8 weights"
    if 2 * width_of(model.parameters) ** 2 < least:
        return f"refused for so small a model: it has no matrix of {least:,} elements"
    return None


def _refusal_of_matrices(config: FP8Config, model: Model) -> str | None:
    try:
        found = codes_of(config, model).names
    except ValueError as error:  # another library makes FP8 products with it
        return f"refused for {model.name}: {error}"
    return None if found else f"refused for {model.name}: no matrix is eligible"


def note_of(config: FP8Config, model: Model) -> str | None:
    """Which share of the model the estimate takes to be in FP8; None without FP8 weights."""
    if not config.has_codes:
        return None
    if model.module is None:
        share = _guessed_elements(model) / model.parameters
        return f"{share:.1%} of the parameters in FP8, as of a Llama of that size: the shapes are unknown"
    codes = codes_of(config, model)
    return f"{len(codes.names)} matrices, {codes.elements / model.parameters:.1%} of the parameters, in FP8"
