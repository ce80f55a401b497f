"""The recipes of precision.py, each an engine around a model.

#0 and #1 are stock DeepSpeed (ZeRO 1, torch's AdamW). #3 and #4 are simulated (simulated.py): ds_fp8 offers
neither. All others are ds_fp8 with BF16 weights, and O2's states unless the name says otherwise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
from simulated import MixedPrecision, RoundedAdamW
from torch import nn

from ds_fp8.ops.formats import E4M3

ADAMW = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
CLIPPING = 1.0
PEAK_RATE = 5e-4
FINE_RATE = 1e-5  # of fine-tuning
Build = Callable[[nn.Module, int], Any]  # called with the model and the batch size


def engine(model: nn.Module, batch: int, *, bf16: bool, fp8: dict[str, Any] | None = None) -> Any:
    """A DeepSpeed engine, with or without the "fp8" section."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "AdamW", "params": {"lr": PEAK_RATE, **ADAMW}},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
    }
    if fp8:
        config["fp8"] = {"enabled": True, **fp8}
    else:
        config["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed's own optimizer compiles for minutes
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def fp8(level: str, **optimizer: str) -> Build:
    return partial(engine, bf16=True, fp8={"opt_level": level, "optimizer": optimizer})


def simulated(**formats: Any) -> Build:
    def build(model: nn.Module, batch: int) -> MixedPrecision:
        model.to(deepspeed.get_accelerator().current_device_name())
        return MixedPrecision(model, partial(RoundedAdamW, lr=PEAK_RATE, **ADAMW, **formats), CLIPPING)

    return build


FP32, O1, O2, PLUS = "#0 FP32", "O1", "#2a O2", "O2+"
O3, SPLIT = "O3's states", "O2, split16 master"
LEVELS = O1, O2, PLUS, O3, SPLIT
FP8_MASTER, FP8_SQUARE = "#3 FP8 master", "#4 FP8 exp_avg_sq"
RECIPES: dict[str, Build] = {
    FP32: partial(engine, bf16=False),
    "#1 BF16": partial(engine, bf16=True),
    O2: fp8("O2"),
    "#2b O2, bf16 master": fp8("O2", master_dtype="bf16"),
    FP8_MASTER: simulated(master=E4M3),
    FP8_SQUARE: simulated(exp_avg_sq=E4M3),
    O1: fp8("O1"),
    PLUS: fp8("O2+"),
    O3: fp8("O2", exp_avg_sq_dtype="ue4m4"),
    SPLIT: fp8("O2", master_dtype="split16"),
    "O2, split8 master": fp8("O2", master_dtype="split8"),
    "O2, fp16 master, nearest": fp8("O2", rounding="nearest"),
    "O2, bf16 master, nearest": fp8("O2", master_dtype="bf16", rounding="nearest"),
}
