"""One scale per tensor: `ops.blocks`, `ops.reduction` and `ops.adam` with a whole tensor as the block.

That is FP8-LM as published (arXiv 2310.18313 section 2.2): the largest value of a tensor decides the scale of
all of it, and the second moment itself is stored, rounded to nearest. In memory a tensor is rows of the block
size as elsewhere, each with a copy of the tensor's scale: code that only reads needs no second version, and
the copies are less than a hundredth of the bytes. Writing needs the largest value before the first code: two
sweeps in the kernels, one in this reference, whose temporaries are as long as the tensor.

Every function takes the rows of one tensor, except `adam_step`: its plan names the tensors of a shard.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_fp8.ops.adam import Sweep, store, update
from ds_fp8.ops.blocks import Blocks, decode, encode, encode_and_count, padded
from ds_fp8.ops.reduction import norm_parts


class OneBlock:
    """Rows as a single block inside a `with`; at its end the block's scale is copied to every row."""

    def __init__(self, rows: Blocks) -> None:
        scales = None if rows.scales is None else rows.scales.new_ones(1)
        self._rows, self.block = rows, Blocks(rows.codes.view(1, -1), scales, rows.format)

    def __enter__(self) -> Blocks:
        return self.block

    def __exit__(self, *_: object) -> None:
        if self._rows.scales is not None and self.block.scales is not None:
            self._rows.scales.copy_(self.block.scales.expand(len(self._rows)))


def quantize(values: Tensor, out: Blocks, counts: Tensor | None = None) -> None:
    """`ops.blocks.quantize` of a whole tensor; out: its rows."""
    with OneBlock(out) as one:
        encode_and_count(padded(values.to(torch.float32), 1, one.block_size), one, counts)


def accumulate(pieces: Sequence[Blocks], shard: Blocks, *, overwrite: bool) -> Tensor:
    """`ops.reduction.accumulate` of a tensor's rows."""
    total = decode(pieces[0])
    for piece in pieces[1:]:
        total = total + decode(piece)
    store_rows(total if overwrite else decode(shard) + total, shard)
    return norm_parts(shard)


def store_rows(values: Tensor, out: Blocks) -> None:
    """Round [rows, block size] float32 of a tensor to nearest."""
    with OneBlock(out) as one:
        encode(values.view(1, -1), one)


def adam_step(sweep: Sweep) -> None:
    """`ops.adam.adam_step`; each segment is a tensor."""
    if not sweep.control[1]:
        return
    for segment in sweep.plan:
        _step_tensor(sweep[segment.blocks], segment.parameter)


def _step_tensor(rows: Sweep, parameter: int) -> None:
    """The rows of a segment, which is one tensor."""
    values, state = update(rows).as_one_row(), rows.state
    with (
        OneBlock(state.master) as master,
        OneBlock(state.exp_avg) as exp_avg,
        OneBlock(state.exp_avg_sq) as exp_avg_sq,
    ):
        whole = replace(state, master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        one = replace(rows, state=whole, weights=rows.weights.view(1, -1))
        store(values, one, rows.noise(parameter, 0, values.p))
