"""What the study of precision.py has found: rows per recipe and stage, claims, tables."""

import statistics
from typing import Any

from claims import Claim
from recipes import FINE_RATE, FP8_MASTER, FP8_SQUARE, FP32, LEVELS
from rich.console import Console
from rich.table import Table
from seeds import Paired, paired

Results = dict[str, dict[str, float]]  # figures by seed
Runs = dict[str, dict[str, Results]]  # by stage and recipe


def paired_by(figure: str, results: Results, to: Results) -> Paired:
    """Pair a figure of results with that of others."""
    ours, theirs = ({int(seed): each[figure] for seed, each in kind.items()} for kind in (results, to))
    return paired(ours, theirs)


def kept(results: Results, fp32: Results) -> float:
    """Return the share of FP32's improvement by fine-tuning that a recipe reaches, from FP32's start."""
    return statistics.fmean(
        (fp32[seed]["before"] - results[seed]["validation"])
        / (fp32[seed]["before"] - fp32[seed]["validation"])
        for seed in results
    )


def summarise(runs: Runs) -> list[dict[str, Any]]:
    """Return a row per recipe and stage."""
    rows = []
    for stage, by_recipe in runs.items():
        fp32 = by_recipe[FP32]
        for name, results in by_recipe.items():
            validation = paired_by("validation", results, fp32)
            row = {
                "stage": stage,
                "recipe": name,
                "validation": statistics.fmean(each["validation"] for each in results.values()),
                "difference": validation.mean,
                "differences": [*validation.differences.values()],
                "training_difference": paired_by("training", results, fp32).mean,
            }
            if len(validation.differences) > 1:
                row["standard_error"] = validation.standard_error
            if stage == "fine-tuning":
                row["kept"] = kept(results, fp32)
            rows.append(row)
    return rows


def judge(rows: list[dict[str, Any]], close: float) -> list[Claim]:
    """Compare each difference with its bound, with its standard error on the unfavourable side."""
    by = {(row["stage"], row["recipe"]): row for row in rows}
    claims = []
    for name in LEVELS:
        if row := by.get(("training", name)):
            holds = abs(row["difference"]) + row.get("standard_error", 0.0) < close
            what = f"{name}: mean difference to FP32"
            claims.append(Claim(what, as_text(row), f"within {close:.4f}", holds))
        if row := by.get(("fine-tuning", name)):
            what = f"{name}: of FP32's improvement at a rate of {FINE_RATE}"
            claims.append(Claim(what, row["kept"], "1.00", round(row["kept"], 2) >= 1))
    if row := by.get(("training", FP8_SQUARE)):
        holds = row["difference"] - row.get("standard_error", 0.0) > 0.015
        claims.append(Claim(f"{FP8_SQUARE}: worse than FP32 by", as_text(row), "above 0.0150", holds))
    if row := by.get(("fine-tuning", FP8_MASTER)):
        what = f"{FP8_MASTER}: of FP32's improvement at a rate of {FINE_RATE}"
        claims.append(Claim.below(what, row["kept"], 0.5))
    return claims


def as_text(row: dict[str, Any]) -> str:
    """Format a difference and its standard error."""
    error = f" +- {row['standard_error']:.4f}" if "standard_error" in row else ""
    return f"{row['difference']:.4f}{error}"


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Print rows. improved: the share of FP32's improvement by fine-tuning that a recipe reaches."""
    for stage in dict.fromkeys(row["stage"] for row in rows):
        table = Table(title=f"{stage}: nats per byte, and the difference to FP32 over paired seeds")
        columns = ["recipe", "validation", "difference", "standard error", "by seed", "in training"]
        columns += ["improved"] if stage == "fine-tuning" else []
        for column in columns:
            table.add_column(column, justify="left" if column == "recipe" else "right")
        for row in rows:
            if row["stage"] == stage:
                cells = [row["recipe"], f"{row['validation']:.4f}", f"{row['difference']:+.4f}"]
                cells.append(f"{row['standard_error']:.4f}" if "standard_error" in row else "")
                cells.append(" ".join(f"{each:+.4f}" for each in row["differences"]))
                cells.append(f"{row['training_difference']:+.4f}")
                cells += [f"{row['kept']:.2f}"] if "kept" in row else []
                table.add_row(*cells)
        console.print(table)
