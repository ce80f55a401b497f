"""How far Adam over low-precision states strays from FP32 Adam on the same gradients.

    python benchmarks/update_error.py --out update_error.json

What it shows: O2's and O2+'s states follow FP32 Adam in four regimes, also where gradients spread over many
orders of magnitude and 8-bit peers break; what the clamp is worth; and every other pair of formats beside them.

A tensor of rows of 1,024 starts at zero; one element in twenty never gets a gradient. A gradient is
scale * (mu + noise): mu = 0.3 * normal is an element's for good, noise is fresh at each step, and scale = 1e-4 *
exp(r * normal of the row) * exp(e * normal of the element). AdamW, lr 1e-3, beta1 .9, eps 1e-8, no weight decay.

    mild     e 0.5  r 0.5  beta2 .95   100 steps
    stress   e 1    r 1.5  beta2 .95   200 steps
    slow     e 1    r 1.5  beta2 .999  400 steps
    extreme  e 2    r 2    beta2 .95   200 steps

The error is |dp - dp_fp32| / |dp_fp32|, dp the whole way of the weights of elements that get a gradient, as a mean
over --seeds. Weights and masters are FP32, so that it is the error of exp_avg and exp_avg_sq alone. In the JSON also:
the largest single difference and the drift of elements without a gradient, both in lr.

Peers: torchao's and bitsandbytes' own optimizers; FP8-LM's and Transformer Engine's states, one scale a tensor, are
simulated. B: bytes of exp_avg and exp_avg_sq a parameter, with their scales.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers_cpu import bitsandbytes_8bit, nbytes, torchao_8bit, torchao_fp8
from rich.console import Console
from rich.table import Table
from simulated import RoundedAdamW
from timing import facts, round_count, write
from torch import Tensor

from ds_fp8.config import BUILT, LEVELS
from ds_fp8.ops.formats import E4M3, FP16
from ds_fp8.zero_fp8.optimizer import FP8AdamW

LR = 1e-3
COLUMNS = 1024
EXP_AVG = ("fp32", "bf16", "fp16", "e4m3", "e5m2")


@dataclass(frozen=True)
class Regime:
    """Spread of the gradients over elements and rows, and how long Adam follows them."""

    elements: float
    rows: float
    beta2: float
    steps: int


REGIMES = {
    "mild": Regime(0.5, 0.5, 0.95, 100),
    "stress": Regime(1.0, 1.5, 0.95, 200),
    "slow": Regime(1.0, 1.5, 0.999, 400),
    "extreme": Regime(2.0, 2.0, 0.95, 200),
}
BOUNDS = {  # of the error, in the order of the regimes
    "O2": (0.033, 0.033, 0.033, 0.033),
    "O2+": (0.043, 0.036, 0.065, 0.045),
}


@dataclass(frozen=True)
class Recipe:
    """An optimizer to follow; `size`: bytes of its two states a parameter, where they are simulated."""

    name: str
    make: Callable[..., Any]
    size: float | None = None
    clamp: bool | None = None  # None: a peer, which has none


def gradients(regime: Regime, rows: int, seed: int) -> Iterator[Tensor]:
    """One a step, [rows, 1024]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    scale = 1e-4 * (regime.rows * normal(1)).exp() * (regime.elements * normal(COLUMNS)).exp()
    mu = 0.3 * normal(COLUMNS)
    scale *= torch.rand(rows, COLUMNS, generator=generator) >= 0.05
    for _ in range(regime.steps):
        yield scale * (mu + normal(COLUMNS))


def ours(exp_avg: str, exp_avg_sq: str, *, clamp: bool) -> Recipe:
    states = {"master_dtype": "fp32", "exp_avg_dtype": exp_avg, "exp_avg_sq_dtype": exp_avg_sq}
    fp8 = {"optimizer": {**states, "clamp": clamp}}

    def make(parameter: Tensor, **hyperparameters: Any) -> Any:
        return FP8AdamW([parameter], fp8=fp8, **hyperparameters)

    return Recipe(f"{exp_avg}, {exp_avg_sq}", make, clamp=clamp)


def simulated(name: str, size: float, **formats: Any) -> Recipe:
    def make(parameter: Tensor, **hyperparameters: Any) -> Any:
        return RoundedAdamW([parameter], **formats, **hyperparameters)

    return Recipe(name, make, size)


PEERS = [
    Recipe("torchao AdamWFp8", torchao_fp8),
    Recipe("torchao AdamW8bit", torchao_8bit),
    Recipe("bitsandbytes AdamW8bit", bitsandbytes_8bit),
    simulated("FP8-LM: e4m3, fp16 a tensor (simulated)", 3.0, exp_avg=E4M3, exp_avg_sq=FP16),
    simulated("TE: e4m3, e4m3 a tensor (simulated)", 2.0, exp_avg=E4M3, exp_avg_sq=E4M3),
]


def recipes() -> list[Recipe]:
    """Every pair of formats that is built, with and without the clamp."""
    squares = [each for each in BUILT["optimizer.exp_avg_sq_dtype"] if each]
    return [ours(m, v, clamp=clamp) for clamp in (True, False) for m in EXP_AVG for v in squares]


class Run:
    """A recipe at work on its own copy of the tensor."""

    def __init__(self, recipe: Recipe, rows: int, beta2: float) -> None:
        self._parameter = torch.nn.Parameter(torch.zeros(rows, COLUMNS))
        hyperparameters = {"lr": LR, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
        self._optimizer = recipe.make(self._parameter, **hyperparameters)
        self._size = recipe.size

    def step(self, gradient: Tensor) -> None:
        self._parameter.grad = gradient
        self._optimizer.step()

    @property
    def way(self) -> Tensor:
        """What the weights have come, from zero on."""
        return self._parameter.detach()

    @property
    def size(self) -> float:
        """Bytes of exp_avg and exp_avg_sq a parameter."""
        if self._size is not None:
            return self._size
        state = self._optimizer.state[self._parameter]
        held = sum(nbytes(value) for key, value in state.items() if not key.startswith("master"))
        return held / self._parameter.numel()


def exact(parameter: Tensor, **hyperparameters: Any) -> Any:
    return torch.optim.AdamW([parameter], **hyperparameters)


def follow(recipes: list[Recipe], regime: Regime, rows: int, seed: int) -> Iterator[dict[str, float]]:
    """All recipes, step by step together, and how far each came from FP32's way."""
    reference = Run(Recipe("fp32", exact), rows, regime.beta2)
    runs = [Run(recipe, rows, regime.beta2) for recipe in recipes]
    gets_gradient = torch.zeros(rows, COLUMNS, dtype=torch.bool)
    for gradient in gradients(regime, rows, seed):
        gets_gradient |= gradient != 0
        for run in (reference, *runs):
            run.step(gradient)
    for run in runs:
        difference = (run.way - reference.way)[gets_gradient]
        yield {
            "error": float(difference.norm() / reference.way[gets_gradient].norm()),
            "largest_lr": float(difference.abs().max() / LR),
            "drift_lr": float(run.way[~gets_gradient].abs().max() / LR),
            "bytes": run.size,
        }


def measure(recipes: list[Recipe], rows: int, seeds: int, *, steps: int | None) -> list[dict[str, Any]]:
    """A row a recipe; steps: fewer than the regimes' own."""
    rows_of = [{"name": each.name, "clamp": each.clamp, "regimes": {}} for each in recipes]
    for name, regime in REGIMES.items():
        regime = Regime(regime.elements, regime.rows, regime.beta2, steps or regime.steps)
        by_seed = [list(follow(recipes, regime, rows, seed)) for seed in range(seeds)]
        for row, figures in zip(rows_of, zip(*by_seed, strict=True), strict=True):
            row["bytes"] = figures[0]["bytes"]
            row["regimes"][name] = {
                "error": statistics.fmean(each["error"] for each in figures),
                "errors": [each["error"] for each in figures],
                "largest_lr": max(each["largest_lr"] for each in figures),
                "drift_lr": max(each["drift_lr"] for each in figures),
            }
    return rows_of


def runnable(rows: int, *, quick: bool) -> tuple[list[Recipe], dict[str, str]]:
    """The peers that take a step here, and why the others do not."""
    able, not_run = [], {}
    for peer in PEERS:
        try:
            if quick and peer.make in (torchao_fp8, torchao_8bit):
                raise PeerError("left out by --quick: it compiles for half a minute")
            trial = Run(peer, rows, 0.95)
            trial.step(torch.ones(rows, COLUMNS))
            able.append(peer)
        except PeerError as reason:
            not_run[peer.name] = str(reason)
        except ImportError as error:
            not_run[peer.name] = f"not installed: {error}"
    return able, not_run


def level_of(row: dict[str, Any]) -> str | None:
    """The opt_level whose states a row's are, the clamp on."""
    if not row["clamp"]:
        return None
    pairs = {f"{level.exp_avg}, {level.exp_avg_sq}": name for name, level in LEVELS.items()}
    return pairs.get(row["name"])


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every claim with the figure found for it and what it is held against."""
    peers = [row for row in rows if row["clamp"] is None]
    claims = []
    for row in rows:
        level = level_of(row)
        if level not in BOUNDS:
            continue
        for regime, bound in zip(REGIMES, BOUNDS[level], strict=True):
            claims.append(claim(f"{level}, {regime}: error at most", error(row, regime), bound))
        for regime in ("stress", "extreme") if peers else ():
            best = min(peers, key=lambda peer: error(peer, regime))
            text = f"{level}, {regime}: error below every peer's, the best of which is {best['name']}"
            claims.append(claim(text, error(row, regime), error(best, regime)))
        better = [each["name"] for each in rows if level_of(each) != level and dominates(each, row)]
        text = f"{level}: no recipe of its bytes has less error in all four regimes; those that have"
        claims.append({"claim": text, "figure": ", ".join(better) or "none", "holds": not better})
    return claims


def claim(text: str, figure: float, bound: float) -> dict[str, Any]:
    return {"claim": text, "figure": figure, "bound": bound, "holds": figure <= bound}


def error(row: dict[str, Any], regime: str) -> float:
    return float(row["regimes"][regime]["error"])


def dominates(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """No more bytes and less error in every regime."""
    return row["bytes"] <= other["bytes"] and all(error(row, each) < error(other, each) for each in REGIMES)
