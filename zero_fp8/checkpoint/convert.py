"""States of other formats, and of other programs, brought into shards through FP32.

Rounded to nearest, where they are rounded at all; `exp_avg_sq` never from non-zero to zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_fp8.ops.adam import AdamState
from ds_fp8.ops.blocks import chunks, padded
from ds_fp8.ops.formats import BY_NAME, FP32, SPLIT16, Format
from ds_fp8.ops.masters import encode_masters
from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.contracts import STATES, Names, Progress, Source, Values
from ds_fp8.zero_fp8.states.shard import Shard


@dataclass(frozen=True)
class Converted:
    """A checkpoint whose values are rounded into the shards' formats."""

    source: Source

    @property
    def progress(self) -> Progress:
        return self.source.progress

    def restore(self, shards: Sequence[Shard], weights: Sequence[Tensor], names: Names) -> None:
        """Round the values into states, and masters into the weights' rows that the shards own."""
        for shard, own in zip(shards, weights, strict=True):
            size = shard.block_size
            for piece in shard.pieces:
                for part in chunks(piece.blocks, size):
                    first = piece.first_element + part.start * size
                    stop = min(first + (part.stop - part.start) * size, piece.elements.stop)
                    values = self.source.values(names[piece.slot.parameter], slice(first, stop))
                    rows = slice(piece.first_row + part.start, piece.first_row + part.stop)
                    with shard.lend(rows) as state:
                        _write(values, state, own[rows])


def _write(values: Values, state: AdamState, weights: Tensor) -> None:
    """Round a chunk into rows, zeros after its end."""

    def rows(vector: Tensor) -> Tensor:
        codes = state.master.codes
        return padded(vector.to(codes.device), *codes.shape)

    encode_masters(rows(values.master), state.master, weights)
    state.set_first_moment(rows(values.exp_avg), rows(values.root))
    state.set_second_moment(rows(values.exp_avg_sq), rows(values.root))


def rounded(saved: manifest.Recipe | None, wanted: manifest.Recipe) -> list[str]:
    """The states that a conversion rounds; saved: None for FP32 states."""
    same_scaling = saved is not None and saved.scaling == wanted.scaling
    same_blocks = saved is not None and saved.block_size == wanted.block_size

    def exact(source: Format, target: Format) -> bool:
        if target in (FP32, SPLIT16):
            return True
        return source is target and same_scaling and (same_blocks or not target.scaled)

    formats = {
        key: (BY_NAME[getattr(saved, key)] if saved else FP32, BY_NAME[getattr(wanted, key)])
        for key in STATES
    }
    return [key for key, (source, target) in formats.items() if not exact(source, target)]


def describe(saved: manifest.Recipe | None, wanted: manifest.Recipe) -> str:
    """One line: what was converted, and what of it was rounded."""
    changes = manifest.describe_difference(saved, wanted) if saved else ["FP32 states of DeepSpeed"]
    return (
        f"checkpoint converted through FP32 ({', '.join(changes)}); rounded: "
        f"{', '.join(rounded(saved, wanted)) or 'nothing'}"
    )
