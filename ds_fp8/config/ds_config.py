"""Checks all other keys of a ds_config when FP8 is on.

The tables are in `rules`. A key that they lack is refused if DeepSpeed might read it, or if another may have
been meant: an error is better than a setting that does nothing. Other keys are without effect at the top
level, and in sections where DeepSpeed reads only what it knows: programs keep notes of their own there.
"""

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from ds_fp8.config import offload
from ds_fp8.config.auto import known_now
from ds_fp8.config.optimizer_params import OptimizerParams, optimizer_params
from ds_fp8.config.parsing import parse
from ds_fp8.config.refusals import LONGEST, cut, refusal, show
from ds_fp8.config.rule_kinds import Honoured, Refused, asks_for_nothing, rule_at
from ds_fp8.config.rules import (
    GATHERED_FOR_A_SAVE,
    OLD_COMPILE,
    SECTIONS,
    SECTIONS_WITH_NOTES,
    TOP_LEVEL,
    Rules,
)
from ds_fp8.config.section import SECTION, FP8Config

STAGES = (1, 2, 3)
OPTIMIZER_TYPES = ("Adam", "AdamW", "FP8AdamW")
NULLABLE = ("bf16", "fp16")  # sections that DeepSpeed takes as absent if they are null
COMMENTS = ("comment", "comments")
CLOSE = 0.75  # of difflib's ratios: a key that is spelled like another is a mistake
BF16_NAMES = ("bfloat16", "bf16", "torch.bfloat16")
NODE_SIZE = "gradients.intra_node_size"
MESH_INSTEAD = (
    "the key left out beside sequence_parallel_size: with both DeepSpeed makes a mesh, under which gradients "
    "are not added over sequence-parallel ranks; give deepspeed.initialize the mpu of "
    "UlyssesSPAttentionHF.register_with_transformers"
)
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check(ds_config: Mapping[str, Any]) -> list[str]:
    """Refuse, by a ValueError, what does not go with FP8; the keys that have no effect are returned."""
    stage = check_stage(ds_config)
    parts = autotp_size(ds_config)
    idle = _apply("", TOP_LEVEL, ds_config, stage)
    for name, rules in SECTIONS.items():
        idle += _apply(name, rules, _section(ds_config, name), stage)
    fp8 = parse(ds_config) or FP8Config()
    offloaded = offload.section_of(_section(ds_config, "zero_optimization"))
    idle += _apply(offload.PATH, offload.OFFLOAD, offloaded or {}, stage)
    offload.check_offload(fp8, offloaded=offloaded is not None)
    if stage == 3:
        _refuse_whole_tensors(fp8, "with zero_optimization.stage 3, which cuts every tensor into slices")
    if parts > 1:
        idle = [each for each in idle if not any(key in each for key in GATHERED_FOR_A_SAVE)]
        refuse_beside_peers(fp8, ds_config, f"with tensor_parallel.autotp_size {parts}")
    if fp8.has_codes:
        _refuse_with_codes(fp8, ds_config)
    _check_optimizer(_section(ds_config, "optimizer"))
    _check_autocast(_section(ds_config, "torch_autocast"))
    _check_passes(_section(ds_config, "compile"))
    for name in (*BATCHES, "sequence_parallel_size"):
        _check_count(name, ds_config.get(name))
    _refuse_mesh(ds_config)
    if _section(ds_config, "zero_optimization").get("reduce_bucket_size") == 0:
        raise refusal("zero_optimization.reduce_bucket_size", 0, "1 or more")
    clipping = ds_config.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not 0 <= clipping < math.inf:
        raise refusal("gradient_clipping", clipping, "a number, 0 or more")
    return idle


def check_stage(ds_config: Mapping[str, Any]) -> int:
    """The stage of ZeRO. Raises ValueError if it does not go with FP8."""
    stage = _stage(ds_config)
    if isinstance(stage, bool) or stage not in STAGES:
        instead = "stage 1 trains the same numbers as stage 0, and shards the states"
        allowed = f"{', '.join(map(str, STAGES))} with fp8 enabled ({instead})"
        raise refusal("zero_optimization.stage", stage, allowed)
    return int(stage)


def check_before_engine(ds_config: Mapping[str, Any]) -> list[str]:
    """As `check`, but accept what an engine without an optimizer may have."""
    if not may_be_frozen(ds_config):
        return check(ds_config)
    if never_trains(ds_config):
        return []
    unread = [key for key in ds_config if _has_a_dot(key)]
    idle = check({key: value for key, value in ds_config.items() if key not in unread})
    return [*(f"{key} (DeepSpeed reads no key with a dot)" for key in unread), *idle]


def check_trained(ds_config: Mapping[str, Any]) -> None:
    """Refuse what `check_before_engine` accepted, now that there is an optimizer."""
    if may_be_frozen(ds_config):
        check(ds_config)


def may_be_frozen(ds_config: Mapping[str, Any]) -> bool:
    """Whether an engine of this config may have no optimizer, and so nothing to do in FP8.

    TRL makes its reference model's engine of the trained one's config without "optimizer". It has stage 0, or
    stage 3 and keys with a dot ("zero_optimization.reduce_bucket_size"), which DeepSpeed does not read.
    A client's optimizer shows later; then `check_trained` refuses.
    """
    stage = _stage(ds_config)
    return stage in (0, 3) and not isinstance(stage, bool) and "optimizer" not in ds_config


def never_trains(ds_config: Mapping[str, Any]) -> bool:
    """Whether an engine of this config has nothing to do in FP8 or, if it has an optimizer, is refused."""
    return may_be_frozen(ds_config) and _stage(ds_config) == 0


def _stage(ds_config: Mapping[str, Any]) -> Any:
    return _section(ds_config, "zero_optimization").get("stage", 0)


def _has_a_dot(key: Any) -> bool:
    """Whether this is a path, such as "zero_optimization.reduce_bucket_size", in place of a key."""
    name, dot, field = str(key).partition(".")
    return bool(dot) and field in SECTIONS.get(name, {})


def autotp_size(ds_config: Mapping[str, Any]) -> int:
    """Number of ranks over which DeepSpeed splits the model; 0 or 1 if it does not."""
    size = _section(ds_config, "tensor_parallel").get("autotp_size", 0)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise refusal("tensor_parallel.autotp_size", size, "an integer, 0 or more")
    return size


def refuse_beside_peers(config: FP8Config, ds_config: Mapping[str, Any], where: str) -> None:
    """Refuse what does not work if the model is split over ranks. where: by what, for the message."""
    _refuse_whole_tensors(config, f"{where}, under which ranks have parts of a tensor")
    if config.has_codes:
        raise config.refusal_of_weights(f"{where} (not measured yet there)")
    if config.gradients.intra_node_size not in (None, 1):
        raise refusal(f"{SECTION}.{NODE_SIZE}", config.gradients.intra_node_size, f"the key left out {where}")
    for key in ("use_node_local_storage", "load_universal"):
        if _section(ds_config, "checkpoint").get(key, False):
            raise refusal(f"checkpoint.{key}", True, f"false {where}")


def _refuse_whole_tensors(config: FP8Config, beside: str) -> None:
    """Refuse one scale per tensor, which requires whole tensors on a rank. beside: why there are none."""
    given = {"scaling": config.scaling, "gradients.reduction": config.gradients.reduction}
    allowed = {"scaling": "block", "gradients.reduction": "fp32"}
    mistakes = [
        str(refusal(f"{SECTION}.{key}", value, f'"{allowed[key]}" {beside}'))
        for key, value in given.items()
        if value != allowed[key]
    ]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _refuse_with_codes(config: FP8Config, ds_config: Mapping[str, Any]) -> None:
    """FP8 weights are those of BF16 models."""
    if _section(ds_config, "fp16").get("enabled", False) is True:
        path, value = config.weights_key
        raise refusal("fp16.enabled", True, f"false with {path} {show(value)}, which is of BF16 models")


def _section(ds_config: Mapping[str, Any], name: str, path: str | None = None) -> Mapping[str, Any]:
    section = ds_config.get(name, {})
    if section is None and name in NULLABLE:
        return {}
    if isinstance(section, bool) and name == "zero_optimization":
        return {"stage": int(section)}  # of old configs, which DeepSpeed reads so
    if not isinstance(section, Mapping):
        raise refusal(path or name, section, "an object")
    return section


def _apply(name: str, rules: Rules, section: Mapping[str, Any], stage: int) -> list[str]:
    """Refuse keys of a section, or of the top level, which has no name; those without effect are returned."""
    idle, prefix = [], f"{name}." if name else ""
    for key, value in section.items():
        if str(key).startswith("_") or key in COMMENTS:
            continue
        path = f"{prefix}{key}"
        if key not in rules:
            meant = _meant(name, str(key), rules)
            if meant or name not in ("", *SECTIONS_WITH_NOTES):
                raise refusal(path, value, f"the key left out (ds_fp8 does not know it{meant})")
            idle.append(f"{cut(path)} (DeepSpeed does not read it)")
            continue
        rule = rule_at(stage, rules[key])
        if isinstance(rule, Honoured) or asks_for_nothing(rule, value):
            continue
        if isinstance(rule, Refused):
            raise refusal(path, value, f"{rule.allowed(value)} ({key} {rule.why})")
        idle.append(f"{path} ({rule.why})")
    return idle


def _meant(name: str, key: str, rules: Rules) -> str:
    """A hint which key was meant by an unknown one; "" if there is no guess."""
    if name == "optimizer" and key in OptimizerParams.model_fields:
        return "; it goes into the section optimizer.params"
    section, dot, _ = key.rpartition(".")
    if dot:
        if section.partition(".")[0] in TOP_LEVEL:
            return f"; it goes into the section {cut(section)}"
        return "; DeepSpeed reads no key with a dot"
    sections = [each for each, fields in SECTIONS.items() if key in fields]
    if sections and not name:
        return f"; it goes into the section {sections[0]}"
    close = difflib.get_close_matches(key[:LONGEST], rules, n=1, cutoff=CLOSE)
    return f'; did you mean "{close[0]}"?' if close else ""


def _check_count(name: str, value: Any) -> None:
    """Refuse a count that is not an integer from 1: DeepSpeed accepts 1.5."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if value is not None and not (number >= 1 and number % 1 == 0):
        raise refusal(name, value, "an integer, 1 or more")


def _check_optimizer(section: Mapping[str, Any]) -> None:
    allowed = [name.lower() for name in OPTIMIZER_TYPES]
    kind = section.get("type")
    if kind is not None and str(kind).lower() not in allowed:
        raise refusal("optimizer.type", kind, f"{', '.join(OPTIMIZER_TYPES)} with fp8 enabled")
    optimizer_params(_section(section, "params", "optimizer.params"))


def _check_autocast(section: Mapping[str, Any]) -> None:
    """BF16 needs no loss scale. Left out, torch's own dtype counts, which is float16 on a GPU."""
    dtype = section.get("dtype")
    if section.get("enabled", False) and dtype not in BF16_NAMES:
        allowed = f"{', '.join(map(show, BF16_NAMES))} with fp8 enabled (float16 needs torch's GradScaler)"
        raise refusal("torch_autocast.dtype", dtype, allowed)


def _check_passes(section: Mapping[str, Any]) -> None:
    """Passes of DeepCompile that split sequences or layers over ranks change what is trained."""
    passes = section.get("passes")
    names = passes if isinstance(passes, list) else []
    if section.get("deepcompile", False) and {"autosp", "autotp"} & {str(each) for each in names}:
        allowed = 'the key left out ("autosp" and "autotp" split the model, torch.compile does not)'
        raise refusal("compile.passes", passes, allowed)


def _refuse_mesh(ds_config: Mapping[str, Any]) -> None:
    """DeepSpeed makes a mesh of both sizes; its ZeRO then adds gradients over data-parallel ranks only."""
    size = ds_config.get("sequence_parallel_size", 1)
    if "data_parallel_size" in ds_config and size != 1:
        raise refusal("data_parallel_size", ds_config["data_parallel_size"], MESH_INSTEAD)


def initialize_params(original: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeedConfig._initialize_params: parse the section, refuse what the config alone shows."""

    @functools.wraps(original)
    def method(self: Any, param_dict: dict[str, Any]) -> None:
        config = parse(param_dict)
        enabled = config is not None and config.enabled
        known = known_now(param_dict) if enabled else param_dict
        self.ds_fp8, self.ds_fp8_idle_keys = config, check_before_engine(known) if enabled else []
        original(self, _without_unread_keys(known) if enabled else known)
        if enabled and str(self.optimizer_name).lower() == "fp8adamw":
            self.optimizer_name = (
                "adam"  # DeepSpeed does not know FP8AdamW; "adam" means AdamW unless adam_w_mode is false
            )

    return method


def _without_unread_keys(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The config without the keys that have no effect here but at which DeepSpeed would raise or act."""
    unread = (OLD_COMPILE.keys() | {"deepcompile"}) & _section(ds_config, "compile").keys()
    if not unread:
        return ds_config
    known = {key: value for key, value in ds_config["compile"].items() if key not in unread}
    return {**ds_config, "compile": known}
