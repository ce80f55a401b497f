"""`ds_fp8 estimate`: what a GPU holds with FP8 and with stock DeepSpeed, and the largest model that fits."""

import argparse
import os
import re
from dataclasses import asdict, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ds_fp8.config.ds_config import STAGES
from ds_fp8.config.refusals import cut, refusal
from ds_fp8.config.section import LEVELS
from ds_fp8.output import add_command, add_run, in_units, positive, show_json, show_line, show_table

if TYPE_CHECKING:
    from ds_fp8.estimate.methods import Method
    from ds_fp8.estimate.runs import Model, Run
    from ds_fp8.zero_fp8.recipe import Offload

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
GB = 10**9
MOST_GIGABYTES = 1000  # of a GPU


def add_to(commands: Any) -> None:
    parser = add_command(commands, "estimate", estimate, "bytes per GPU, beside stock DeepSpeed BF16")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--params", metavar="N", type=count, help="parameters of a model: 350M, 7G")
    what.add_argument("--model", metavar="CONFIG", help="a Hugging Face config.json or cached name")
    what.add_argument("--paper", action="store_true", help="the models of Table 1 of FP8-LM")
    what.add_argument(
        "--memory", metavar="GB", type=gigabytes, help="find the largest model for GPUs of this memory"
    )
    what.add_argument("--fits", action="store_true", help="a table: GPUs, memory, the largest model")
    parser.add_argument(
        "--trainable", metavar="N", type=count, help="of --params; the rest is frozen, as with LoRA"
    )
    add_run(parser)
    parser.add_argument("--stage", type=int, choices=STAGES, help="of ZeRO; default: 2")
    parser.add_argument(
        "--tensor-parallel", metavar="N", type=positive, help="GPUs over which the model is split; default: 1"
    )
    parser.add_argument("--opt-level", choices=tuple(LEVELS), help="default: all of them")
    parser.add_argument("--offload", action="store_true", help="states in host memory, a column of its own")
    parser.add_argument("--config", metavar="DS_CONFIG", help="take stage, level and formats from this file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def count(text: str) -> int:
    """A number of parameters: 350M, 1.3B, 7000000."""
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)([KMGBT]?)", text, re.IGNORECASE)
    number = Fraction(match[1]) * UNITS[match[2].upper()] if match else Fraction(0)
    if number.denominator > 1 or number < 1:
        allowed = "a whole number of parameters, as 350M, 1.3B or 7000000"
        raise argparse.ArgumentTypeError(f"received {cut(repr(text))}, allowed: {allowed}")
    return int(number)


def gigabytes(text: str) -> int:
    """Parse gigabytes, as 80 or 141.5; return bytes."""
    number = Fraction(text) if re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", text) else Fraction(0)
    if not 0 < number <= MOST_GIGABYTES:
        allowed = f"gigabytes, as 80 or 141.5, at most {MOST_GIGABYTES:,}"
        raise argparse.ArgumentTypeError(f"received {cut(repr(text))}, allowed: {allowed}")
    return round(number * GB)


def estimate(arguments: argparse.Namespace) -> None:
    from ds_fp8.estimate.methods import STOCK, STOCK_BF16_STATES

    if arguments.fits:
        from ds_fp8.cli.fits import show_fits

        show_fits(arguments)
        return
    if arguments.trainable is not None and arguments.params is None:
        raise ValueError("--trainable: not allowed without --params")
    run, ours = _run(arguments)
    methods = [STOCK, STOCK_BF16_STATES, *ours]
    if arguments.memory is not None:
        _show_largest(arguments, methods, run)
    else:
        _show_models(arguments, methods, run)


def _run(arguments: argparse.Namespace) -> "tuple[Run, list[Method]]":
    """The run, and ds_fp8's methods in it."""
    from ds_fp8.estimate import methods, runs

    if arguments.config is None:
        parts = arguments.tensor_parallel or 1
        at_defaults = (arguments.gpus or parts, arguments.stage or 2, arguments.micro_steps or 1)
        run = _split(runs.run_at_defaults(*at_defaults), parts)
        found = [methods.levels(each) for each in (_executors() if arguments.offload else [None])]
        names = [arguments.opt_level] if arguments.opt_level else list(LEVELS)
        return run, [levels[name] for name in names for levels in found]
    from ds_fp8.estimate import dry_run

    for option in ("stage", "opt_level", "tensor_parallel", "offload"):
        if getattr(arguments, option) not in (None, False):
            raise ValueError(f"--{option.replace('_', '-')}: not allowed with --config, which decides it")
    config = dry_run.read(arguments.config)
    tried = dry_run.run_dry(config, gpus=arguments.gpus, micro_steps=arguments.micro_steps)
    if isinstance(tried, str):
        raise ValueError(
            f'{cut(arguments.config)}: received no enabled "fp8" section that trains, allowed: one'
        )
    if tried.model_dtype is None:
        raise refusal("bf16.enabled", False, "true, or fp16.enabled: the estimate is of 16-bit weights")
    name = cut(os.path.basename(arguments.config))
    if tried.offload is None:
        return tried.run, [methods.with_fp8(f"ds_fp8, {name}", tried.fp8)]
    ways = [each for each in _executors() if tried.offload.executor in ("auto", each.executor)]
    return tried.run, [
        methods.with_fp8(
            f"ds_fp8, {name}, {each.executor}", tried.fp8, replace(each, ratio=tried.offload.ratio)
        )
        for each in ways
    ]


def _executors() -> "list[Offload]":
    """Both executors of offload."""
    from ds_fp8.zero_fp8.recipe import Offload

    return [Offload("stream"), Offload("host")]


def _split(run: "Run", parts: int) -> "Run":
    """The run with the model split over `parts` GPUs. Raises ValueError if they do not divide the GPUs."""
    from ds_fp8.zero_fp8.placement.ranks import check_divides

    check_divides("--tensor-parallel", parts, run.gpus)
    if parts > 1 and run.stage == 3:
        raise refusal("--tensor-parallel", parts, "1 under ZeRO 3")
    return replace(run, model_parallel_size=parts)


def _models(arguments: argparse.Namespace, run: "Run") -> "list[Model]":
    from ds_fp8.estimate import runs
    from ds_fp8.estimate.model_sizes import pretrained

    if arguments.paper:
        return runs.paper()
    if arguments.model is not None:
        return [pretrained(arguments.model)]
    if arguments.trainable in (None, arguments.params):
        return [runs.model_of_size(arguments.params, run)]
    if arguments.trainable > arguments.params:
        raise refusal("--trainable", arguments.trainable, f"at most --params, {arguments.params}")
    trained = runs.model_of_size(arguments.trainable, run)
    return [runs.with_frozen(trained, arguments.params - arguments.trainable, run)]


def _show_models(arguments: argparse.Namespace, methods: "list[Method]", run: "Run") -> None:
    models = _models(arguments, run)
    if arguments.json:
        show_json({**asdict(run), "models": [_as_json(model, methods, run) for model in models]})
        return
    show_line(f"What a GPU holds, without activations: {_words(run)}")
    if arguments.paper:
        totals = (
            (
                model.name,
                in_units(model.parameters),
                *(_total(method, model, run) for method in methods),
            )
            for model in models
        )
        show_table(("model", "size", *(method.name for method in methods)), totals)
    else:
        from ds_fp8.estimate.deepspeed_names import show

        show(models[0], run, methods)


def _total(method: "Method", model: "Model", run: "Run") -> str | None:
    """None if the method refuses the model."""
    return None if method.refusal(model, run) else in_units(method.held(model, run).total, "B")


def _as_json(model: "Model", methods: "list[Method]", run: "Run") -> dict[str, Any]:
    from ds_fp8.estimate.methods import refusals

    refused = refusals(methods, model, run)
    held = {method.name: method.held(model, run) for method in methods if method.name not in refused}
    return {
        "name": model.name,
        "parameters": model.parameters,
        "frozen": model.frozen,
        "counted": model.counted or None,
        "bytes": [{"method": name, **asdict(parts), "total": parts.total} for name, parts in held.items()],
        "refused": refused,
        "fp8_weights": {method.name: _weights(method, model) for method in methods if method.note(model)},
    }


def _weights(method: "Method", model: "Model") -> dict[str, Any]:
    """Which matrices are FP8 and why others are not, as in `ds_fp8.describe`; empty if shapes are unknown."""
    from ds_fp8.estimate.codes import codes_of

    assert method.config is not None
    chosen = codes_of(method.config, model)
    return {"fp8_weights": chosen.names, "bf16_matrices": chosen.reasons, "fp8_elements": chosen.elements}


def _show_largest(arguments: argparse.Namespace, methods: "list[Method]", run: "Run") -> None:
    from ds_fp8.estimate.methods import WEIGHT, largest, refusals
    from ds_fp8.estimate.runs import model_of_size

    model = model_of_size(max(1, arguments.memory // WEIGHT), run)  # its weights alone fill a GPU
    refused = refusals(methods, model, run)
    parameters = {
        method.name: largest(method, run, arguments.memory)
        for method in methods
        if method.name not in refused
    }
    if arguments.json:
        rows = [{"method": name, "parameters": count} for name, count in parameters.items()]
        show_json({**asdict(run), "memory": arguments.memory, "largest": rows, "refused": refused})
        return
    show_line(
        f"The largest model on GPUs of {in_units(arguments.memory, 'B')}, without activations: {_words(run)}"
    )
    show_table(("", "parameters"), ((name, in_units(count)) for name, count in parameters.items()))
    for name, reason in refused.items():
        show_line(f"{name}: {reason}")


def _words(run: "Run") -> str:
    gpus = "1 GPU" if run.gpus == 1 else f"{run.gpus} GPUs"
    steps = "1 micro-step" if run.micro_steps == 1 else f"{run.micro_steps} micro-steps"
    parts = "" if run.model_parallel_size == 1 else f"tensor parallel {run.model_parallel_size}, "
    return f"ZeRO {run.stage}, {gpus}, {parts}{steps} per step"
