"""The shard to and from disk.

States are saved as the bytes they are, codes and scales, under parameter names and block ranges, so
that a resumed run goes on bit for bit and no framework casts a scale on the way. Beside them lies
the FP32 master view that DeepSpeed's `zero_to_fp32.py` reads: a bucket is saved as one group of its
parameters, each rank's piece without padding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.masters import load_masters
from ds_fp8.zero_fp8.optimizer import FP8AdamW
from ds_fp8.zero_fp8.partition import Piece
from ds_fp8.zero_fp8.recipe import Recipe
from ds_fp8.zero_fp8.shard import Shard

FORMAT_VERSION = 1
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
Names = Mapping[int, str]  # global parameter index -> name in the module
Groups = Sequence[Sequence[str]]  # names of each param group's parameters


def _state_blocks(state: AdamState) -> dict[str, Blocks]:
    return {"master": state.master, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}


def _block_range(piece: Piece, block_size: int) -> list[int]:
    """First block of the parameter that the piece holds, and the one after its last."""
    first = piece.first_element // block_size
    return [first, first + piece.blocks]


def save(
    shards: Sequence[Shard], names: Names, groups: Groups, optimizer: FP8AdamW, loss_scaler: Any
) -> dict[str, Any]:
    """DeepSpeed's "base_optimizer_state" with our native states in it, on the CPU."""
    return {
        "state": {},
        "fp8": {
            **_identity(shards[0].recipe, groups),
            "steps": optimizer.steps,
            "clamp_squares": list(optimizer.clamp_squares),
            "loss_scaler": {key: each for key, each in vars(loss_scaler).items() if key in LOSS_SCALER_STATE},
            "parameters": pack(shards, names),
        },
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }


def check(saved: Any, shards: Sequence[Shard], names: Names, groups: Groups) -> None:
    """Refuse, by a ValueError, what `save` did not write for these shards."""
    native = saved.get("fp8") if isinstance(saved, dict) else None
    if native is None:
        raise ValueError(
            'checkpoint: received optimizer states that were not written with "fp8" enabled; load them '
            "without this section, or only the weights (load_optimizer_states=False)"
        )
    for key, value in _identity(shards[0].recipe, groups).items():
        if native.get(key) != value:
            raise ValueError(f"checkpoint {key}: received {native.get(key)}, expected {value}")
    _check_pieces(native["parameters"], shards, names)


def restore(saved: Any, shards: Sequence[Shard], names: Names, optimizer: FP8AdamW, loss_scaler: Any) -> None:
    """Take over a checked checkpoint."""
    native = saved["fp8"]
    unpack(native["parameters"], shards, names)
    optimizer.steps = native["steps"]
    optimizer.clamp_squares = list(native["clamp_squares"])
    vars(loss_scaler).update(native["loss_scaler"])
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update(values)


def _identity(recipe: Recipe, groups: Groups) -> dict[str, Any]:
    """What a checkpoint must share with the run that reads it."""
    return {
        "format_version": FORMAT_VERSION,
        "recipe": {
            "block_size": recipe.block_size,
            "master": recipe.master.name,
            "exp_avg": recipe.exp_avg.name,
            "exp_avg_sq": recipe.exp_avg_sq.name,
            "seed": recipe.seed,
        },
        "groups": [list(names) for names in groups],
    }


def pack(shards: Sequence[Shard], names: Names) -> dict[str, Any]:
    """Every piece of the shards as raw bytes: name -> blocks, codes and scales of each state."""
    packed: dict[str, Any] = {}
    for shard in shards:
        for piece in shard.pieces:
            entry: dict[str, Any] = {"blocks": _block_range(piece, shard.recipe.block_size)}
            for key, blocks in _state_blocks(shard.state).items():
                for suffix, tensor in _tensors(blocks[piece.rows]).items():
                    entry[key + suffix] = tensor.to("cpu", copy=True)
            packed[names[piece.slot.parameter]] = entry
    return packed


def _check_pieces(packed: Mapping[str, Any], shards: Sequence[Shard], names: Names) -> None:
    """Refuse other parameters, blocks or shapes than those of the shards."""
    expected = {names[piece.slot.parameter]: (shard, piece) for shard in shards for piece in shard.pieces}
    missing, extra = sorted(expected.keys() - packed.keys()), sorted(packed.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            "checkpoint holds other parameters than this rank's shard: "
            f"missing {missing[:3]}, not expected {extra[:3]} (of {len(missing)} and {len(extra)})"
        )
    for name, (shard, piece) in expected.items():
        entry, blocks = packed[name], _block_range(piece, shard.recipe.block_size)
        if entry["blocks"] != blocks:
            raise ValueError(f"checkpoint of {name}: received blocks {entry['blocks']}, expected {blocks}")
        for key, each in _state_blocks(shard.state).items():
            for suffix, tensor in _tensors(each[piece.rows]).items():
                saved = entry.get(key + suffix)
                if saved is None or saved.shape != tensor.shape:
                    received = None if saved is None else list(saved.shape)
                    raise ValueError(
                        f"checkpoint of {name}, {key + suffix}: received shape {received}, "
                        f"expected {list(tensor.shape)}"
                    )


def _tensors(blocks: Blocks) -> dict[str, Tensor]:
    """The byte tensors of blocks by the suffix of their key."""
    codes = {"": blocks.codes.view(torch.uint8)}
    return codes if blocks.scales is None else {**codes, "_scales": blocks.scales}


def unpack(packed: Mapping[str, Any], shards: Sequence[Shard], names: Names) -> None:
    """Copy a checked checkpoint into the shards."""
    for shard in shards:
        for piece in shard.pieces:
            entry = packed[names[piece.slot.parameter]]
            for key, blocks in _state_blocks(shard.state).items():
                for suffix, tensor in _tensors(blocks[piece.rows]).items():
                    tensor.copy_(entry[key + suffix])


def fp32_masters(shard: Shard, weights: Tensor) -> Tensor:
    """The shard's masters in FP32 without padding, [elements], on the CPU; weights: of the same rows."""
    pieces = []
    for piece in shard.pieces:
        values = torch.empty(piece.numel, dtype=torch.float32, device=shard.state.master.codes.device)
        load_masters(shard.state.master[piece.rows], weights[piece.rows], values)
        pieces.append(values.cpu())
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float32)
