"""Writing a checkpoint of ours as one of DeepSpeed's universal ones.

`zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt` hold whole FP32 tensors, `zero/optimizer_state.pt` the
hyperparameters, and DeepSpeed's model file lies beside them. Stock DeepSpeed loads it at any world size, and
so do we; what only we need is under a key of its own that stock DeepSpeed passes over.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ds_fp8.zero_fp8.checkpoint import manifest, tags, writing
from ds_fp8.zero_fp8.checkpoint.foreign import OURS, STATE_FILES
from ds_fp8.zero_fp8.checkpoint.reader import Native, is_extra_state, others, whole
from ds_fp8.zero_fp8.checkpoint.tags import fresh


def write(native: Native, out: Path, advance: Callable[[int], None]) -> None:
    """Write the folder `out` and, beside it, `latest_universal`; advance: told the elements that are done.

    Raises ValueError if `out` exists, or `latest_universal` is no file.
    """
    if (out.parent / tags.LATEST_UNIVERSAL).is_dir():
        raise ValueError(f"{out.parent / tags.LATEST_UNIVERSAL}: a folder, expected a file or nothing")
    with fresh(out) as folder:
        zero = folder / "zero"
        # torch's optimizers want a tensor and DeepSpeed's kernels a number: this one passes for both.
        step = torch.tensor(float(native.facts.steps))
        for name, parameter in native.facts.parameters.items():
            states = whole(native, name)
            (zero / name).mkdir(parents=True)
            for key, tensor in zip(STATE_FILES, states, strict=True):
                writing.save({"param": tensor.view(parameter.shape)}, zero / name / f"{key}.pt")
            writing.save(step, zero / name / "step.pt")
            advance(states[0].numel())
        for name, tensor in others(native).items():
            if not is_extra_state(name):  # its bytes are in the model file
                (zero / name).mkdir()
                writing.save({"param": tensor.float()}, zero / name / "fp32.pt")
        writing.save(_common(native), zero / "optimizer_state.pt")
        shutil.copyfile(native.folder / manifest.MODEL_FILE, folder / manifest.MODEL_FILE)
    tags.point(out.parent / tags.LATEST_UNIVERSAL, out.name)


def _common(native: Native) -> dict[str, Any]:
    """No loss scaler for stock DeepSpeed: it would take ours with its settings, in place of its config's."""
    progress = native.progress
    return {
        "zero_stage": native.facts.zero_stage,
        "partition_count": native.facts.world_size,
        "ds_version": native.facts.deepspeed_version,
        "param_groups": progress.param_groups,
        OURS: {
            "steps": progress.steps,
            "clamp_squares": progress.clamp_squares,
            "loss_scaler": progress.loss_scaler,
            "autoscale": dict(progress.autoscale),
        },
    }
