"""A Hugging Face model's sizes from its config: it is made on the meta device, where nothing is allocated.

The result names the class that was counted: a config that names none leaves open whether there is a head.
Sizes that no model has are refused before, and tensors are counted as they are made, so that a slip ends in
seconds.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ds_fp8.config.refusals import cut, refusal, show
from ds_fp8.estimate.runs import MOST_TENSORS, Model, model_of_module

COUNTS = re.compile(r"(num|n|encoder|decoder)_(\w+_)?(layers?|heads?|experts|blocks)|depth")
SIZES = re.compile(r"hidden_size|intermediate_size|vocab_size|n_embd|d_model|d_ff|d_inner|n_inner")
MOST_OF_A_SIZE = 10**9


def pretrained(name: str) -> Model:
    """A config.json, a folder that holds one, or a name on the hub whose config is in the local cache.

    Raises ValueError if there is none, if transformers does not know the model, and without transformers.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--model: needs the package transformers: pip install ds-fp8[hf]")
    import transformers

    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        raise ValueError(f"{cut(name)}: no such file")
    try:
        check_sizes(transformers.PretrainedConfig.get_config_dict(name, local_files_only=True)[0])
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        kind, why = model_class(transformers, config)
        with torch.device("meta"), _counted():
            module = kind(config)
    except Exception as error:  # transformers and torch have many for a config that makes no model
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--model: received {cut(repr(name))}, allowed: a config.json, its folder, or a name on the hub "
            f"whose config is in the local cache ({reason[:500]})"
        ) from None
    return replace(model_of_module(module), name=cut(name), counted=f"{kind.__name__}{why}")


def check_sizes(config: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse what no model has, before lists of that length are made."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value, f"{prefix}{key}.")
        most = MOST_TENSORS if COUNTS.fullmatch(key) else MOST_OF_A_SIZE if SIZES.fullmatch(key) else None
        if most is not None and isinstance(value, int | float) and value not in range(most + 1):
            raise refusal(f"{prefix}{key}", value, f"an integer, 0 to {most:,}")


def model_class(transformers: Any, config: Any) -> tuple[Any, str]:
    """The class that the config names; else the language model of its type, else the bare one, and why."""
    named = config.architectures
    architecture = named[0] if isinstance(named, list) and named else named
    kind = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind, ""
    mappings = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING]
    if config.is_encoder_decoder:
        mappings[0] = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    kinds = [kind for kind in (mapping.get(type(config), None) for mapping in mappings) if kind is not None]
    if not kinds:
        raise ValueError(f"transformers has no model of type {show(config.model_type)}")
    kind = kinds[0][0] if isinstance(kinds[0], tuple) else kinds[0]
    why = "the config names no architecture" if not named else f"transformers has no {show(architecture)}"
    return kind, f", as {why}"


@contextmanager
def _counted() -> Iterator[None]:
    """Refuse a model of too many tensors while it is being made."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > MOST_TENSORS:
            raise refusal("tensors", made, f"1 to {MOST_TENSORS:,}")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
