"""ds_fp8: FP8 gradients, FP8 communication and FP8 Adam states for DeepSpeed ZeRO (arXiv 2310.18313).

Importing this package imports neither torch nor deepspeed and changes nothing; `register()` makes
DeepSpeed read the "fp8" section of its config.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_fp8.config.section import FP8Config
    from ds_fp8.estimate.deepspeed_names import (
        estimate_zero1_model_states_mem_needs_all_cold,
        estimate_zero1_model_states_mem_needs_all_live,
        estimate_zero2_model_states_mem_needs_all_cold,
        estimate_zero2_model_states_mem_needs_all_live,
        estimate_zero3_model_states_mem_needs_all_cold,
        estimate_zero3_model_states_mem_needs_all_live,
    )
    from ds_fp8.seam.registration import register, unregister
    from ds_fp8.seam.status import describe, is_active, stats
    from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW

__version__ = "0.1.0"
__all__ = [
    "FP8AdamW",
    "FP8Config",
    "describe",
    "estimate_zero1_model_states_mem_needs_all_cold",
    "estimate_zero1_model_states_mem_needs_all_live",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "is_active",
    "register",
    "stats",
    "unregister",
]

_HOMES = {
    "FP8AdamW": "ds_fp8.zero_fp8.optimizer.fp8_adamw",
    "FP8Config": "ds_fp8.config.section",
    "describe": "ds_fp8.seam.status",
    "estimate_zero1_model_states_mem_needs_all_cold": "ds_fp8.estimate.deepspeed_names",
    "estimate_zero1_model_states_mem_needs_all_live": "ds_fp8.estimate.deepspeed_names",
    "estimate_zero2_model_states_mem_needs_all_cold": "ds_fp8.estimate.deepspeed_names",
    "estimate_zero2_model_states_mem_needs_all_live": "ds_fp8.estimate.deepspeed_names",
    "estimate_zero3_model_states_mem_needs_all_cold": "ds_fp8.estimate.deepspeed_names",
    "estimate_zero3_model_states_mem_needs_all_live": "ds_fp8.estimate.deepspeed_names",
    "is_active": "ds_fp8.seam.status",
    "stats": "ds_fp8.seam.status",
    "register": "ds_fp8.seam.registration",
    "unregister": "ds_fp8.seam.registration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ds_fp8' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
