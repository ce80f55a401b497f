"""FP8 weights as transformers, vLLM and SGLang read them: Hugging Face's fine-grained FP8 layout.

X.weight            [N, K] float8_e4m3fn, the codes
X.weight_scale_inv  [tiles(N), tiles(K)] float32, by which the codes of a tile of 128 x 128 are multiplied
config.json         has a "quantization_config", which also names the modules that stay as they are

Codes are made of masters here as training makes them: rounded to BF16 first, one power of two per tile. So
what is served multiplies the very codes that training multiplied.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_fp8.ops.blocks import chunks, power_of_two
from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.masters import write_weights
from ds_fp8.ops.products import TILE, encode_weight, find_exponents, tiles
from ds_fp8.zero_fp8.checkpoint.whole.merged import Whole

SCALES = "_scale_inv"  # after the name of a weight
LINEAR = "Linear"  # the class of which the layout has weights


def matrices(checkpoint: Whole) -> set[str]:
    """Weights that the layout can hold. Raises ValueError if there are none."""
    found = {name for name, each in checkpoint.parameters.items() if each.codes_of == LINEAR}
    if not found:
        kinds = {each.codes_of for each in checkpoint.parameters.values()} - {None}
        received = f"FP8 weights of {', '.join(sorted(map(str, kinds)))}" if kinds else "no FP8 weights"
        raise ValueError(
            f"{checkpoint.folder}: received {received}, allowed with --fp8: FP8 weights of nn.Linear, as O3 "
            "has; without --fp8 any weights are exported"
        )
    return found


def encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix of masters, [N, K] float32."""
    rows, columns = values.shape
    weight = torch.empty(values.shape, dtype=torch.bfloat16)
    write_weights(values, weight)
    exponents = torch.zeros(tiles(rows), tiles(columns), dtype=torch.uint8)
    codes = torch.empty(values.shape, dtype=E4M3.dtype)
    flat, flat_codes = weight.view(-1), codes.view(-1)
    for part in chunks(len(flat), 1):
        find_exponents(flat[part], part.start, columns, exponents)
    for part in chunks(len(flat), 1):
        encode_weight(flat[part], part.start, columns, exponents, flat_codes[part])
    return codes, power_of_two(exponents)


def quantization_config(checkpoint: Whole) -> dict[str, Any]:
    """The "quantization_config" for config.json."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [TILE, TILE],
        "modules_to_not_convert": sorted(_others(checkpoint)),
    }


def _others(checkpoint: Whole) -> Iterator[str]:
    """Modules whose weight is another matrix."""
    encoded = matrices(checkpoint)
    for name in checkpoint.module:
        module, _, attribute = name.rpartition(".")
        if module and attribute == "weight" and name not in encoded and len(_shape(checkpoint, name)) == 2:
            yield module


def _shape(checkpoint: Whole, name: str) -> list[int]:
    if name in checkpoint.parameters:
        return checkpoint.parameters[name].shape
    return list(checkpoint.model_files.shape(name)) if name in checkpoint.model_files else []
