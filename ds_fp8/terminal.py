"""What the commands print: tables for eyes, JSON for programs, errors in one line.

Into a pipe a table goes without colour and lines.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PIPED_WIDTH = 200  # columns; a pipe has no width that a row would have to fit


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def show_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def show_table(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """None is shown as a dash; the first column is never folded."""
    terminal = Console().is_terminal
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for number, column in enumerate(headings):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row))
    Console(width=None if terminal else PIPED_WIDTH).print(table)


def progress_bar() -> Progress:
    """On stderr, and only where that is a terminal."""
    return Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
