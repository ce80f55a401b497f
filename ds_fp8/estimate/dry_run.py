"""A dry run of a ds_config: what it asks for and whether it is accepted, without an engine.

DeepSpeed's own functions read the file and judge it, with the "fp8" section registered for that alone: a
parser of ours would accept what a run refuses (repeated keys) and refuse what a run accepts (comments).
"""

import io
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ds_fp8.compat import DeepSpeedConfig, deepspeed_logger, load_ds_config
from ds_fp8.config.auto import without_auto
from ds_fp8.config.ds_config import BATCHES, autotp_size, initialize_params, never_trains
from ds_fp8.config.refusals import cut, refusal, show
from ds_fp8.config.section import SECTION, FP8Config
from ds_fp8.estimate.fetching import fetching_of
from ds_fp8.estimate.runs import Run
from ds_fp8.zero_fp8.placement.ranks import AUTOTP_SIZE, NODE_SIZE, SEQUENCE_SIZE, Fleet, check_divides
from ds_fp8.zero_fp8.recipe import Offload, Recipe, offload_from, recipe_of

FASTER_FROM = 16_000_000  # elements of a bucket, on one node with NVLink; docs/communication.md
MOST_WORDS = 500  # characters of DeepSpeed's own words; they repeat what was given
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
OFF = 'FP8 is off: no enabled "fp8" section; stock DeepSpeed runs'
IDLE = 'FP8 is idle: ZeRO 0 and no "optimizer"; an engine that trains is refused'


@dataclass(frozen=True)
class DryRun:
    """An accepted ds_config with FP8 enabled."""

    fp8: FP8Config
    run: Run
    recipe: Recipe
    model_dtype: str | None  # bf16, fp16; None: as the model has it
    offload: Offload | None
    idle: tuple[str, ...]  # keys without effect
    filled_in: tuple[str, ...]  # keys that are "auto"
    refused_alone: str | None  # the refusal if "auto" keys or a missing batch size are not filled in


def read(source: str) -> Mapping[str, Any]:
    """A ds_config, from a file or base64, as DeepSpeed reads it. Raises ValueError if DeepSpeed cannot."""
    try:
        loaded = load_ds_config(source)
    except Exception as error:  # from a folder to a depth beyond Python's
        missing = "" if os.path.exists(source) else "no such file, and no ds_config in base64: "
        raise ValueError(f"{cut(source)}: {missing}{_objection(error)}") from None
    if not isinstance(loaded, Mapping):
        raise refusal(source, loaded, "an object")
    return loaded


def run_dry(
    config: Mapping[str, Any], *, gpus: int | None = None, micro_steps: int | None = None
) -> DryRun | str:
    """The run that a config asks for, or the reason why FP8 is off. Raises ValueError with the refusal.

    gpus: if left out, as many as AutoTP splits the model over. micro_steps: instead of the config's. Keys
    that are "auto" count as left out, but in the section they are refused. What only the model or a client's
    optimizer shows is not looked at.
    """
    known, filled_in = without_auto(config)
    assumes = not set(known) & set(BATCHES[:2]) and (bool(filled_in) or SECTION in config)
    if assumes:
        # DeepSpeed requires one of the two; Hugging Face fills it in, or the user of a template.
        known[BATCHES[1]] = 1
    gpus = gpus or _fewest_gpus(known)
    judged = judge(known, gpus)
    fp8: FP8Config | None = judged.ds_fp8
    if fp8 is None or not fp8.enabled:
        return OFF
    if never_trains(known):
        return IDLE
    run = _run_of(judged, gpus, micro_steps)
    recipe = recipe_of(fp8, accumulating=run.accumulating, ranks=run.replicas)
    check_divides(NODE_SIZE, recipe.intra_node_size, gpus)
    return DryRun(
        fp8,
        run,
        recipe,
        model_dtype=_model_dtype(filled_in, judged, recipe, fp8),
        offload=offload_from(fp8, judged.zero_config),
        idle=tuple(judged.ds_fp8_idle_keys),
        filled_in=tuple(filled_in),
        refused_alone=_refused(config, gpus) if filled_in or assumes else None,
    )


def _fewest_gpus(config: Mapping[str, Any]) -> int:
    with suppress(ValueError):  # which `judge` raises, too
        return max(1, autotp_size(config))
    return 1


def _run_of(judged: Any, gpus: int, micro_steps: int | None) -> Run:
    return Run(
        gpus=gpus,
        stage=int(judged.zero_config.stage),
        micro_steps=micro_steps or int(judged.gradient_accumulation_steps),
        bucket_elements=int(judged.zero_config.reduce_bucket_size),
        overlap=bool(judged.zero_config.overlap_comm),
        fetching=fetching_of(judged.zero_config),
        model_parallel_size=max(1, autotp_size(judged._param_dict)),
        sequence_parallel_size=_sequence_parallel_size(judged._param_dict),
        accumulate_in_fp32=judged.grad_accum_dtype in FP32_NAMES,
    )


def _sequence_parallel_size(config: Mapping[str, Any]) -> int:
    return int(config.get(SEQUENCE_SIZE) or 1)


def judge(config: Mapping[str, Any], gpus: int) -> Any:
    """The DeepSpeedConfig of a run on `gpus` GPUs. Raises ValueError with our objection or DeepSpeed's."""

    class Judged(DeepSpeedConfig):  # type: ignore[misc]  # DeepSpeed has no types
        def _initialize_params(self, param_dict: dict[str, Any]) -> None:
            initialize_params(DeepSpeedConfig._initialize_params)(self, param_dict)
            size = _sequence_parallel_size(param_dict)
            check_divides(SEQUENCE_SIZE, size, gpus)
            check_divides(AUTOTP_SIZE, max(1, autotp_size(param_dict)), gpus)
            self.world_size = Fleet("data", gpus).sequences(size)

    try:
        with _quiet():
            return Judged(dict(config))
    except Exception as error:  # DeepSpeed asserts, looks up and converts as it reads
        raise ValueError(_objection(error)) from None


def _refused(config: Mapping[str, Any], gpus: int) -> str | None:
    try:
        judge(config, gpus)
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DeepSpeed's log, which would stand between a command's lines."""
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        deepspeed_logger.setLevel(level)


def _objection(error: Exception) -> str:
    """The text of an error: our refusals unchanged, DeepSpeed's errors with a preface."""
    if isinstance(error, ValidationError):
        mistakes = [
            f"{'.'.join(map(str, mistake['loc']))}: received {show(mistake['input'])}: {mistake['msg']}"
            for mistake in error.errors(include_url=False)
        ]
        return f"DeepSpeed refuses it: {error.title}: {'; '.join(mistakes)}"
    if type(error) is ValueError and ", allowed: " in str(error):
        return str(error)
    words = " ".join(str(error).split())
    return f"DeepSpeed refuses it: {type(error).__name__}: {words[:MOST_WORDS]}"


def advice(dry_run: DryRun) -> list[str]:
    """Advice that would make the exchange faster, from measurements."""
    run, recipe = dry_run.run, dry_run.recipe
    one_hop = run.gpus > 1 and not recipe.two_hops(run.gpus)
    if not one_hop or not recipe.wire.scaled or run.bucket_elements >= FASTER_FROM:
        return []
    return [
        f"with buckets of {run.bucket_elements:,} elements stock DeepSpeed's BF16 all-reduce may be faster "
        f"if all GPUs share NVLink: set reduce_bucket_size to {FASTER_FROM:,} or more"
    ]


def _model_dtype(filled_in: Collection[str], judged: Any, recipe: Recipe, fp8: FP8Config) -> str | None:
    """The dtype that DeepSpeed gives the model; of two that are "auto" the first."""
    bf16 = judged.bfloat16_config.enabled or {"bf16.enabled", "bfloat16.enabled"} & {*filled_in}
    fp16 = judged.float16_config.enabled or "fp16.enabled" in filled_in
    if fp16 and not bf16 and (recipe.master.split or fp8.has_codes):
        beside = "FP8 weights" if fp8.has_codes else f"a master {recipe.master.name}"
        raise refusal("fp16.enabled", True, f"false: beside {beside} weights are BF16")
    return "bf16" if bf16 else "fp16" if fp16 else None
