"""The deviation of Adam over low-precision states from FP32 Adam on the same gradients.

    python benchmarks/update_error.py --out update_error.json

What it shows: O2's and O2+'s states follow FP32 Adam in four regimes (regimes.py), also if gradients spread
over many orders of magnitude and 8-bit peers break; the effect of the clamp; every pair of formats.

A tensor of 262,144 elements starts at zero; AdamW, lr 1e-3, beta1 .9, eps 1e-8, no weight decay. The error
is |dp - dp_fp32| / |dp_fp32|, dp the total change of the masters of elements that get a gradient, as a mean
over --seeds. For every pair of formats of exp_avg and exp_avg_sq the masters are FP32, so that the error is
that of the pair alone; the levels, and O2's states with every master, are as built, and their error includes
the rounding of the master. The JSON also has the error of the worst seed, the largest single difference, and
the drift of elements without a gradient, both in lr.

Peers: torchao's and bitsandbytes' own optimizers; FP8-LM's and Transformer Engine's states, one scale per
tensor, are simulated. B: bytes of exp_avg and exp_avg_sq per parameter, with scales and code tables.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from claims import print_claims
from peers_cpu import PeerError, bitsandbytes_8bit, first_line, nbytes, torchao_8bit, torchao_fp8
from regimes import COLUMNS, REGIMES, Regime, gradients
from rich.console import Console
from simulated import RoundedAdamW
from timing import facts, parser_of, round_count, write
from torch import Tensor
from update_claims import ALONE, judge, print_rows

from ds_fp8.config.section import OptimizerSection
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BY_NAME, E4M3, FP16
from ds_fp8.ops.masters import load_masters
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW

LR = 1e-3
BLOCK = 128


@dataclass(frozen=True)
class Recipe:
    """An optimizer to compare."""

    name: str
    make: Callable[..., Any]  # called with the parameter, and with hyperparameters as keywords
    kind: str = "peer"  # or "states", with FP32 masters, or "as built"
    clamp: bool | None = None  # None: a peer, which has none
    size: float | None = None  # bytes of its two states per parameter, if they are simulated
    master: str = "fp32"


def ours(name: str, kind: str, level: str, **states: Any) -> Recipe:
    """Return a recipe of FP8AdamW without DeepSpeed; states: keys of its section."""
    fp8 = {"opt_level": level, "optimizer": states}

    def make(parameter: Tensor, **hyperparameters: Any) -> Any:
        return FP8AdamW([parameter], fp8=fp8, **hyperparameters)

    master = states.get("master_dtype", ALONE[level].master)
    return Recipe(name, make, kind, states.get("clamp", True), master=master)


def simulated(name: str, size: float, **formats: Any) -> Recipe:
    def make(parameter: Tensor, **hyperparameters: Any) -> Any:
        return RoundedAdamW([parameter], **formats, **hyperparameters)

    return Recipe(name, make, size=size)


PEERS = [
    Recipe("torchao AdamWFp8", torchao_fp8),
    Recipe("torchao AdamW8bit", torchao_8bit),
    Recipe("bitsandbytes AdamW8bit", bitsandbytes_8bit),
    simulated("FP8-LM: e4m3, fp16 per tensor (simulated)", 3.0, exp_avg=E4M3, exp_avg_sq=FP16),
    simulated("TE: e4m3, e4m3 per tensor (simulated)", 2.0, exp_avg=E4M3, exp_avg_sq=E4M3),
]


def formats_of(key: str) -> tuple[str, ...]:
    """Return the formats that a key of the section allows."""
    return tuple(get_args(get_args(OptimizerSection.model_fields[key].annotation)[0]))


def pairs() -> Iterator[Recipe]:
    """Yield every pair of formats of exp_avg and exp_avg_sq, with and without the clamp."""
    for clamp in (True, False):
        for m in formats_of("exp_avg_dtype"):
            for v in formats_of("exp_avg_sq_dtype"):
                formats = {"master_dtype": "fp32", "exp_avg_dtype": m, "exp_avg_sq_dtype": v}
                yield ours(f"{m}, {v}", "states", "O1", clamp=clamp, **formats)


def built() -> Iterator[Recipe]:
    """Yield the levels, also with other draws and rounding of moments, and O2's states with other masters."""
    for level in ALONE:
        yield ours(level, "as built", level)
    for level in ("O2", "O2+"):
        yield ours(f"{level}, independent draws", "as built", level, draws="independent")
        yield ours(f"{level}, e4m3 exp_avg", "as built", level, exp_avg_dtype="e4m3")
        yield ours(f"{level}, e4m3 exp_avg, spread", "as built", level, exp_avg_dtype="e4m3", draws="spread")
    for master in ("bf16", "split16", "split8"):
        yield ours(f"O2, {master} master", "as built", "O2", master_dtype=master)
    for master in ("fp16", "bf16", "split8"):
        name = f"O2, {master} master, nearest"
        yield ours(name, "as built", "O2", master_dtype=master, rounding="nearest")


class Run:
    """A recipe's steps on its own copy of the tensor."""

    def __init__(self, recipe: Recipe, rows: int, beta2: float) -> None:
        self._recipe = recipe
        dtype = torch.bfloat16 if BY_NAME[recipe.master].split else torch.float32
        self._parameter = torch.nn.Parameter(torch.zeros(rows, COLUMNS, dtype=dtype))
        self._parameter.grad_dtype = torch.float32
        hyperparameters = {"lr": LR, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
        self._optimizer = recipe.make(self._parameter, **hyperparameters)

    def step(self, gradient: Tensor) -> None:
        self._parameter.grad = gradient
        self._optimizer.step()

    @property
    def way(self) -> Tensor:
        """Total change of the masters, from zero on."""
        state, weights = self._optimizer.state[self._parameter], self._parameter.detach()
        if "master" not in state:
            return weights
        fmt = BY_NAME[self._recipe.master]
        master = Blocks(state["master"].view(fmt.dtype).view(-1, BLOCK), state.get("master_scales"), fmt)
        values = torch.zeros(weights.numel())
        load_masters(master, weights.view(-1, BLOCK), values)
        return values.view(weights.shape)

    @property
    def size(self) -> float:
        """Bytes per parameter of exp_avg and exp_avg_sq."""
        if self._recipe.size is not None:
            return self._recipe.size
        state = self._optimizer.state[self._parameter]
        held = sum(nbytes(value) for key, value in state.items() if not key.startswith("master"))
        return held / self._parameter.numel()


def exact(parameter: Tensor, **hyperparameters: Any) -> Any:
    return torch.optim.AdamW([parameter], **hyperparameters)


def follow(recipes: list[Recipe], regime: Regime, rows: int, seed: int) -> Iterator[dict[str, float]]:
    """Run all recipes together, step by step; yield the deviation of each from FP32."""
    reference = Run(Recipe("fp32", exact), rows, regime.beta2)
    runs = [Run(recipe, rows, regime.beta2) for recipe in recipes]
    gets_gradient = torch.zeros(rows, COLUMNS, dtype=torch.bool)
    for gradient in gradients(regime, rows, seed):
        gets_gradient |= gradient != 0
        for run in (reference, *runs):
            run.step(gradient)
    expected = reference.way[gets_gradient]
    for run in runs:
        way = run.way
        difference = way[gets_gradient] - expected
        yield {
            "error": float(difference.norm() / expected.norm()),
            "largest_lr": float(difference.abs().max() / LR),
            "drift_lr": float(way[~gets_gradient].abs().max() / LR),
            "bytes": run.size,
        }


def measure(recipes: list[Recipe], rows: int, seeds: int, steps: int | None = None) -> list[dict[str, Any]]:
    """Return a row per recipe; steps: instead of the regimes' own."""
    results: list[dict[str, Any]] = [
        {"name": each.name, "kind": each.kind, "clamp": each.clamp, "regimes": {}} for each in recipes
    ]
    for name, regime in REGIMES.items():
        shortened = replace(regime, steps=steps or regime.steps)
        by_seed = [list(follow(recipes, shortened, rows, seed)) for seed in range(seeds)]
        for result, figures in zip(results, zip(*by_seed, strict=True), strict=True):
            result["bytes"] = figures[0]["bytes"]
            result["regimes"][name] = {
                "error": statistics.fmean(each["error"] for each in figures),
                "worst_error": max(each["error"] for each in figures),
                "largest_lr": max(each["largest_lr"] for each in figures),
                "drift_lr": max(each["drift_lr"] for each in figures),
            }
    return results


def runnable(rows: int, *, quick: bool) -> tuple[list[Recipe], dict[str, str]]:
    """Return the peers that take a step here, and the reasons of the others."""
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
        except Exception as error:  # any failure of a peer is reported
            not_run[peer.name] = f"does not run: {type(error).__name__}: {first_line(error)}"
    return able, not_run


def main() -> None:
    parser = parser_of(__doc__, rounds=False)
    parser.add_argument("--seeds", type=round_count, help="number of seeds of the gradients; default 3")
    arguments = parser.parse_args()
    quick = arguments.quick
    rows, seeds, steps = (8, 1, 5) if quick else (256, 3, None)
    warnings.simplefilter("ignore")  # torch.compile's warnings about peers
    console = Console(width=132)
    machine = facts()
    peers, not_run = runnable(rows, quick=quick)
    results = measure([*pairs(), *built(), *peers], rows, arguments.seeds or seeds, steps)
    print_rows(results, console)
    for name, reason in not_run.items():
        console.print(f"{name}: {reason}", markup=False)
    claims = list(judge(results))
    print_claims(claims, console)
    found = {"rows": results, "not_run": not_run, "claims": [asdict(each) for each in claims]}
    write(arguments.out, {"machine": machine, **found})


if __name__ == "__main__":
    main()
