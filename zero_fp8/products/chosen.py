"""Choose the matrices of a run that become FP8, and how they are multiplied, once, when an engine is made.

The device decides how: FP8 products by cuBLAS if it supports them, else products of weights decoded to BF16
one at a time, which save memory but not time. DS_FP8_PRODUCTS overrides it: `emulated` computes the results
of the FP8 products, slowly, on any device.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter

from ds_fp8.config.refusals import naming, refusal
from ds_fp8.config.section import LEVELS, SECTION, FP8Config
from ds_fp8.ops import cublas, product_backend
from ds_fp8.zero_fp8.products.choice import eligible
from ds_fp8.zero_fp8.products.kernels import Kernels
from ds_fp8.zero_fp8.products.ways import Way, way_of

VARIABLE = "DS_FP8_PRODUCTS"
WAYS = ("cublas", "emulated", "decoded")


@dataclass(frozen=True)
class Choice:
    """The matrices of a run."""

    parameters: Sequence[Parameter]  # trained parameters that become codes
    frozen: Sequence[Parameter]  # frozen parameters that become codes
    reasons: Mapping[str, str]  # why each other matrix stays, by name
    kernels: Kernels
    way: Way
    instead: str | None  # why products are not in FP8


def choose(model: nn.Module, config: FP8Config, device: torch.device) -> Choice:
    """Choose the matrices of a run whose section asks for FP8 weights.

    Raises ValueError if no matrix is eligible, or if a requested feature is not available.
    """
    section = config.weights
    found, reasons = eligible(
        model,
        min_elements=section.min_elements,
        exclude=section.exclude,
        trained=config.states.weights is not None,
        frozen=section.frozen == "e4m3",
    )
    chosen = [each.parameter for each in found]
    frozen = [each for each in chosen if not each.requires_grad]
    if not found:
        raise config.refusal_of_weights(f"for this model: {_nothing(config, reasons)}")
    if section.frozen == "e4m3" and not frozen:
        allowed = "bf16, or the key left out, for this model: no frozen matrix is eligible"
        raise refusal(f"{SECTION}.weights.frozen", section.frozen, allowed)
    name, instead = _way(config, device)
    functions, multiply = product_backend.by_way(name, product_backend.choose(device))
    kernels = Kernels.of(f"{functions.name} {name}", functions, multiply)
    way = way_of(name, kernels)
    trained = [each for each in chosen if each.requires_grad]
    return Choice(trained, frozen, reasons, kernels, way, instead)


def _nothing(config: FP8Config, reasons: Mapping[str, str]) -> str:
    """Explain why no matrix is eligible."""
    told = naming([f"{name}: {reason}" for name, reason in reasons.items()]) or "it has no matrix"
    size = f"{SECTION}.weights.min_elements is {config.weights.min_elements:,}"
    frozen = "frozen" in reasons.values()
    base = f'; {SECTION}.weights.frozen "e4m3" is for those that are frozen, as a LoRA base' if frozen else ""
    value = config.weights_key[1]
    asked = value if value in LEVELS else "FP8 weights"
    return f"{asked} would do nothing ({told}; {size}{base})"


def _way(config: FP8Config, device: torch.device) -> tuple[str, str | None]:
    """Return the name of the way, and the reason if the device has no FP8 products."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in WAYS:
        raise ValueError(f"{VARIABLE}: received {wanted!r}, allowed: {', '.join(WAYS)}")
    obstacle = cublas.obstacle(device)
    if wanted == "cublas" and obstacle is not None:
        raise ValueError(f"{VARIABLE}: received {wanted!r}, which cannot run on {device}: {obstacle}")
    if wanted is not None:
        return wanted, None
    if config.products.dtype == "bf16":
        return "decoded", None
    if obstacle is None:
        return "cublas", None
    if config.products.dtype == "e4m3":
        raise refusal(
            f"{SECTION}.products.dtype", "e4m3", f"bf16, or the key left out, on {device}: {obstacle}"
        )
    return "decoded", obstacle
