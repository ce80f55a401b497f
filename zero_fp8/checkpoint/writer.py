"""Writes a rank's optimizer file, and describes the states for the manifest.

States are saved as the bytes they are, codes and scales, under parameter names and block ranges, so
that a resumed run goes on bit for bit and no framework casts a scale on the way. Beside them lies
the FP32 master view that DeepSpeed's `zero_to_fp32.py` reads: a bucket is saved as one group of its
parameters, each rank's piece without padding.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.masters import load_masters
from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.contracts import LOSS_SCALER_STATE, STATES, WEIGHT, Names
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.placement.even_slices import spans
from ds_fp8.zero_fp8.placement.parameters import cut_of, held_of, is_sharded, numel_of, shape_of
from ds_fp8.zero_fp8.placement.partition import Bucket, Piece
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.states.shard import Shard

PACKED_VERSION = 1  # of the states in an optimizer file
# Where DeepSpeed's own handlers look for their version, and end with this in their error.
NOT_FOR_STOCK = (
    "states of ds_fp8: load them with ds_fp8 registered and its section in the config, convert them with "
    "`ds_fp8 to-universal`, or load only the weights (load_optimizer_states=False)"
)


def optimizer_state(parameters: Mapping[str, Any], optimizer: FP8AdamW) -> dict[str, Any]:
    """DeepSpeed's "base_optimizer_state" with our states, as `pack` gives them, in it."""
    return {
        "state": {},
        "fp8": {"format_version": PACKED_VERSION, "parameters": dict(parameters)},
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }


def pack(shards: Sequence[Shard], names: Names) -> dict[str, Any]:
    """Every piece of the shards as raw bytes: name -> blocks, codes and scales of each state.

    Where states are in host memory they are views of the shards, saved without a copy: good until a step.
    """
    packed: dict[str, Any] = {}
    for shard in shards:
        lots = [(rows, _state_tensors(state)) for rows, state in shard.where_they_are()]
        for piece in shard.pieces:
            packed[names[piece.slot.parameter]] = {
                "blocks": list(block_range(piece, shard.block_size)),
                **_piece_of(piece, lots),
            }
    return packed


def _piece_of(piece: Piece, lots: Sequence[tuple[slice, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """A piece's rows of a shard's tensors, copied only where they are in two lots."""
    (rows, tensors), *more = lots
    if not more or piece.rows.stop <= rows.stop:
        return {key: tensor[piece.rows] for key, tensor in tensors.items()}
    starts = [max(piece.rows.start - each.start, 0) for each, _ in lots]
    stops = [max(piece.rows.stop - each.start, 0) for each, _ in lots]
    parts = [
        [held[key][first:stop] for (_, held), first, stop in zip(lots, starts, stops, strict=True)]
        for key in tensors
    ]
    return {key: torch.cat(each) for key, each in zip(tensors, parts, strict=True)}


def add_upper_halves(packed: dict[str, Any], shard: Shard, weights: Tensor, names: Names) -> None:
    """Beside split masters the BF16 weights of the rows, where no model file has them; as bytes."""
    for piece in shard.pieces:
        packed[names[piece.slot.parameter]][WEIGHT] = weights[piece.rows].view(torch.uint8).cpu()


def _state_tensors(state: AdamState) -> dict[str, Tensor]:
    return {
        key + suffix: tensor.cpu()
        for key in STATES
        for suffix, tensor in byte_tensors(getattr(state, key)).items()
    }


def byte_tensors(blocks: Blocks) -> dict[str, Tensor]:
    """The byte tensors of blocks by the suffix of their key."""
    codes = {"": blocks.codes.view(torch.uint8)}
    return codes if blocks.scales is None else {**codes, "_scales": blocks.scales}


def block_range(piece: Piece, block_size: int) -> tuple[int, int]:
    """First block of the parameter that the piece holds, and the one after its last."""
    first = piece.first_element // block_size
    return first, first + piece.blocks


def fp32_masters(shard: Shard, weights: Tensor) -> Tensor:
    """The shard's masters in FP32 without padding, [elements]; weights: the rows it owns."""
    numel = sum(piece.numel for piece in shard.pieces)
    values = torch.empty(numel, dtype=torch.float32, device=weights.device)
    first = 0
    for piece in shard.pieces:
        masters = values[first : first + piece.numel]
        for rows in shard.cut(piece.rows):
            with shard.lend(rows) as state:
                load_masters(state.master, weights[rows], masters)
            masters = masters[(rows.stop - rows.start) * shard.block_size :]
        first += piece.numel
    return values


# For the manifest


def describe_recipe(recipe: Recipe) -> manifest.Recipe:
    """The formats that a checkpoint shares with the run that reads it."""
    return manifest.Recipe(
        block_size=recipe.block_size,
        master=recipe.master.name,
        exp_avg=recipe.exp_avg.name,
        exp_avg_sq=recipe.exp_avg_sq.name,
        seed=recipe.rounding.seed,
        draws=recipe.rounding.draws,
        scaling="tensor" if recipe.by_tensor else "block",
    )


def describe_parameters(
    buckets: Sequence[Bucket], parameters: Mapping[int, Parameter], names: Names
) -> dict[str, manifest.Parameter]:
    """Every trained parameter, in the model's order; its blocks are in the files of their owners."""
    blocks: dict[int, list[tuple[int, int, int]]] = {index: [] for index in parameters}
    groups: dict[int, int] = {}
    for bucket in buckets:
        for rank in range(bucket.world_size):
            for piece in bucket.pieces(rank):
                blocks[piece.slot.parameter].append((rank, *block_range(piece, bucket.block_size)))
                groups[piece.slot.parameter] = bucket.group
    return {
        names[index]: manifest.Parameter(
            shape=list(shape_of(parameter)),
            dtype=str(parameter.dtype).removeprefix("torch."),
            group=groups[index],
            blocks=blocks[index],
        )
        for index, parameter in parameters.items()
    }


def with_users(
    module: Module, parameters: Mapping[str, manifest.Parameter], encoded: Collection[str]
) -> dict[str, manifest.Parameter]:
    """Described parameters, and who multiplies the codes of those that have some. encoded: their names."""
    users = {}
    for name in encoded:
        owner = module.get_submodule(name.rpartition(".")[0])
        users[name] = type(owner).__name__
    return {name: each.model_copy(update={"codes_of": users.get(name)}) for name, each in parameters.items()}


def describe_slices(module: Module, names: Collection[str], ranks: int) -> dict[str, manifest.Sliced]:
    """Which of the ranks' model files hold which elements of the named parameters, under ZeRO 3."""
    return {
        name: manifest.Sliced(
            shape=list(shape_of(each)), slices=spans(numel_of(each), held_of(each).numel(), ranks)
        )
        for name, each in module.named_parameters()
        if name in names
    }


def describe_cuts(module: Module) -> dict[str, int | None]:
    """Dimensions along which model-parallel ranks cut parameters, by every name; None if not known."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: cut_of(each) for name, each in named if is_sharded(each)}


def describe_clamp(optimizer: FP8AdamW) -> list[float | Literal["off"] | None]:
    """The clamp of each param group: JSON has no infinity."""
    return ["off" if square == math.inf else square for square in optimizer.clamp_squares]


def describe_loss_scaler(loss_scaler: Any) -> dict[str, int | float]:
    """The counters of a loss scaler of DeepSpeed's, and its scale."""
    return {key: value for key, value in vars(loss_scaler).items() if key in LOSS_SCALER_STATE}
