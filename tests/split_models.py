"""Models that are split over ranks, by AutoTP and by an mpu as Megatron has it; everything runs on a rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed import set_autotp_mode
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.utils import groups
from engines import build, ds_config, packed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from train_lm import mean_over_ranks

import ds_fp8

# Without a warm-up exp_avg in E4M3 lags behind: docs/precision.md, "The first steps".
NEAREST: dict[str, Any] = {"optimizer": {"rounding": "nearest"}}
MICRO_BATCH = 4
LENGTH = 32  # tokens of a sequence
VOCABULARY, WIDTH = 64, 48
BUCKET = 20_000
SIZE = 2  # ranks that hold parts of one replica

Result = dict[str, Any]


# By an mpu


class Mpu:
    """Tensor parallelism over neighbours, with the methods that DeepSpeed calls."""

    def __init__(self, size: int) -> None:
        count, rank = dist.get_world_size(), dist.get_rank()
        everyone = torch.arange(count).view(-1, size)
        self._peers = [torch.distributed.new_group(each) for each in everyone.tolist()][rank // size]
        self._replicas = [torch.distributed.new_group(each) for each in everyone.T.tolist()][rank % size]

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._peers

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._replicas

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self._peers)

    def get_model_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size(self._peers)

    def get_data_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self._replicas)

    def get_data_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size(self._replicas)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class _Copied(torch.autograd.Function):
    """Megatron's f: gradients are added over the ranks that have copied their input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Added(torch.autograd.Function):
    """Megatron's g: outputs are added over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class SplitMLP(nn.Module):
    """Columns of one matrix, rows of the next; the bias of the second is whole on every rank."""

    def __init__(self, mpu: Mpu) -> None:
        super().__init__()
        self.group = mpu.get_model_parallel_group()
        place, places = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
        self.norm = nn.LayerNorm(WIDTH)
        up, down = (
            torch.randn(4 * WIDTH, WIDTH) / WIDTH**0.5,
            torch.randn(WIDTH, 4 * WIDTH) / (4 * WIDTH) ** 0.5,
        )
        self.up = nn.Parameter(up.chunk(places)[place].clone())
        self.down = nn.Parameter(down.chunk(places, dim=1)[place].clone())
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        for parameter, dimension in ((self.up, 0), (self.down, 1)):
            mark: Any = parameter
            mark.tensor_model_parallel, mark.partition_dim, mark.partition_stride = True, dimension, 1

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(nn.functional.linear(_Copied.apply(self.norm(x), self.group), self.up))
        return x + _Added.apply(nn.functional.linear(hidden, self.down), self.group) + self.bias


class SplitModel(nn.Module):
    """Predicts a token from the two before it."""

    def __init__(self, mpu: Mpu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(SplitMLP(mpu) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = x + nn.functional.pad(x, (0, 0, 1, -1))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


# Engines


@contextmanager
def splits_forgotten() -> Iterator[None]:
    """Put back what DeepSpeed changes in the process for tensor parallelism."""
    try:
        yield
    finally:
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = None
        groups._DATA_PARALLEL_GROUP = groups.mpu = init_utils._TP_MODEL_INIT_ARGS = None
        set_autotp_mode(training=False)


def llama() -> nn.Module:
    """With a frozen matrix, of which ranks have parts, and a frozen norm."""
    from hf_runs import LLAMA
    from hf_trainer import model_of

    torch.manual_seed(0)
    model: Any = model_of(replace(LLAMA, width=64))
    for name in ("self_attn.q_proj.weight", "input_layernorm.weight"):
        model.model.layers[0].get_parameter(name).requires_grad_(False)
    whole: nn.Module = model
    return whole


def config_of(kind: str, fp8: dict[str, Any] | None, size: int = SIZE, **options: Any) -> dict[str, Any]:
    """kind: "autotp" or "mpu"."""
    config = ds_config(fp8, micro_batch=MICRO_BATCH, **{"bucket": BUCKET, **options})
    if kind == "autotp":
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config | ({"tensor_parallel": {"autotp_size": size}} if kind == "autotp" and size > 1 else {})


def engine_of(kind: str, config: dict[str, Any], size: int = SIZE) -> Any:
    if kind == "autotp":
        return build(config, llama())
    mpu = Mpu(size)
    return build(config, SplitModel(mpu), mpu=mpu)


def batch_of(step: int, replica: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + replica)
    pattern = torch.randint(0, 16, (MICRO_BATCH, 4), generator=draw)
    return pattern.repeat(1, LENGTH // 4 + 1)[:, : LENGTH + 1]


def loss_of(engine: Any, step: int, size: int) -> Tensor:
    text = batch_of(step, dist.get_rank() // size)
    output = engine(input_ids=text[:, :-1].contiguous())
    logits = (output if isinstance(output, Tensor) else output.logits).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def run(engine: Any, first: int, steps: int, size: int = SIZE) -> Result:
    """Steps of an engine: mean losses over ranks, norms."""
    result: Result = {"losses": [], "norms": []}
    for step in range(first, first + steps):
        for micro_step in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, 4 * step + micro_step, size)
            engine.backward(loss)
            engine.step()
        result["losses"].append(mean_over_ranks(loss.detach().clone()))
        result["norms"].append(float(engine.get_global_grad_norm()))
    return result


def bits_of(engine: Any) -> dict[str, Tensor]:
    """This rank's own parameters, by name."""
    return {name: each.detach().clone() for name, each in engine.module.named_parameters()}


def train(kind: str, config: dict[str, Any], steps: int = 20, size: int = SIZE) -> Result:
    with splits_forgotten():
        engine = engine_of(kind, config, size)
        result = run(engine, 0, steps, size)
        result["weights"] = bits_of(engine)
        result["whole"] = [
            name
            for name, each in engine.module.named_parameters()
            if not getattr(each, "tensor_model_parallel", False)
        ]
        if ds_fp8.is_active(engine):
            result |= {"about": ds_fp8.describe(engine), "states": packed(engine.optimizer)}
        engine.destroy()
        return result
