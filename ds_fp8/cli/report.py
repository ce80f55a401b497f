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
    from ds_fp8.estimate.dry_run import Plan

PACKAGES = ("torch", "deepspeed", "triton", "transformers", "accelerate")


def add_to(commands: Any) -> None:
    parser = add_command(commands, "report", report, "versions, devices, kernels, what a ds_config does")
    parser.add_argument("--config", metavar="DS_CONFIG", help="tell what this file (or base64) would do")
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="tell it as JSON")


def report(arguments: argparse.Namespace) -> None:
    """Exit status 1 where the config is refused."""
    found: dict[str, Any] = {
        "versions": versions(),
        "cannot_register": cannot_register(),
        "devices": devices(),
        "kernels": kernels(),
        "DS_FP8_BACKEND": os.environ.get("DS_FP8_BACKEND"),
    }
    if arguments.config is not None:
        found["config"] = judged(arguments, found["cannot_register"])
    if arguments.json:
        show_json(found)
    else:
        _show(found)
    if found.get("config", {}).get("refused") is not None:
        raise SystemExit(1)


def versions() -> dict[str, str | None]:
    """None: not installed."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    ours = {"ds_fp8": __version__, "python": platform.python_version()}
    return {**ours, **{package: version(package) for package in PACKAGES}}


def cannot_register() -> str | None:
    """Why ds_fp8 cannot be registered with the installed DeepSpeed; None where it can."""
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
    each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}", "bytes": gpu.total_memory}
        for gpu in each
    ]


def kernels() -> dict[str, str | None]:
    """Why a backend cannot run on this machine; None where it can. Nothing is built."""
    import torch

    from ds_fp8.ops import backend
    from ds_fp8.ops.cpu import build

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"reference": None, "cpu": build.obstacle(), "triton": backend.triton_obstacle(device)}


def judged(arguments: argparse.Namespace, obstacle: str | None) -> dict[str, Any]:
    """Whether the config is accepted, and what it would do; obstacle: why nothing can be registered."""
    found = {"file": arguments.config, "refused": obstacle, "plan": None, "off": None}
    if obstacle is not None:
        return found
    from ds_fp8.estimate import dry_run

    config = dry_run.read(arguments.config)
    try:
        plan = dry_run.plan(config, gpus=arguments.gpus, micro_steps=arguments.micro_steps)
    except ValueError as error:
        return {**found, "refused": str(error)}
    if isinstance(plan, str):
        return {**found, "off": plan}
    return {**found, "plan": facts_of(plan)}


def facts_of(plan: "Plan") -> dict[str, Any]:
    """As `ds_fp8.describe` tells of an engine."""
    from ds_fp8.estimate import dry_run, memory

    return {
        "opt_level": plan.fp8.opt_level,
        "zero_stage": plan.run.stage,
        "world_size": plan.run.gpus,
        "micro_steps": plan.run.micro_steps,
        "weights": plan.weights,
        **memory.summary(plan.recipe, ranks=plan.run.gpus, accumulating=plan.run.accumulating),
        "overlap_comm": plan.run.overlap,
        "without_effect": plan.idle,
        "filled_in_by_hugging_face": plan.filled_in,
        "refused_without_hugging_face": plan.refused_alone,
        "advice": dry_run.advice(plan),
    }


def _show(found: dict[str, Any]) -> None:
    versions = {name: version or "not installed" for name, version in found["versions"].items()}
    show_table(("version", ""), {**versions, "register()": found["cannot_register"] or "works"}.items())
    show_line()
    show_table(("device", "capability", "memory"), map(_device_row, found["devices"]))
    show_line()
    kernels = {name: why or "can run" for name, why in found["kernels"].items()}
    show_table(("kernels", ""), {**kernels, "DS_FP8_BACKEND": found["DS_FP8_BACKEND"]}.items())
    if "config" in found:
        show_line()
        show_table(("config", cut(found["config"]["file"])), _config_rows(found["config"]).items())


def _device_row(device: dict[str, Any]) -> tuple[str | None, ...]:
    size = device.get("bytes")
    return device["name"], device.get("compute_capability"), None if size is None else in_units(size, "B")


def _config_rows(config: dict[str, Any]) -> dict[str, Any]:
    plan = config["plan"]
    if config["refused"] is not None:
        return {"refused": config["refused"]}
    if plan is None:
        return {"accepted": config["off"]}
    lists = ("without_effect", "filled_in_by_hugging_face", "advice")
    shown = {key: value for key, value in plan.items() if key not in lists}
    told = {key.replace("_", " "): "; ".join(plan[key]) for key in lists if plan[key]}
    shown["weights"] = plan["weights"] or "as the model"
    for key in (
        "state_bytes_per_parameter",
        "gradient_bytes_per_parameter",
        "wire_bytes_per_gradient_element",
    ):
        shown[key] = f"{plan[key]:.4f}"
    alone = shown.pop("refused_without_hugging_face")
    accepted = "yes" if alone is None else f"by the Trainer and accelerate only; DeepSpeed alone: {alone}"
    return {"accepted": accepted, **{key.replace("_", " "): value for key, value in shown.items()}, **told}
