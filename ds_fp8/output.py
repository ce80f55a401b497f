"""Output of the commands: tables for people, JSON for programs, errors in one line.

In a pipe a table has neither colours nor lines.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ds_fp8.config.refusals import cut

MOST = 2**20  # of what is counted in a run; more is a slip of the finger
PIPED_WIDTH = 200  # columns; a pipe has no width that a row would have to fit


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """Exit with argparse's message; arguments that it repeats are cut to a readable length."""
        self.refuse(re.sub(r"'[^']{200,}'|\S{200,}", lambda typed: cut(typed[0]), message))

    def refuse(self, message: str) -> NoReturn:
        """Exit with the message in one line; a path is cut only if it is too long to be one."""
        line = re.sub(r"\S{1000,}", lambda given: cut(given[0]), "; ".join(message.splitlines()))
        self.exit(2, f"{self.prog}: {printable(line)}\n")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    """A parser for a command; a ValueError or OSError of `run` is an error of the command line."""
    parser = commands.add_parser(name, help=text)

    def guarded(arguments: argparse.Namespace) -> None:
        try:
            run(arguments)
        except BrokenPipeError:  # of the reader, not of a file
            raise
        except (ValueError, OSError) as error:
            parser.refuse(str(error))

    parser.set_defaults(run=guarded)
    return parser


def positive(text: str) -> int:
    """An argument that is an integer, 1 or more."""
    if not re.fullmatch("[0-9]{1,20}", text) or not 1 <= int(text) <= MOST:
        allowed = f"an integer, 1 or more, at most {MOST:,}"
        raise argparse.ArgumentTypeError(f"received {cut(repr(text))}, allowed: {allowed}")
    return int(text)


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments for what a ds_config leaves open: GPUs and micro-steps."""
    default = "1, or as many as a model is split over"
    parser.add_argument("--gpus", metavar="N", type=positive, help=f"world size; default: {default}")
    help_text = "per step; default: as the config, else 1"
    parser.add_argument("--micro-steps", metavar="N", type=positive, help=help_text)


def printable(text: str) -> str:
    """A text without the lone surrogates that stand for bytes of another encoding in a file's name."""
    return text.encode("utf-8", "backslashreplace").decode()


def show_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def show_line(text: str = "") -> None:
    sys.stdout.write(printable(text) + "\n")


def in_units(number: float, of: str = "") -> str:
    """A count, or bytes (of="B"), with a decimal prefix: 1.25 GB."""
    prefixes = ("", "k", "M", "G", "T")
    power = max(0, min(len(prefixes) - 1, (len(str(round(number))) - 1) // 3))
    shown = f"{number / 1000**power:.2f}" if power else f"{number:.0f}"
    return f"{shown} {prefixes[power]}{of}".rstrip()


def show_table(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """None is shown as a dash; the first column is never folded."""
    terminal = Console().is_terminal
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for number, column in enumerate(headings):
        table.add_column(Text(printable(column)), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text("-" if value is None else printable(str(value))) for value in row))
    Console(width=None if terminal else PIPED_WIDTH).print(table)


def progress_bar() -> Progress:
    """On stderr, and only if that is a terminal."""
    return Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
