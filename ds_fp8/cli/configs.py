"""`ds_fp8 configs`: the ds_configs that come with the package."""

import argparse
import difflib
import json
import sys
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from ds_fp8.config.parsing import parse
from ds_fp8.config.refusals import refusal
from ds_fp8.output import add_command, show_json, show_table

HEADINGS = ("name", "stage", "level", "gradients", "master", "exp_avg", "exp_avg_sq", "weights", "block")


def add_to(commands: Any) -> None:
    listing = add_command(commands, "configs", configs, "list the shipped ds_configs, or print one")
    listing.add_argument("name", nargs="?", metavar="NAME", help="print this one as it is")
    listing.add_argument("--json", action="store_true", help="list as JSON")


@dataclass(frozen=True)
class Summary:
    """A shipped ds_config; None: not with FP8, of weights that they are as the model has them."""

    name: str
    zero_stage: int
    opt_level: str | None = None
    gradients: str | None = None
    master: str | None = None
    exp_avg: str | None = None
    exp_avg_sq: str | None = None
    weights: str | None = None
    block_size: int | None = None


def shipped() -> dict[str, str]:
    """The texts of the shipped ds_configs by name."""
    files = [each for each in resources.files("ds_fp8.configs").iterdir() if each.name.endswith(".json")]
    return {
        each.name.removesuffix(".json"): each.read_text(encoding="utf-8")
        for each in sorted(files, key=lambda each: each.name)
    }


def summarise(name: str, text: str) -> Summary:
    """Read as DeepSpeed and ds_fp8 would."""
    ds_config = json.loads(text)
    stage = ds_config["zero_optimization"]["stage"]
    fp8 = parse(ds_config)
    if fp8 is None or not fp8.enabled:
        return Summary(name, stage)
    return Summary(
        name, stage, fp8.opt_level, fp8.gradients.dtype, **asdict(fp8.states), block_size=fp8.block_size
    )


def configs(arguments: argparse.Namespace) -> None:
    """List the shipped ds_configs, or print one as it is."""
    texts = shipped()
    if arguments.name is None:
        rows = [summarise(name, text) for name, text in texts.items()]
        if arguments.json:
            show_json([asdict(each) for each in rows])
        else:
            show_table(HEADINGS, (asdict(each).values() for each in rows))
        return
    name = arguments.name.removesuffix(".json")
    if name not in texts:
        close = difflib.get_close_matches(name, texts, n=1)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        raise refusal("NAME", name, f"{', '.join(texts)}{hint}")
    sys.stdout.write(texts[name])
