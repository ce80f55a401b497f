"""Compare bits: exchange and gather on this device with the host's, and trainings with one another.

Every function runs on all ranks and returns the same on each of them.
"""

import copy
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gradient_way import Way
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_fp8.ops.backend import REFERENCE, Backend
from ds_fp8.zero_fp8.comm.agreement import gather_objects
from ds_fp8.zero_fp8.weights.store import Gathers

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

SIZES = (1000, 128, 70_000, 1, 40_000, 12_345, 300, 9_999)  # of parameters, several buckets
UNUSED = 3  # this parameter has no gradient on the last rank
BUCKET = 50_000
FORMATS = (("e4m3", "e4m3"), ("e4m3", "fp32"), ("e5m2", "bf16"), ("bf16", "e4m3"))  # of wire and shard
PARITY = 0.05  # nats between the ends of a run with FP8 and one without


@contextmanager
def repeatable() -> Iterator[None]:
    """Make kernels deterministic, and fill uninitialised memory with NaN or 255."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """A way to exchange."""

    wire: str
    shard: str
    node_size: int
    overlap: bool

    def __str__(self) -> str:
        overlap = ", overlap" if self.overlap else ""
        return f"{self.wire} into {self.shard}, nodes of {self.node_size}{overlap}"


def node_sizes(ranks: int) -> list[int]:
    """Return node sizes: one hop, and two if the ranks make several nodes of two."""
    return [1, 2] if ranks > 2 and ranks % 2 == 0 else [1]


def cases(ranks: int) -> list[Case]:
    return [Case(*formats, *how) for formats in FORMATS for how in product(node_sizes(ranks), (False, True))]


@repeatable()
def against_host(device: torch.device, backend: Backend) -> list[str]:
    """Compare this device's kernels and collectives with the reference over gloo; return a line per case.

    Raises AssertionError, on every rank, if bits differ.
    """
    group = torch.distributed.group.WORLD
    lines = []
    for case in cases(torch.distributed.get_world_size()):
        here = arrivals(case, device, backend)
        there = arrivals(case, torch.device("cpu"), REFERENCE)
        differ = [name for name, bits in here.items() if not torch.equal(bits, there[name])]
        found = [f"rank {rank}: {each[0]}" for rank, each in enumerate(gather_objects(differ, group)) if each]
        assert not found, f"{case}: {found[0]} differ from the reference over gloo"
        lines.append(f"{case}: {sum(map(len, here.values())):,} bytes of gradients and weights are the same")
    return lines


def arrivals(case: Case, device: torch.device, backend: Backend) -> dict[str, Tensor]:
    """Return host copies of this rank's reduced gradients, after two micro-steps, and of gathered weights."""

    def there(values: Tensor) -> Tensor:
        return values.to(device, torch.bfloat16)

    parameters = [Parameter(there(noise(size, index))) for index, size in enumerate(SIZES)]
    section = {"dtype": case.wire, "accum_dtype": case.shard, "intra_node_size": case.node_size}
    way = Way(parameters, backend, bucket_elements=BUCKET, overlap=case.overlap, gradients=section)
    for micro_step in range(2):
        seed = 1000 * way.rank + 100 * micro_step
        gradients = [there(noise(size, seed + index) * 1e-3) for index, size in enumerate(SIZES)]
        unused = [UNUSED] if way.rank == way.ranks - 1 else []
        way.give([None if index in unused else each for index, each in enumerate(gradients)])
        way.parts.reducer.finish()
    gathers = Gathers()
    for number, each in enumerate(way.parts.weights):
        each.own.copy_(noise(each.own.numel(), 10_000 + 100 * way.rank + number).view_as(each.own))
        gathers.launch(each, way.nodes)
    gathers.wait()
    way.nodes.close()
    found = {}
    for number, (_, reduced, _, weights) in enumerate(way.parts.by_bucket()):
        found[f"gradients of bucket {number}"] = raw(reduced.blocks.codes)
        found[f"weights of bucket {number}"] = raw(weights.buffer)
        if reduced.blocks.scales is not None:
            found[f"scales of bucket {number}"] = raw(reduced.blocks.scales)
    return found


def noise(size: int, seed: int) -> Tensor:
    """Normal values whose magnitudes differ from block to block; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * torch.randn(size, generator=generator).mul(2).exp()


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()


STOCK = "stock DeepSpeed BF16"
NUMERICS: dict[str, dict[str, Any]] = {
    "O2": {},
    "one scale per tensor": {"scaling": "tensor"},
    "one scale per tensor, added in FP8": {"scaling": "tensor", "gradients": {"reduction": "fp8"}},
    "O3": {"opt_level": "O3", "weights": {"min_elements": 2**14}},  # every linear layer's weight
}


@dataclass(frozen=True)
class Setting:
    """A way to train."""

    stage: int
    overlap: bool
    node_size: int
    numerics: str = "O2"  # of NUMERICS, or stock

    def __str__(self) -> str:
        if self.numerics == STOCK:
            return f"{STOCK}, ZeRO {self.stage}"
        overlap = ", overlap" if self.overlap else ""
        return f"{self.numerics}, ZeRO {self.stage}, nodes of {self.node_size}{overlap}"

    @property
    def alike(self) -> str:
        """Key of settings that must not differ by a bit."""
        return f"{self.numerics}, nodes of {self.node_size}"

    def ds_config(self) -> dict[str, Any]:
        zero = {"stage": self.stage, "overlap_comm": self.overlap, "reduce_bucket_size": 100_000}
        if self.stage == 3:  # a linear layer adds its bias as at other stages
            zero |= {"memory_efficient_linear": False, "stage3_param_persistence_threshold": 1000}
        params: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": params},
            "steps_per_print": 10**9,
        }
        if self.numerics == STOCK:
            params["torch_adam"] = True
            return config
        fp8 = copy.deepcopy(NUMERICS[self.numerics])
        fp8.setdefault("gradients", {})["intra_node_size"] = self.node_size
        return config | {"fp8": {"enabled": True, **fp8}}


def settings(ranks: int) -> list[Setting]:
    """Return settings, the first one twice: bits are compared only if a training is repeatable."""
    nodes = node_sizes(ranks)
    ways = [Setting(*each) for each in product((2, 3, 1), (False, True), nodes)]
    codes = [Setting(*each, size, "O3") for each in ((2, False), (2, True), (3, True)) for size in nodes]
    tensors = [
        Setting(*each, 1, name)
        for name, fp8 in NUMERICS.items()
        if "scaling" in fp8
        for each in ((2, False), (1, True))
    ]
    return [ways[0], *ways, *codes, Setting(2, False, 1, STOCK), *tensors]


def trainings(ways: Sequence[Setting], steps: int) -> Iterator[dict[str, Any]]:
    """Train; yield a row per setting: losses, and the digest of the weights.

    Raises AssertionError if ranks end with different weights, or if settings differ that must not.
    """
    first: dict[str, dict[str, Any]] = {}
    with repeatable():
        for setting in ways:
            row = train(setting, steps)
            yield row
            reference = first.setdefault(setting.alike, row)
            for what in ("weights", "losses"):
                assert row[what] == reference[what], f"{setting}: {what} differ from {reference['name']}'s"


def train(setting: Setting, steps: int) -> dict[str, Any]:
    import deepspeed
    from train_lm import Corpus, Shape, build_engine, read_corpus, train_step

    shape, group = Shape(), torch.distributed.group.WORLD
    engine = build_engine(setting.ds_config(), shape, seed=0)
    batches = Corpus(read_corpus("topics"), shape.context).batches(4, torch.distributed.get_rank())
    losses = [train_step(engine, batches) for _ in range(steps)]
    digest, parameters = hashlib.sha256(), list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            digest.update(raw(parameter).numpy().tobytes())
    digests = gather_objects(digest.hexdigest(), group)
    engine.destroy()
    assert len({*digests}) == 1, f"{setting}: the ranks end with different weights"
    end = losses[-min(10, steps) :]
    return {
        "name": str(setting),
        "losses": losses,
        "last_loss": sum(end) / len(end),
        "weights": digests[0],
    }
