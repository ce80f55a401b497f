"""Models and runs whose bytes are estimated: parameters by their sizes, and the keys that decide bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ds_fp8.config.refusals import refusal
from ds_fp8.estimate import stock
from ds_fp8.estimate.fetching import Fetching
from ds_fp8.ops.formats import FP32
from ds_fp8.zero_fp8.placement.ranks import Fleet

# Beyond these an estimate would take minutes.
MOST_PARAMETERS = 10**13
MOST_GPUS = 2**14
MOST_TENSORS = 100_000
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size, if the config has none


@dataclass(frozen=True)
class Model:
    """Elements of the parameters, in the model's order."""

    name: str
    sizes: tuple[int, ...]
    frozen_at: frozenset[int] = frozenset()  # positions of those that do not train
    counted: str = ""  # the class whose parameters these are, and why if the config names none
    module: Any = field(default=None, repr=False, compare=False)  # whose they are, if shapes are known
    replicated_at: frozenset[int] = (
        frozenset()
    )  # of a part of a model: positions of what all ranks have whole

    def __post_init__(self) -> None:
        if not any(self.trained):
            raise ValueError(f"{self.name}: received no parameter that trains, allowed: at least one")

    @cached_property
    def trained(self) -> tuple[int, ...]:
        return tuple(numel for index, numel in enumerate(self.sizes) if index not in self.frozen_at)

    @cached_property
    def frozen_sizes(self) -> tuple[int, ...]:
        return tuple(self.sizes[index] for index in sorted(self.frozen_at))

    @property
    def frozen(self) -> int:
        return sum(self.frozen_sizes)

    @cached_property
    def parameters(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Run:
    """The part of a run that decides its bytes."""

    gpus: int = 1
    stage: int = 2
    micro_steps: int = 1
    bucket_elements: int = BUCKET_ELEMENTS
    overlap: bool = False
    fetching: Fetching = field(default_factory=Fetching)  # under ZeRO 3
    sequence_parallel_size: int = 1
    model_parallel_size: int = 1  # GPUs that have parts of one replica of the model
    accumulate_in_fp32: bool = False  # the micro-steps of ZeRO 1

    @property
    def accumulating(self) -> bool:
        """Whether several micro-steps reach the reduced gradient before a step."""
        return self.stage >= 2 and self.micro_steps > 1

    @property
    def replicas(self) -> int:
        """GPUs that have the same part of the model."""
        return Fleet("data", self.gpus).sequences(self.model_parallel_size)

    def grad_itemsize(self, model_itemsize: int) -> int:
        """Bytes per element of `.grad`."""
        wide = self.stage == 1 and self.micro_steps > 1 and self.accumulate_in_fp32
        return FP32.itemsize if wide else model_itemsize


def run_at_defaults(gpus: int, stage: int, micro_steps: int = 1) -> Run:
    """A run whose config leaves the rest out; under ZeRO 3 DeepSpeed then overlaps."""
    return Run(gpus, stage, micro_steps, overlap=stage == 3)


def of_rank(model: Model, run: Run) -> tuple[Model, Run]:
    """A GPU's part of a model that tensor parallelism splits, and the run of the GPUs with the same part.

    As AutoTP splits it: matrices of linear layers evenly; embeddings, norms and biases are whole on every
    GPU. Of a model of unknown shapes everything is split.
    """
    size = run.model_parallel_size
    if size == 1:
        return model, run
    split = range(len(model.sizes)) if model.module is None else _matrices(model.module)
    sizes = tuple(-(-numel // size) if index in split else numel for index, numel in enumerate(model.sizes))
    whole = frozenset(range(len(sizes))) - frozenset(split)
    part = replace(model, sizes=sizes, replicated_at=whole)
    return part, replace(run, gpus=run.replicas, model_parallel_size=1)


def _matrices(module: Any) -> frozenset[int]:
    """Positions of the parameters that linear layers multiply with and no embedding shares."""
    from torch import nn

    linear = {id(each.weight) for each in module.modules() if isinstance(each, nn.Linear)}
    linear -= {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    return frozenset(index for index, each in enumerate(module.parameters()) if id(each) in linear)


def refuse_absurd(parameters: int, tensors: int, run: Run) -> None:
    """Refuse sizes that no run has: estimating them would take minutes. Raises ValueError."""
    if parameters > MOST_PARAMETERS:
        raise refusal("parameters", parameters, f"1 to {MOST_PARAMETERS:,}")
    if run.gpus > MOST_GPUS:
        raise refusal("GPUs", run.gpus, f"1 to {MOST_GPUS:,} in an estimate")
    if tensors > MOST_TENSORS:
        allowed = f"1 to {MOST_TENSORS:,}; a larger reduce_bucket_size makes fewer if shapes are unknown"
        raise refusal("tensors", tensors, allowed)


def model_of_size(parameters: int, run: Run) -> Model:
    """A model of which only the size is known: no parameter exceeds a bucket.

    Under ZeRO 1 and 2 each rank owns whole parameters.
    """
    refuse_absurd(parameters, parameters // run.bucket_elements, run)
    part = parameters if run.stage == 3 else stock.part_of_rank([parameters], run.gpus)

    def pieces() -> Iterator[int]:
        for first in range(0, parameters, part):
            for start in range(first, min(first + part, parameters), run.bucket_elements):
                yield min(run.bucket_elements, first + part - start, parameters - start)

    return Model("a model of unknown shapes", tuple(pieces()))


def with_frozen(model: Model, frozen: int, run: Run) -> Model:
    """The model with `frozen` more parameters that do not train, as adapters have a base."""
    refuse_absurd(model.parameters + frozen, len(model.sizes) + frozen // run.bucket_elements, run)
    whole, rest = divmod(frozen, run.bucket_elements)
    base = (run.bucket_elements,) * whole + ((rest,) if rest else ())
    positions = frozenset(range(len(model.sizes), len(model.sizes) + len(base)))
    return replace(model, sizes=model.sizes + base, frozen_at=positions)


def model_of_module(module: Any) -> Model:
    """A `torch.nn.Module`, on any device; a parameter that is shared counts once."""
    parameters = list(module.parameters())
    frozen = frozenset(index for index, each in enumerate(parameters) if not each.requires_grad)
    sizes = tuple(each.numel() for each in parameters)
    return Model(type(module).__name__, sizes, frozen, module=module)


def paper() -> list[Model]:
    """The models of Table 1 of FP8-LM (arXiv 2310.18313): GPT with rotary positions.

    The paper leaves the vocabulary open: here it is GPT-2's, padded to 50,304.
    """
    return [
        _gpt("125M", layers=12, width=768, tied=True),
        _gpt("7B", layers=32, width=4096),
        _gpt("13B", layers=40, width=5120),
        _gpt("175B", layers=96, width=12288),
    ]


def _gpt(name: str, layers: int, width: int, vocabulary: int = 50304, *, tied: bool = False) -> Model:
    """Parameters of a GPT with biases and layer norms; tied: the head is the embedding."""
    import torch
    from torch import nn

    def block() -> nn.Module:
        sides = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        matrices = [nn.Linear(inputs, outputs) for inputs, outputs in sides]
        return nn.Sequential(nn.LayerNorm(width), *matrices, nn.LayerNorm(width))

    with torch.device("meta"):
        module = nn.Module()
        module.tokens = nn.Embedding(vocabulary, width)
        module.layers = nn.ModuleList(block() for _ in range(layers))
        module.norm = nn.LayerNorm(width)
        module.head = nn.Linear(width, vocabulary, bias=False)
    if tied:
        module.head.weight = module.tokens.weight
    return replace(model_of_module(module), name=name)
