"""The claims about the rows of update_error.py, and their presentation."""

from collections.abc import Iterator
from typing import Any

from claims import Claim
from regimes import REGIMES
from rich.console import Console
from rich.table import Table

from ds_fp8.config.section import LEVELS

# An FP8AdamW without DeepSpeed has no FP8 weights.
ALONE = {name: level for name, level in LEVELS.items() if level.weights is None}
BOUNDS = {  # of the error, in the order of the regimes
    "O2": (0.018, 0.018, 0.018, 0.018),
    "O2+": (0.020, 0.030, 0.045, 0.035),
}
BYTES = {"O2": 3.02, "O2+": 2.03}  # of both moments, at most
LARGEST_LR = 101  # largest difference of an element


def level_of(row: dict[str, Any]) -> str | None:
    """Return the level that has the states of a row."""
    if row["kind"] != "states" or not row["clamp"]:
        return None
    names = {f"{level.exp_avg}, {level.exp_avg_sq}": name for name, level in ALONE.items()}
    return names.get(row["name"])


def judge(rows: list[dict[str, Any]]) -> Iterator[Claim]:
    peers = [row for row in rows if row["kind"] == "peer"]
    for row in rows:
        level = level_of(row)
        if level not in BOUNDS:
            continue
        for regime, bound in zip(REGIMES, BOUNDS[level], strict=True):
            yield Claim.at_most(f"{level}, {regime}: error", error(row, regime), bound)
        yield Claim.at_most(f"{level}: bytes of both moments", row["bytes"], BYTES[level])
        largest = max(each["largest_lr"] for each in row["regimes"].values())
        yield Claim.at_most(f"{level}: largest difference, in lr", largest, LARGEST_LR)
        for regime in REGIMES:
            best = min(peers, key=lambda peer, regime=regime: error(peer, regime))
            text = f"{level}, {regime}: error, beside the best peer's ({best['name']})"
            yield Claim.below(text, error(row, regime), error(best, regime))
        better = [each["name"] for each in rows if each["kind"] == "states" and dominates(each, row)]
        text = f"{level}: states of no more bytes with less error in all four regimes"
        yield Claim(text, "; ".join(better) or "none", "none", not better)


def error(row: dict[str, Any], regime: str) -> float:
    return float(row["regimes"][regime]["error"])


def dominates(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a row has no more bytes than another, and less error in every regime."""
    return row["bytes"] <= other["bytes"] and all(error(row, each) < error(other, each) for each in REGIMES)


TITLES = {
    "states": "exp_avg, exp_avg_sq beside FP32 masters",
    "as built": "as built, with the rounding of the master",
    "peer": "peers",
}


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    for kind, title in TITLES.items():
        table = Table(title=title)
        for column in ("", "clamp", "B", *REGIMES, "largest, extreme"):
            table.add_column(column, justify="right" if column else "left")
        for row in rows:
            if row["kind"] == kind:
                level = level_of(row)
                clamp = {True: "on", False: "off", None: ""}[row["clamp"]]
                table.add_row(
                    f"{row['name']} ({level})" if level else row["name"],
                    clamp,
                    f"{row['bytes']:.2f}",
                    *(f"{error(row, regime):.4f}" for regime in REGIMES),
                    f"{row['regimes']['extreme']['largest_lr']:,.0f} lr",
                )
        console.print(table)
