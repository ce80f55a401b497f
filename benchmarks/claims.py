"""Claims of a benchmark beside the measured figures: a claim that does not hold here is printed, too."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Claim:
    """A claim about a figure, the figure, and its bound."""

    text: str
    figure: float | str
    bound: str
    holds: bool

    @staticmethod
    def below(text: str, figure: float, bound: float) -> "Claim":
        return Claim(text, figure, f"below {bound:.4f}", figure < bound)

    @staticmethod
    def at_most(text: str, figure: float, bound: float) -> "Claim":
        return Claim(text, figure, f"at most {bound:.4f}", figure <= bound)

    @staticmethod
    def at_least(text: str, figure: float, bound: float) -> "Claim":
        return Claim(text, figure, f"at least {bound}", figure >= bound)


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    table = Table(title="claims")
    for column in ("", "found", "claimed", ""):
        table.add_column(column)
    for each in claims:
        figure = each.figure if isinstance(each.figure, str) else f"{each.figure:.4f}"
        table.add_row(each.text, figure, each.bound, "holds" if each.holds else "not reproduced here")
    console.print(table)
