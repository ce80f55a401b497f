"""Scales of tiles on a GPU, as cuBLAS reads them: groups of four along the inner dimension, padded with 1."""

import triton
import triton.language as tl

from ds_fp8.ops import products

GROUP = tl.constexpr(products.GROUP)


@triton.jit
def store_tile_scale(stored, scales, row, column, columns, groups):
    """That of a tile; scales: [tiles, groups], of whose rows the last of so many columns pads the end."""
    end = tl.where(column == columns - 1, groups, column + 1)
    place = tl.arange(0, GROUP)
    scales += row.to(tl.int64) * groups + column
    tl.store(scales + place, tl.where(place == 0, stored, 1.0), mask=column + place < end)
