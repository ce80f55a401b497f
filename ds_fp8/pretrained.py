"""A Hugging Face model's sizes from its config: it is made on the meta device, where nothing is allocated."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ds_fp8.estimates import Model, model_of_module


def pretrained(name: str) -> Model:
    """A config.json, a folder that holds one, or a name on the hub whose config is in the local cache.

    Raises ValueError where there is none, or of no model that transformers knows, and without transformers.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--model: needs the package transformers: pip install ds-fp8[hf]")
    import transformers

    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        raise ValueError(f"{name}: no such file")
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        with torch.device("meta"):
            module = model_class(transformers, config)(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--model: received {name!r}, allowed: a config.json, its folder, or a name on the hub whose "
            f"config is in the local cache ({reason})"
        ) from None
    return replace(model_of_module(module), name=name)


def model_class(transformers: Any, config: Any) -> Any:
    """The class that the config names; else the bare model of its type."""
    (architecture, *_) = config.architectures or [None]
    named = getattr(transformers, architecture, None) if architecture else None
    return named or transformers.AutoModel.from_config
