"""What `hf_llama.py` says of its runs: a table, and claims beside stock DeepSpeed's run."""

import statistics
from typing import Any

from claims import Claim, print_claims
from gpu_train import CONSOLE, claims_of_memory_and_time, loss_apart
from rich.table import Table

Run = dict[str, Any]


def choice_of(run: Run) -> tuple[str, ...]:
    """Return the configuration, and what a contestant chooses beside it."""
    options = run["options"]
    found = [run["config"], f"{options['micro_batch']} x {options.get('micro_steps', 1)}"]
    if options["checkpointing"] == "True":
        kept = int(options.get("kept_layers", 0))
        found.append(f"checkpointing but for {kept} layers" if kept else "checkpointing")
    if options.get("deterministic") == "True":
        found.append("deterministic")
    compiled = {"model": ["compiled"], "layers": ["compiled"], "graphs": ["compiled", "CUDA graphs"]}
    return (*found, *compiled.get(options["compile"], []))


def gathered(runs: list[Run]) -> list[Run]:
    """Merge runs into one per configuration and choice: medians of the steps of all its runs."""
    found = []
    for choice in dict.fromkeys(map(choice_of, runs)):
        same = [run for run in runs if choice_of(run) == choice]
        times = [each for run in same for each in run["milliseconds"]]
        found.append({**same[0], "milliseconds_per_step": statistics.median(times), "runs": len(same)})
    return found


def report(runs: list[Run]) -> None:
    compared = gathered(runs)
    stock = next((run for run in compared if "bf16" in run["config"]), None)
    table = Table(title=f"Llama {runs[0]['model']}, {runs[0]['ranks']} x {runs[0]['device']}")
    columns = ("", "runs", "ms/step", "/ stock", "tokens/s", "peak GB", "states GB", "sent B/param", "loss")
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for run in compared:
        ratio = run["milliseconds_per_step"] / stock["milliseconds_per_step"] if stock else 1.0
        table.add_row(
            ", ".join(choice_of(run)),
            str(run["runs"]),
            f"{run['milliseconds_per_step']:,.1f}",
            f"{ratio:.3f}",
            f"{run.get('tokens', 0) / run['milliseconds_per_step'] * 1000:,.0f}",
            *(f"{run[key] / 1e9:.2f}" for key in ("peak_bytes_allocated", "predicted_bytes")),
            f"{sum(run['sent'].values()) / run['parameters']:.3f}",
            f"{run['losses'][-1]:.4f}",
        )
    CONSOLE.print(table)
    ours = [run for run in compared if not is_bf16(run)] if stock else []
    options = runs[0]["options"]
    shared = any(int(options.get(key, 1)) > 1 for key in ("sequence_parallel", "tensor_parallel"))
    claims = claims_of_a_training if shared else claims_beside
    found = [claim for run in ours for claim in (*claims(run, stock), *claims_of_wire(run))]
    print_claims(found, CONSOLE)


def claims_beside(run: Run, stock: Run) -> list[Claim]:
    alike = choice_of(run)[1:] == choice_of(stock)[1:]
    return claims_of_memory_and_time(run, stock, 0.92, same_activations=alike)


def claims_of_wire(run: Run) -> list[Claim]:
    """Claim that a step sends the bytes of gradients that the estimate says."""
    exchanged, expected = run["sent"].get("alltoall_base_"), run.get("gradient_bytes")
    if not exchanged or not expected:
        return []
    name = f"{run['model']} {run['config']}, {run['world_size']} ranks: "
    text = name + "bytes of gradients sent, relative error of the estimate"
    return [Claim.at_most(text, abs(exchanged / expected - 1), 0.02)]


def is_bf16(run: Run) -> bool:
    """Whether it is a peer without FP8: stock DeepSpeed or FSDP2."""
    return any(name in run["config"] for name in ("bf16", "fsdp2"))


def claims_of_a_training(run: Run, stock: Run) -> list[Claim]:
    """Claim that it trains as stock does: step by step until roundings make them diverge, then on average."""
    name = f"{run['model']} {run['config']}, {run['world_size']} ranks: "
    off = abs(run["norms"][0] / stock["norms"][0] - 1)
    apart = max(
        abs(ours - theirs) for ours, theirs in zip(run["losses"][:10], stock["losses"][:10], strict=True)
    )
    return [
        Claim.at_most(name + "losses of the first 10 steps, from stock's", apart, 0.02),
        Claim.at_most(name + "loss of the last 50 steps, from stock's", abs(loss_apart(run, stock)), 0.02),
        Claim.at_most(name + "first norm, relative difference to stock's", off, 0.02),
        Claim.at_most(name + "ranks with different weights", float(not run["same_everywhere"]), 0.0),
    ]
