"""`ds_fp8 report`: versions, devices, kernels, and what a ds_config would do."""

import argparse
import io
import os
import platform
from contextlib import redirect_stdout
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ds_fp8 import __version__
from ds_fp8.config.refusals import cut
from ds_fp8.output import add_command, add_run, in_units, show_json, show_line, show_table

if TYPE_CHECKING:
    from ds_fp8.config.section import FP8Config
    from ds_fp8.estimate.dry_run import DryRun

BYTES_OF_16_BITS = 2.0
LISTS = ("exclude", "without_effect", "filled_in_by_hugging_face", "advice")
PACKAGES = ("torch", "deepspeed", "triton", "transformers", "accelerate")


def add_to(commands: Any) -> None:
    parser = add_command(commands, "report", report, "versions, devices, kernels, what a ds_config does")
    parser.add_argument(
        "--config", metavar="DS_CONFIG", help="a ds_config, as a file or base64: what it would do"
    )
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def report(arguments: argparse.Namespace) -> None:
    """Print the report. Exit status 1 if the config is refused."""
    contents: dict[str, Any] = {
        "versions": versions(),
        "cannot_register": cannot_register(),
        "devices": devices(),
        "kernels": kernels(),
        "DS_FP8_BACKEND": os.environ.get("DS_FP8_BACKEND"),
    }
    if arguments.config is not None:
        contents["config"] = judged(arguments, contents["cannot_register"])
    if arguments.json:
        show_json(contents)
    else:
        _show(contents)
    if contents.get("config", {}).get("refused") is not None:
        raise SystemExit(1)


def versions() -> dict[str, str | None]:
    """Versions by package; None if it is not installed."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    ours = {"ds_fp8": __version__, "python": platform.python_version()}
    return {**ours, **{package: version(package) for package in PACKAGES}}


def cannot_register() -> str | None:
    """Why ds_fp8 cannot be registered with the installed DeepSpeed; None if it can."""
    try:
        with redirect_stdout(io.StringIO()):  # DeepSpeed's log
            from ds_fp8.compat import check_signatures
        check_signatures()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def devices() -> list[dict[str, Any]]:
    """GPUs, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return [{"name": f"CPU, {platform.machine()}, {os.cpu_count()} threads"}]
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}", "bytes": gpu.total_memory}
        for gpu in gpus
    ]


def kernels() -> dict[str, str | None]:
    """Why a backend cannot run on this machine; None if it can. Nothing is built."""
    import torch

    from ds_fp8.ops import backend
    from ds_fp8.ops.cpu import build

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"reference": None, "cpu": build.obstacle(), "triton": backend.triton_obstacle(device)}


def judged(arguments: argparse.Namespace, obstacle: str | None) -> dict[str, Any]:
    """Whether the config is accepted, and what it would do; obstacle: why nothing can be registered."""
    verdict = {"file": arguments.config, "refused": obstacle, "run": None, "off": None}
    if obstacle is not None:
        return verdict
    from ds_fp8.estimate import dry_run

    config = dry_run.read(arguments.config)
    try:
        tried = dry_run.run_dry(config, gpus=arguments.gpus, micro_steps=arguments.micro_steps)
    except ValueError as error:
        return {**verdict, "refused": str(error)}
    if isinstance(tried, str):
        return {**verdict, "off": tried}
    return {**verdict, "run": described(tried)}


def described(tried: "DryRun") -> dict[str, Any]:
    """The values that `ds_fp8.describe` would return for an engine with this config."""
    from ds_fp8.estimate import dry_run, fetching, memory

    itemsize = None if tried.model_dtype is None or tried.fp8.has_codes else BYTES_OF_16_BITS
    return {
        "opt_level": tried.fp8.opt_level,
        "zero_stage": tried.run.stage,
        "world_size": tried.run.gpus,
        "model_parallel_size": tried.run.model_parallel_size,
        "sequence_parallel_size": tried.run.sequence_parallel_size,
        "grad_accum_dtype": "fp32" if tried.run.accumulate_in_fp32 and tried.run.stage == 1 else None,
        "micro_steps": tried.run.micro_steps,
        "weights": tried.model_dtype,
        **memory.summary(tried.recipe, ranks=tried.run.replicas, accumulating=tried.run.accumulating),
        "overlap_comm": tried.run.overlap,
        **(fetching.summary(tried.run.fetching, itemsize) if tried.run.stage == 3 else {}),
        **(_of_weights(tried.fp8) if tried.fp8.has_codes else {}),
        **(
            {"offload": tried.offload.executor, "offload_ratio": tried.offload.ratio} if tried.offload else {}
        ),
        "without_effect": tried.idle,
        "filled_in_by_hugging_face": tried.filled_in,
        "refused_without_hugging_face": tried.refused_alone,
        "advice": dry_run.advice(tried),
    }


def _of_weights(fp8: "FP8Config") -> dict[str, Any]:
    """The section's rules for FP8 weights; the model decides which they are (`ds_fp8 estimate --model`)."""
    return {
        "products": fp8.products.dtype or "e4m3 where the device has it, else bf16",
        "min_elements": fp8.weights.min_elements,
        "exclude": fp8.weights.exclude,
        "frozen": fp8.weights.frozen,
    }


def _show(contents: dict[str, Any]) -> None:
    versions = {name: version or "not installed" for name, version in contents["versions"].items()}
    show_table(("version", ""), {**versions, "register()": contents["cannot_register"] or "works"}.items())
    show_line()
    show_table(("device", "capability", "memory"), map(_device_row, contents["devices"]))
    show_line()
    kernels = {name: why or "can run" for name, why in contents["kernels"].items()}
    show_table(("kernels", ""), {**kernels, "DS_FP8_BACKEND": contents["DS_FP8_BACKEND"]}.items())
    if "config" in contents:
        show_line()
        show_table(("config", cut(contents["config"]["file"])), _config_rows(contents["config"]).items())


def _device_row(device: dict[str, Any]) -> tuple[str | None, ...]:
    memory = device.get("bytes")
    return device["name"], device.get("compute_capability"), None if memory is None else in_units(memory, "B")


def _config_rows(config: dict[str, Any]) -> dict[str, Any]:
    run = config["run"]
    if config["refused"] is not None:
        return {"refused": config["refused"]}
    if run is None:
        return {"accepted": config["off"]}
    alone = run["refused_without_hugging_face"]
    beside = "by the Trainer and accelerate only" if run["filled_in_by_hugging_face"] else "with a batch size"
    accepted = "yes" if alone is None else f"{beside}; DeepSpeed alone: {alone}"
    rates = {key: f"{value:.4f}" for key, value in run.items() if isinstance(value, float)}
    rows = {**run, "weights": run["weights"] or "as the model", **rates}
    lists = {key: "; ".join(rows.pop(key, ())) for key in LISTS}
    del rows["refused_without_hugging_face"]
    rows |= {key: text for key, text in lists.items() if text}
    return {"accepted": accepted, **{key.replace("_", " "): value for key, value in rows.items()}}
