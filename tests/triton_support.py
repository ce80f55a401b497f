"""What the tests of the Triton kernels share: the two ways to convert FP8, and the device.

DEVICE is a GPU, or the CPU where Triton interprets the kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from kernel_support import Kernels
from triton.runtime import interpreter

from ds_fp8.ops.backend import triton_backend
from ds_fp8.ops.formats import Format
from ds_fp8.ops.triton import adam as adam_triton
from ds_fp8.ops.triton import blocks as blocks_triton
from ds_fp8.ops.triton import reduction as reduction_triton
from ds_fp8.ops.triton import tiles as tiles_triton
from ds_fp8.ops.triton.launching import INTERPRETED
from ds_fp8.ops.triton.products import casts as casts_triton
from ds_fp8.ops.triton.products import weights as weights_triton

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TRITON = Kernels(triton_backend(), DEVICE)
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

CONVERSIONS = (False, True) if INTERPRETED or tiles_triton.hardware_fp8(DEVICE) else (False,)


def each_conversion(*formats: Format) -> pytest.MarkDecorator:
    """A test for every format, FP8 converted either way."""
    pairs = [
        (fmt, hardware) for fmt in formats for hardware in CONVERSIONS if fmt.itemsize == 1 or not hardware
    ]
    ids = [f"{fmt.name}-hardware" if hardware else fmt.name for fmt, hardware in pairs]
    return pytest.mark.parametrize(("fmt", "hardware"), pairs, ids=ids)


interpreted_cast = interpreter._convert_float


def exact_cast(data: Any, source: tl.dtype, target: tl.dtype, rounding: Any) -> Any:
    """The interpreter's cast, but torch's to and from FP8.

    Its own (Triton 3.6 to 3.9) is wrong: it adds the rounding bit to the mantissa and lets no carry reach
    the exponent, so that 1.96 becomes 1.0 in E4M3 where a GPU gives 2.0; and it knows neither ties nor NaN.
    """
    flat = torch.from_numpy(np.array(data).reshape(-1))
    if target in FP8 and source == tl.float32:
        result = flat.to(FP8[target]).view(torch.uint8)
    elif source in FP8 and target == tl.float32:
        result = flat.view(FP8[source]).to(torch.float32)
    else:
        assert source not in FP8
        assert target not in FP8
        return interpreted_cast(data, source, target, rounding)
    return result.numpy().reshape(np.shape(data))


@contextmanager
def conversion(hardware: bool) -> Iterator[None]:
    """FP8 is converted by the hardware, as from sm_89 on, or by integers, as before."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        for module in (blocks_triton, reduction_triton, adam_triton, casts_triton, weights_triton):
            patch.setattr(module, "hardware_fp8", lambda device: hardware)
        patch.setattr(interpreter, "_convert_float", exact_cast)
        yield
