"""What a run writes: the optimizer file of a rank, and what the manifest says of all of them.

States are saved as the bytes they are, codes and scales, under parameter names and block ranges, so
that a resumed run goes on bit for bit and no framework casts a scale on the way. Beside them lies
the FP32 master view that DeepSpeed's `zero_to_fp32.py` reads: a bucket is saved as one group of its
parameters, each rank's piece without padding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.masters import load_masters
from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.reading import Entry
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.optimizer.hyperparameters import UNSUPPORTED_FLAGS, check_group
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.states.shard import Shard

STATES = ("master", "exp_avg", "exp_avg_sq")
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# Where DeepSpeed's own handlers look for their version, and end with this in their error.
NOT_FOR_STOCK = (
    "states of ds_fp8: load them with ds_fp8 registered and its section in the config, convert them with "
    "`ds_fp8 to-universal`, or load only the weights (load_optimizer_states=False)"
)
Names = Mapping[int, str]  # global parameter index -> name in the module


@dataclass(frozen=True)
class Progress:
    """What a run goes on from, besides the states."""

    steps: int
    clamp_squares: list[float | None] | None  # a param group; None: the states are not ours
    loss_scaler: dict[str, int | float]
    param_groups: list[dict[str, Any]]  # hyperparameters
    autoscale: Mapping[str, float] = field(default_factory=dict)  # mu by parameter name


class Restorable(Protocol):
    """A checkpoint: what it brings to shards, and what a run goes on from."""

    @property
    def progress(self) -> Progress: ...

    def restore(
        self, shards: Sequence[Shard], weights: Sequence[Tensor], names: Mapping[int, str]
    ) -> None: ...


def optimizer_state(shards: Sequence[Shard], names: Names, optimizer: FP8AdamW) -> dict[str, Any]:
    """DeepSpeed's "base_optimizer_state" with our native states in it, on the CPU."""
    return {
        "state": {},
        "fp8": {"format_version": manifest.FORMAT_VERSION, "parameters": pack(shards, names)},
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }


def pack(shards: Sequence[Shard], names: Names) -> dict[str, Any]:
    """Every piece of the shards as raw bytes: name -> blocks, codes and scales of each state.

    On a CPU they are views of the shards, saved without a copy.
    """
    packed: dict[str, Any] = {}
    for shard in shards:
        tensors = {
            key + suffix: tensor.cpu()
            for key in STATES
            for suffix, tensor in byte_tensors(getattr(shard.state, key)).items()
        }
        for piece in shard.pieces:
            packed[names[piece.slot.parameter]] = {
                "blocks": list(block_range(piece, shard.recipe.block_size)),
                **{key: tensor[piece.rows] for key, tensor in tensors.items()},
            }
    return packed


def byte_tensors(blocks: Blocks) -> dict[str, Tensor]:
    """The byte tensors of blocks by the suffix of their key."""
    codes = {"": blocks.codes.view(torch.uint8)}
    return codes if blocks.scales is None else {**codes, "_scales": blocks.scales}


def block_range(piece: Piece, block_size: int) -> tuple[int, int]:
    """First block of the parameter that the piece holds, and the one after its last."""
    first = piece.first_element // block_size
    return first, first + piece.blocks


def fp32_masters(shard: Shard, weights: Tensor) -> Tensor:
    """The shard's masters in FP32 without padding, [elements], on the CPU; weights: the rows it owns."""
    values = torch.empty(sum(piece.numel for piece in shard.pieces), dtype=torch.float32)
    first = 0
    for piece in shard.pieces:
        load_masters(shard.state.master[piece.rows], weights[piece.rows], values[first : first + piece.numel])
        first += piece.numel
    return values


# For the manifest


def recipe_facts(recipe: Recipe) -> manifest.Recipe:
    """The formats that a checkpoint shares with the run that reads it."""
    return manifest.Recipe(
        block_size=recipe.block_size,
        master=recipe.master.name,
        exp_avg=recipe.exp_avg.name,
        exp_avg_sq=recipe.exp_avg_sq.name,
        seed=recipe.seed,
        scaling="tensor" if recipe.by_tensor else "block",
    )


def parameter_facts(
    buckets: Sequence[Bucket], parameters: Mapping[int, Parameter], names: Names
) -> dict[str, manifest.Parameter]:
    """Every trained parameter and its owners, in the model's order."""
    owners: dict[int, list[tuple[int, int, int]]] = {index: [] for index in parameters}
    groups: dict[int, int] = {}
    for bucket in buckets:
        for rank in range(bucket.world_size):
            for piece in bucket.pieces(rank):
                owners[piece.slot.parameter].append((rank, *block_range(piece, bucket.block_size)))
                groups[piece.slot.parameter] = bucket.group
    return {
        names[index]: manifest.Parameter(
            shape=list(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            group=groups[index],
            blocks=owners[index],
        )
        for index, parameter in parameters.items()
    }


def progress_facts(optimizer: FP8AdamW, loss_scaler: Any) -> dict[str, Any]:
    """Counters and scalars, as the manifest holds them."""
    squares: list[float | Literal["off"] | None] = [
        "off" if square == math.inf else square for square in optimizer.clamp_squares
    ]
    return {
        "steps": optimizer.steps,
        "clamp_squares": squares,
        "loss_scaler": {key: each for key, each in vars(loss_scaler).items() if key in LOSS_SCALER_STATE},
    }


def take_progress(progress: Progress, optimizer: FP8AdamW, loss_scaler: Any) -> None:
    """Go on from a checkpoint's counters and hyperparameters."""
    optimizer.steps = progress.steps
    if progress.clamp_squares is None:
        optimizer.drop_clamp("the optimizer states are not from ds_fp8")
    else:
        optimizer.clamp_squares = list(progress.clamp_squares)
    vars(loss_scaler).update(progress.loss_scaler)
    for group, values in zip(optimizer.param_groups, progress.param_groups, strict=True):
        group.update(values)


def check_hyperparameters(group: Entry) -> None:
    """Refuse, by a ValueError, a saved param group that a run cannot go on from."""
    for key in ("lr", "eps", "weight_decay", *(["initial_lr"] if "initial_lr" in group else [])):
        group.at(key).number()
    for beta in group.at("betas").each(2):
        beta.number()
    if "bias_correction" in group:
        group.at("bias_correction").of(bool)
    try:
        check_group(group.value | dict.fromkeys(UNSUPPORTED_FLAGS))
    except ValueError as error:
        raise ValueError(f"{group.path}: {group.where}: {error}") from None
