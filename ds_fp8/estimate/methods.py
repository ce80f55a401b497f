"""What a GPU holds of a model's weights, states and gradients, with FP8 and with stock DeepSpeed BF16.

Nothing is allocated: `memory` and `stock` have the arithmetic, whose results the tests compare with engines.
Weights are BF16 and in one param group. Activations are not included, nor what libraries and the allocator
keep for themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ds_fp8.config.refusals import refusal
from ds_fp8.config.section import LEVELS, FP8Config
from ds_fp8.estimate import memory, stock
from ds_fp8.ops.formats import BF16, FP32, Format
from ds_fp8.zero_fp8.placement.partition import ParameterSpec, partition, partition_whole
from ds_fp8.zero_fp8.placement.ranks import Fleet
from ds_fp8.zero_fp8.recipe import recipe_of

WEIGHT = BF16.itemsize
# Beyond these an estimate would take minutes.
MOST_PARAMETERS = 10**13
MOST_GPUS = 2**14
MOST_TENSORS = 100_000
MOST_SHARES = 4_000_000  # buckets times GPUs, with one scale per tensor
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size, if the config has none


@dataclass(frozen=True)
class Model:
    """Elements of the parameters that train, in the model's order, and of the others together."""

    name: str
    trained: tuple[int, ...]
    frozen: int = 0
    counted: str = ""  # the class whose parameters these are, and why if the config names none

    def __post_init__(self) -> None:
        if not any(self.trained):
            raise ValueError(f"{self.name}: received no parameter that trains, allowed: at least one")

    @property
    def parameters(self) -> int:
        return sum(self.trained) + self.frozen


@dataclass(frozen=True)
class Run:
    """The part of a run that decides its bytes."""

    gpus: int = 1
    stage: int = 2
    micro_steps: int = 1
    bucket_elements: int = BUCKET_ELEMENTS
    overlap: bool = False

    @property
    def accumulating(self) -> bool:
        """Whether several micro-steps reach the reduced gradient before a step."""
        return self.stage == 2 and self.micro_steps > 1


@dataclass(frozen=True)
class Held:
    """Bytes on the GPU that holds most, when it holds most."""

    weights: int  # frozen ones among them
    states: int  # master weights, exp_avg, exp_avg_sq
    gradients: int  # kept from micro-step to micro-step: the reduced gradient, under ZeRO 1 every `.grad`
    buffers: int  # what comes and goes: buckets on their way, copies for the step

    @property
    def total(self) -> int:
        return self.weights + self.states + self.gradients + self.buffers


@dataclass(frozen=True)
class Method:
    """A way to train, and the bytes that it holds."""

    name: str
    held: Callable[[Model, Run], Held]


def with_fp8(name: str, config: FP8Config) -> Method:
    """ds_fp8 with this section."""
    return Method(name, partial(_with_fp8, config))


def levels() -> dict[str, Method]:
    """ds_fp8 at each of its levels."""
    return {
        level: with_fp8(f"ds_fp8 {level}", FP8Config.model_validate({"enabled": True, "opt_level": level}))
        for level in LEVELS
    }


def refuse_absurd(parameters: int, tensors: int, run: Run) -> None:
    """Refuse sizes that no run has: estimating them would take minutes. Raises ValueError."""
    if parameters > MOST_PARAMETERS:
        raise refusal("parameters", parameters, f"1 to {MOST_PARAMETERS:,}")
    if run.gpus > MOST_GPUS:
        raise refusal("GPUs", run.gpus, f"1 to {MOST_GPUS:,} in an estimate")
    if tensors > MOST_TENSORS:
        allowed = f"1 to {MOST_TENSORS:,}; a larger reduce_bucket_size makes fewer if shapes are unknown"
        raise refusal("tensors", tensors, allowed)


def _refuse_many_shares(buckets: int, ranks: int) -> None:
    if buckets * ranks > MOST_SHARES:
        allowed = f"at most {MOST_SHARES // ranks:,} on {ranks:,} GPUs in an estimate"
        raise refusal('buckets with fp8.scaling "tensor"', buckets, allowed)


def _with_fp8(config: FP8Config, model: Model, run: Run) -> Held:
    refuse_absurd(model.parameters, len(model.trained), run)
    recipe = recipe_of(config, accumulating=run.accumulating, ranks=run.gpus)
    fleet = Fleet("data", run.gpus)
    cut = partition_whole if recipe.by_tensor else partition
    if recipe.by_tensor:
        _refuse_many_shares(sum(model.trained) // run.bucket_elements, run.gpus)
    buckets = cut(
        [
            ParameterSpec(index, numel, 0, BF16.name, fleet)
            for index, numel in enumerate(model.trained)
            if numel
        ],
        bucket_elements=run.bucket_elements,
        block_size=recipe.block_size,
    )
    backward = memory.backward_bytes(recipe, WEIGHT, buckets, stage=run.stage, overlap=run.overlap)
    kept = memory.grad_bytes(WEIGHT, buckets) if run.stage == 1 else 0
    ranks = memory.rank_bytes(recipe, buckets, accumulating=run.accumulating)
    fullest = ranks.index(max(ranks))
    reduced = memory.gradient_bytes(recipe, buckets, fullest, accumulating=run.accumulating)
    return Held(
        weights=memory.weight_bytes(WEIGHT, buckets) + WEIGHT * model.frozen,
        states=memory.state_bytes(recipe, buckets, fullest),
        gradients=reduced + kept,
        buffers=max(backward, memory.gather_bytes(recipe, WEIGHT, buckets)) - kept,
    )


def _stock(state: Format, model: Model, run: Run) -> Held:
    """state: of master weights, states and the step's gradient."""
    refuse_absurd(model.parameters, len(model.trained), run)
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


STOCK = Method("DeepSpeed BF16", partial(_stock, FP32))
# with bf16_master_weights_and_grads, which it needs
STOCK_BF16_STATES = Method("DeepSpeed BF16 states", partial(_stock, BF16))


def model_of_size(parameters: int, run: Run) -> Model:
    """A model of which only the size is known: each rank owns whole parameters, and none exceeds a bucket."""
    refuse_absurd(parameters, parameters // run.bucket_elements, run)
    part = stock.part_of_rank([parameters], run.gpus)

    def pieces() -> Iterator[int]:
        for first in range(0, parameters, part):
            for start in range(first, min(first + part, parameters), run.bucket_elements):
                yield min(run.bucket_elements, first + part - start, parameters - start)

    return Model("a model of unknown shapes", tuple(pieces()))


def model_of_module(module: Any) -> Model:
    """A `torch.nn.Module`, on any device; a parameter that is shared counts once."""
    parameters = list(module.parameters())
    return Model(
        type(module).__name__,
        tuple(each.numel() for each in parameters if each.requires_grad),
        sum(each.numel() for each in parameters if not each.requires_grad),
    )


def paper() -> list[Model]:
    """The models of Table 1 of FP8-LM (arXiv 2310.18313): GPT with rotary positions.

    The paper leaves the vocabulary open: here it is GPT-2's, padded to 50,304.
    """
    return [
        Model("125M", _gpt(layers=12, width=768, tied=True)),
        Model("7B", _gpt(layers=32, width=4096)),
        Model("13B", _gpt(layers=40, width=5120)),
        Model("175B", _gpt(layers=96, width=12288)),
    ]


def _gpt(layers: int, width: int, vocabulary: int = 50304, *, tied: bool = False) -> tuple[int, ...]:
    """Parameters of a GPT with biases and layer norms; tied: the head is the embedding."""
    matrices = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    linear = [numel for rows, columns in matrices for numel in (rows * columns, columns)]
    norm = [width, width]
    table = [vocabulary * width]
    return (*table, *layers * [*norm, *linear, *norm], *norm, *([] if tied else table))


def largest(method: Method, run: Run, memory_bytes: int) -> int:
    """Parameters of the largest model that fits the memory of each GPU, to a millionth; 0 if none does."""
    low, high = 0, memory_bytes // WEIGHT  # the weights alone fill it
    while high - low > low // 1_000_000:
        middle = (low + high + 1) // 2
        if method.held(model_of_size(middle, run), run).total <= memory_bytes:
            low = middle
        else:
            high = middle - 1
    return low
