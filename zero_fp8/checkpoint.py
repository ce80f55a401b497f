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
from ds_fp8.ops.blocks import Blocks, dequantize
from ds_fp8.zero_fp8.optimizer import Recipe, Shard
from ds_fp8.zero_fp8.partition import Piece

FORMAT_VERSION = 1
Names = Mapping[int, str]  # global parameter index -> name in the module


def _state_blocks(state: AdamState) -> dict[str, Blocks]:
    return {"master": state.master, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}


def _block_range(piece: Piece, block_size: int) -> list[int]:
    """First block of the parameter that the piece holds, and the one after its last."""
    first = piece.first_element // block_size
    return [first, first + piece.blocks]


def recipe_entry(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint must share with the run that reads it."""
    return {
        "block_size": recipe.block_size,
        "master": recipe.master.name,
        "exp_avg": recipe.exp_avg.name,
        "exp_avg_sq": recipe.exp_avg_sq.name,
        "seed": recipe.seed,
    }


def pack(shards: Sequence[Shard], names: Names) -> dict[str, Any]:
    """Every piece of the shards as raw bytes: name -> blocks, codes and scales of each state."""
    packed: dict[str, Any] = {}
    for shard in shards:
        for piece in shard.pieces:
            entry: dict[str, Any] = {"blocks": _block_range(piece, shard.recipe.block_size)}
            for key, blocks in _state_blocks(shard.state).items():
                for suffix, tensor in _tensors(blocks[piece.rows]).items():
                    entry[key + suffix] = tensor.clone()
            packed[names[piece.slot.parameter]] = entry
    return packed


def check(packed: Mapping[str, Any], shards: Sequence[Shard], names: Names) -> None:
    """Refuse, before anything is written, a checkpoint that does not fit the shards."""
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


def fp32_masters(shard: Shard) -> Tensor:
    """The shard's masters in FP32 without padding, [elements], on the CPU."""
    pieces = []
    for piece in shard.pieces:
        values = torch.empty(piece.numel, dtype=torch.float32, device=shard.state.master.codes.device)
        dequantize(shard.state.master[piece.rows], values)
        pieces.append(values.cpu())
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float32)
