"""One FP8 weight, in buffers that another object owns.

The owner writes the codes and then calls `rewritten`. All other code only reads: values for readers of the
weight, operands for products. Under ZeRO 3 a fetch brings the codes and a release frees them; exponents stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_fp8.zero_fp8.product_health import ProductCounts
from ds_fp8.zero_fp8.products.kernels import REFERENCE, Kernels, decode


@dataclass(eq=False)
class Matrix:
    """A weight as it is stored: [N, K] of a Linear, [K, N] of Hugging Face's Conv1D."""

    name: str
    codes: Tensor  # [rows, columns] float8_e4m3fn
    exponents: Tensor  # [tiles(rows), tiles(columns)] uint8
    kernels: Kernels = field(default=REFERENCE, repr=False)
    generation: int = 0  # number of times that the codes were rewritten
    travels: bool = False  # codes are fetched and released
    is_here: bool = True  # if false, `codes` has a shape only
    writer: Callable[[Tensor], None] | None = None  # takes a `copy_` of a whole weight, as in load_state_dict
    on_state_dict: Callable[[], None] | None = None  # called when a state_dict takes the values
    decodes: int = 0  # number of times that values were read
    was_multiplied: bool = False  # outside graphs
    was_named: bool = False  # as a weight that training decodes
    counts: ProductCounts | None = None  # on a measured step

    def rewritten(self) -> None:
        """Mark the codes as new: a backward whose forward had the old ones fails.

        Compiled graphs check the version counter, which kernels and collectives do not increase.
        """
        self.generation += 1
        if self.is_here:
            torch.autograd.graph.increment_version(self.codes)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory, if its owner frees it, until the work now queued on the stream has run."""
        codes = (self.codes,) if self.is_here else ()
        for each in (*codes, self.exponents):
            each.record_stream(stream)

    def values(self, codes: Tensor | None = None) -> Tensor:
        """Decode to [rows, columns] bfloat16; codes: those of a graph, if it saved them."""
        return decode(self.kernels, self.codes if codes is None else codes, self.exponents)

    def store(self, values: Tensor) -> None:
        """Encode values of the whole weight, [rows, columns]."""
        flat = values.detach().to(self.codes.device, torch.bfloat16).reshape(-1)
        columns = self.codes.shape[1]
        self.exponents.zero_()
        self.kernels.find_exponents(flat, 0, columns, self.exponents)
        self.kernels.encode_weight(flat, 0, columns, self.exponents, self.codes.view(-1))
        self.rewritten()
