"""The `ds_fp8` command.

    ds_fp8 configs                          the ds_configs that come with the package
    ds_fp8 configs zero2_o2 > ds_config.json

Tables are for eyes: into a pipe they go without colour and lines, and `--json` is for programs. A
wrong command line is one line on stderr and exit status 2.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from ds_fp8 import __version__
from ds_fp8.config import parse

HEADINGS = ("name", "stage", "level", "gradients", "master", "exp_avg", "exp_avg_sq", "block")
PIPED_WIDTH = 200  # columns; a pipe has no width that a row would have to fit


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


@dataclass(frozen=True)
class Summary:
    """A shipped ds_config; None: not with FP8."""

    name: str
    zero_stage: int
    opt_level: str | None = None
    gradients: str | None = None
    master: str | None = None
    exp_avg: str | None = None
    exp_avg_sq: str | None = None
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
        show_json(rows) if arguments.json else show_table(rows)
        return
    name = arguments.name.removesuffix(".json")
    if name not in texts:
        close = difflib.get_close_matches(name, texts, n=1)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        arguments.parser.error(f"NAME: received {json.dumps(name)}, allowed: {', '.join(texts)}{hint}")
    sys.stdout.write(texts[name])


def show_json(rows: Sequence[Summary]) -> None:
    sys.stdout.write(json.dumps([asdict(each) for each in rows], indent=2) + "\n")


def show_table(rows: Sequence[Summary]) -> None:
    terminal = Console().is_terminal
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for column in HEADINGS:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for each in rows:
        table.add_row(*("-" if value is None else str(value) for value in asdict(each).values()))
    Console(width=None if terminal else PIPED_WIDTH).print(table)


def build_parser() -> Parser:
    parser = Parser(prog="ds_fp8", description="FP8 gradients, communication and Adam states for DeepSpeed")
    parser.add_argument("--version", action="version", version=f"ds_fp8 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    listing = commands.add_parser("configs", help="list the shipped ds_configs, or print one")
    listing.add_argument("name", nargs="?", metavar="NAME", help="print this one as it is")
    listing.add_argument("--json", action="store_true", help="list as JSON")
    listing.set_defaults(run=configs, parser=listing)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
