"""FP8ZeROOptimizer: what DeepSpeed's engine talks to under ZeRO 1 and 2.

The engine calls, in this order: the backward prologue and epilogue, `overlapping_partition_...`
(ZeRO 2, every micro-step) or `reduce_gradients` (ZeRO 1, at the boundary), `step`, `zero_grad`.
The parts do the work: `GradientReducer` brings gradients to shards, a `Shard` steps, `Weights`
brings weights to the parameters.

A fresh subclass of DeepSpeed's `ZeROOptimizer` base, not of its 3,000-line stage 1/2 handler, ten
of whose methods changed signature within three releases.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.compat import ZeROOptimizer
from ds_fp8.ops.reduction import first_non_finite_block, sum_of_squares
from ds_fp8.zero_fp8 import checkpoint
from ds_fp8.zero_fp8.comm import max_over_ranks, sum_over_ranks
from ds_fp8.zero_fp8.gradients import GradientReducer
from ds_fp8.zero_fp8.optimizer import FP8AdamW, Recipe, Shard
from ds_fp8.zero_fp8.partition import ParameterSpec, partition
from ds_fp8.zero_fp8.weights import Weights

logger = logging.getLogger("ds_fp8")


@dataclass(frozen=True)
class ZeroSettings:
    """What of the ds_config the handler obeys, as plain values."""

    stage: int  # 1 or 2
    bucket_elements: int  # reduce_bucket_size
    gradient_clipping: float  # largest global norm; 0 = off
    max_consecutive_skips: int
    save_fp32_master: bool


class FP8ZeROOptimizer(ZeROOptimizer):
    """ZeRO 1 and 2 over FP8 gradients, FP8 communication and low-precision Adam states."""

    custom_loss_scaler = False
    external_loss_scale = None
    torch_autocast_gradscaler = None
    loss_scaler = None
    dynamic_loss_scale = False

    def __init__(
        self,
        optimizer: FP8AdamW,
        names: Mapping[Parameter, str],
        recipe: Recipe,
        settings: ZeroSettings,
        group: ProcessGroup,
        timers: Any,
    ) -> None:
        """Take over the parameters: masters are made from them, and they become views of buffers.

        names: every parameter of the model, in the model's order, with its name; the order numbers
        the parameters and so must be the same on every rank. timers: DeepSpeed's.
        """
        super().__init__()
        self.optimizer = optimizer
        self.recipe = recipe
        self.settings = settings
        self.dp_process_group = group
        self.timers = timers
        self.overflow = False
        self.consecutive_skips = 0
        self._global_grad_norm: float | None = None

        rank = dist.get_rank(group)
        self.parameters, specs = _trained_parameters(optimizer, names)
        self.parameter_names = {index: names[each] for index, each in self.parameters.items()}
        self.buckets = partition(
            specs,
            bucket_elements=settings.bucket_elements,
            block_size=recipe.block_size,
            world_size=dist.get_world_size(group),
        )
        self.weights = [Weights(bucket, self.parameters, rank) for bucket in self.buckets]
        device = self.weights[0].buffer.device
        self.shards = [Shard(bucket, rank, recipe, device) for bucket in self.buckets]
        self._masters_from_weights()
        self.gradients = GradientReducer(self.buckets, self.parameters, self.shards, recipe, group)
        if settings.stage == 2:
            self.gradients.listen()

    # Backward

    def enter_backward(self) -> None:
        super().enter_backward()
        self.gradients.active = True

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """ZeRO 2, after every micro-step: what backward has not sent yet."""
        self.gradients.finish()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """ZeRO 1, at the accumulation boundary."""
        self.gradients.finish()

    # Step

    def step(self, closure: Any = None) -> None:
        """One Adam step on every shard, or none: then every byte of state stays as it was.

        Raises RuntimeError without a gradient, and after `max_consecutive_skips` skips in a row.
        """
        if any(shard.arrivals == 0 for shard in self.shards):
            raise RuntimeError("step() without a gradient: call engine.backward(loss) before engine.step()")
        with _Timed(self.timers, "optimizer_gradients"):
            norm = self._reduced_norm()
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm)
        if self.overflow:
            self._skip()
        else:
            self.consecutive_skips = 0
            self._update(self._gradient_scale() * self._clip_factor(norm))
        for shard in self.shards:
            shard.arrivals = 0

    def _gradient_scale(self) -> float:
        """From the sum over ranks, as stored, to the mean."""
        return 1.0 / int(dist.get_world_size(self.dp_process_group))

    def _reduced_norm(self) -> float:
        """2-norm of the mean gradient over all ranks, inf where a value is not finite."""
        figures = torch.stack([sum_of_squares(shard.gradient) for shard in self.shards]).sum(dim=0)
        sum_over_ranks(figures, self.dp_process_group)
        squares, non_finite = figures.tolist()
        if non_finite or not math.isfinite(squares):
            return math.inf
        return math.sqrt(squares) * self._gradient_scale()

    def _clip_factor(self, norm: float) -> float:
        """Rounded to FP32, so that the order of summation at a world size does not show."""
        limit = self.settings.gradient_clipping
        if limit <= 0 or norm + 1e-6 <= limit:
            return 1.0
        return float(torch.tensor(limit / (norm + 1e-6), dtype=torch.float32))

    def _update(self, gradient_scale: float) -> None:
        scalars = self.optimizer.advance(gradient_scale, clamp=self.recipe.clamped)
        for bucket, shard, weights in zip(self.buckets, self.shards, self.weights, strict=True):
            with _Timed(self.timers, "optimizer_step"):
                shard.sweep(weights.own, scalars[bucket.group])
            with _Timed(self.timers, "optimizer_allgather"):
                weights.gather(self.dp_process_group)

    def _skip(self) -> None:
        self.consecutive_skips += 1
        culprit = self._first_non_finite_parameter()
        if dist.get_rank(self.dp_process_group) == 0:
            logger.warning("step skipped: the gradient of %s is not finite", culprit)
        if self.consecutive_skips >= self.settings.max_consecutive_skips:
            raise RuntimeError(
                f"{self.consecutive_skips} steps skipped in a row, as many as fp8.max_consecutive_skips "
                f"allows: the gradient of {culprit} is not finite"
            )

    def _first_non_finite_parameter(self) -> str:
        """Name of the first such parameter in the model's order, on any rank."""
        found = [
            piece.slot.parameter
            for shard in self.shards
            for piece in shard.pieces
            if first_non_finite_block(shard.gradient[piece.rows]) is not None
        ]
        last = max(self.parameters)
        closeness = torch.tensor([last - min(found) if found else -1])
        closeness = closeness.to(self.weights[0].buffer.device)
        max_over_ranks(closeness, self.dp_process_group)
        index = int(last - closeness.item())
        return self.parameter_names.get(index, "no single parameter (the sum of squares overflows)")

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    # What DeepSpeed, schedulers and Hugging Face read

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @property
    def round_robin_bit16_groups(self) -> list[list[Parameter]]:
        """Parameters in the order in which a checkpoint's FP32 view holds them."""
        return [[self.parameters[slot.parameter] for slot in bucket.slots] for bucket in self.buckets]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's states and reduced gradient."""
        return sum(shard.nbytes for shard in self.shards)

    def destroy(self) -> None:
        self.gradients.remove_hooks()

    # Checkpoint

    def _masters_from_weights(self) -> None:
        for shard, weights in zip(self.shards, self.weights, strict=True):
            shard.take_masters(weights.own)
        self._weights_from_masters()

    def _weights_from_masters(self) -> None:
        """Weights are a function of the state, from the first step and after every load."""
        for shard, weights in zip(self.shards, self.weights, strict=True):
            weights.write(shard.state.master)
            weights.gather(self.dp_process_group)

    _restore_from_bit16_weights = _masters_from_weights
    refresh_fp32_params = _masters_from_weights

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard: raw states for us, FP32 masters for DeepSpeed's zero_to_fp32.py."""
        saved: dict[str, Any] = {
            "zero_stage": self.settings.stage,
            "partition_count": dist.get_world_size(self.dp_process_group),
            "base_optimizer_state": {
                "state": {},
                "fp8": {
                    "format_version": checkpoint.FORMAT_VERSION,
                    "recipe": checkpoint.recipe_entry(self.recipe),
                    "steps": self.optimizer.steps,
                    "clamp_squares": list(self.optimizer.clamp_squares),
                    "parameters": checkpoint.pack(self.shards, self.parameter_names),
                },
                "param_groups": [_without_params(group) for group in self.param_groups],
            },
        }
        if self.settings.save_fp32_master:
            saved["single_partition_of_fp32_groups"] = [checkpoint.fp32_masters(s) for s in self.shards]
        return saved

    def load_state_dict(self, state_dict_list: Sequence[Mapping[str, Any]], **_: Any) -> None:
        """Restore this rank's entry of the list, bit for bit; another world size is not read yet.

        Raises ValueError, before anything is changed, where the checkpoint does not fit this run.
        """
        saved = state_dict_list[dist.get_rank(self.dp_process_group)]
        base = saved.get("base_optimizer_state", {})
        native = base.get("fp8") if isinstance(base, dict) else None
        if native is None:
            raise ValueError(
                'checkpoint: received optimizer states that were not written with "fp8" enabled; load them '
                "without this section, or only the weights (load_optimizer_states=False)"
            )
        expected = {
            "format_version": checkpoint.FORMAT_VERSION,
            "recipe": checkpoint.recipe_entry(self.recipe),
        }
        for key, value in expected.items():
            if native[key] != value:
                raise ValueError(f"checkpoint {key}: received {native[key]}, expected {value}")
        checkpoint.check(native["parameters"], self.shards, self.parameter_names)

        checkpoint.unpack(native["parameters"], self.shards, self.parameter_names)
        self.optimizer.steps = native["steps"]
        self.optimizer.clamp_squares = list(native["clamp_squares"])
        for group, values in zip(self.param_groups, base["param_groups"], strict=True):
            group.update(values)
        self._weights_from_masters()


class _Timed:
    """Runs one of DeepSpeed's timers, stopped on every way out."""

    def __init__(self, timers: Any, name: str) -> None:
        self._timer = timers(name)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.stop()


def _trained_parameters(
    optimizer: FP8AdamW, names: Mapping[Parameter, str]
) -> tuple[dict[int, Parameter], list[ParameterSpec]]:
    """The optimizer's parameters that require a gradient and are not empty, by global index."""
    indices = {parameter: index for index, parameter in enumerate(names)}
    parameters: dict[int, Parameter] = {}
    specs: list[ParameterSpec] = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad or not parameter.numel():
                continue
            if parameter not in indices:
                raise ValueError(
                    f"optimizer: received a parameter of shape {list(parameter.shape)} that is not in the "
                    "model, allowed: parameters of the model given to deepspeed.initialize"
                )
            index = indices[parameter]
            parameters[index] = parameter
            specs.append(ParameterSpec(index, parameter.numel(), number, parameter.dtype))
    if not specs:
        raise ValueError("optimizer: received no parameter that trains, allowed: at least one")
    return dict(sorted(parameters.items())), specs


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
