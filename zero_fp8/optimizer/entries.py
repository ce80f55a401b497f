"""Entries: what `optimizer.state[parameter]` of FP8AdamW without DeepSpeed is, a dict of bytes and numbers.

`torch.save`, `torch.distributed.checkpoint` and every checkpointing library keep such a dict as it is: codes
and scales are bytes, the rest are numbers. Blocks are views of those bytes. An entry says which parameter it
was made for, since a user may resize, recast or move one between two steps, and may load entries of another
run.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_fp8.config.refusals import cut
from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import Blocks
from ds_fp8.zero_fp8.plain_tensors import flaw_of
from ds_fp8.zero_fp8.recipe import Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # an entry holds the place here of its weight's
BEFORE = {"draws": "independent"}  # of entries that do not say
ADVICE = "a new FP8AdamW, or this parameter's entry deleted from optimizer.state, begins anew"


class Entries:
    """Makes, checks, copies and reads entries of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._formats = {"master": recipe.master, "exp_avg": recipe.exp_avg, "exp_avg_sq": recipe.exp_avg_sq}
        self._keys = {"step", "clamp_square", "made_for", *self._formats}
        self._keys |= {f"{key}_scales" for key, fmt in self._formats.items() if fmt.scaled}

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to continue with the other's entries."""
        names, rounding = {key: fmt.name for key, fmt in self._formats.items()}, self._recipe.rounding
        return {
            **names,
            "block_size": self._recipe.block_size,
            "seed": rounding.seed,
            "draws": rounding.draws,
        }

    def make(self, parameter: Tensor) -> dict[str, Any]:
        """The entry of a parameter before its first step: zeros, and a master that the first sweep fills."""
        entry: dict[str, Any] = {"step": 0, "clamp_square": 0.0, "made_for": _description(parameter)}
        blocks = self._blocks_of(parameter)
        for key, fmt in self._formats.items():
            zeros = Blocks.zeros(blocks, self._recipe.block_size, fmt, parameter.device)
            entry[key] = zeros.codes.view(torch.uint8).view(-1)
            if zeros.scales is not None:
                entry[f"{key}_scales"] = zeros.scales
        return entry

    def state_of(self, entry: dict[str, Any]) -> AdamState:
        """An entry's bytes seen as blocks."""
        exp_avg, exp_avg_sq = self._view(entry, "exp_avg"), self._view(entry, "exp_avg_sq")
        return AdamState(self.master_of(entry), exp_avg, exp_avg_sq)

    def master_of(self, entry: dict[str, Any]) -> Blocks:
        return self._view(entry, "master")

    def _view(self, entry: dict[str, Any], key: str) -> Blocks:
        fmt = self._formats[key]
        codes = entry[key].view(fmt.dtype).view(-1, self._recipe.block_size)
        return Blocks(codes, entry.get(f"{key}_scales"), fmt)

    def check(self, name: str, entry: dict[str, Any], parameter: Tensor) -> None:
        """Refuse, by a ValueError, an entry that is damaged or was made for another parameter."""
        self._check_numbers(name, entry)
        received, expected = entry["made_for"], _description(parameter)
        if received != expected:
            raise ValueError(
                f"{name}: received a parameter of {_words(expected)}, allowed: {_words(received)}, "
                f"which its state was made for ({ADVICE})"
            )
        self._check_bytes(name, entry, parameter, parameter.device)

    def copy_of(self, name: str, saved: Any, parameter: Tensor) -> dict[str, Any]:
        """A copy of a saved entry, beside the parameter. Raises ValueError for one of another shape."""
        if not isinstance(saved, dict):
            raise ValueError(f"{name}: received {type(saved).__name__}, allowed: a dict")
        self._check_numbers(name, saved)
        received, expected = _shape(saved["made_for"]), list(parameter.shape)
        if received != expected:
            raise ValueError(f"{name}: received shape {received}, expected {expected}")
        self._check_bytes(name, saved, parameter)
        copied = {
            key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
            for key, value in saved.items()
        }
        return {**copied, "made_for": _description(parameter)}

    def check_identity(self, received: Any) -> None:
        """Refuse entries of other formats, by a ValueError."""
        for key, expected in self.identity.items():
            value = received.get(key, BEFORE.get(key)) if isinstance(received, dict) else None
            if value != expected:
                raise ValueError(f"state_dict fp8.{key}: received {cut(repr(value))}, expected {expected!r}")

    def _check_numbers(self, name: str, entry: dict[str, Any]) -> None:
        if entry.keys() != self._keys:
            raise ValueError(f"{name}: received states {sorted(entry)}, expected {sorted(self._keys)}")
        step, square = entry["step"], entry["clamp_square"]
        if type(step) is not int or step < 0:
            raise ValueError(f"{name}: received step {step!r}, allowed: an integer from 0 on")
        if not isinstance(square, int | float) or not square >= 0:
            raise ValueError(f"{name}: received clamp_square {square!r}, allowed: a number from 0 on")

    def _check_bytes(
        self, name: str, entry: dict[str, Any], parameter: Tensor, device: torch.device | None = None
    ) -> None:
        """Refuse bytes that are missing or of the wrong number. device: where they must be, if given."""
        for key, count in self._byte_counts(parameter):
            value = entry[key]
            flaw = flaw_of(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            if flaw is not None:
                raise ValueError(f"{name}: received {flaw} as {key}, allowed: a dense tensor of this process")
            _check_layout(name, key, value, count)
            if device is not None and value.device != device:
                raise ValueError(
                    f"{name}: received a parameter on {device}, allowed: {value.device}, where its {key} is"
                )

    def _byte_counts(self, parameter: Tensor) -> Iterator[tuple[str, int]]:
        """The bytes of a parameter's entry, by key."""
        blocks = self._blocks_of(parameter)
        for key, fmt in self._formats.items():
            yield key, blocks * self._recipe.block_size * fmt.itemsize
            if fmt.scaled:
                yield f"{key}_scales", blocks

    def _blocks_of(self, parameter: Tensor) -> int:
        return -(-parameter.numel() // self._recipe.block_size)


def _check_layout(name: str, key: str, value: Tensor, count: int) -> None:
    """Kernels view these bytes as codes of up to 4 bytes."""
    in_place = value.is_contiguous() and value.storage_offset() % 4 == 0
    if value.dtype is not torch.uint8 or value.shape != (count,) or not in_place:
        raise ValueError(
            f"{name}: received bytes {list(value.shape)} of {value.dtype} in steps of {value.stride()} "
            f"from {value.storage_offset()} on as {key}, expected [{count}] of torch.uint8 in "
            "steps of 1 from a multiple of 4 on"
        )


# What an entry was made for is kept in integers: a flattened `torch.distributed.checkpoint` state dict takes
# tensors and numbers, also in dicts, and neither lists nor text.


def _description(parameter: Tensor) -> dict[str, int]:
    sizes = {f"dim{number}": size for number, size in enumerate(parameter.shape)}
    return {"dtype": DTYPES.index(parameter.dtype), **sizes}


def _shape(described: Any) -> list[Any] | None:
    """The shape in a description; None if it is not one."""
    if not isinstance(described, dict) or described.get("dtype") not in range(len(DTYPES)):
        return None
    return [described.get(f"dim{number}") for number in range(len(described) - 1)]


def _words(described: Any) -> str:
    shape = _shape(described)
    return repr(described) if shape is None else f"{DTYPES[described['dtype']]} and shape {shape}"
