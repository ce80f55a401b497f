"""DeepSpeed's estimators of memory by their names, for ZeRO 1 and 2 with FP8.

Each prints a table of what a GPU holds, without activations: stock DeepSpeed BF16, then FP8 at every level.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from torch import nn

from ds_fp8.config.refusals import refusal
from ds_fp8.estimate.methods import (
    STOCK,
    STOCK_BF16_STATES,
    Method,
    Model,
    Run,
    levels,
    model_of_module,
    model_of_size,
)
from ds_fp8.output import in_units, show_line, show_table


def estimate_zero1_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what ZeRO 1 takes of each GPU for this model, which may be on the meta device."""
    _show(lambda _: model_of_module(model), 1, num_gpus_per_node, num_nodes)


def estimate_zero1_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what ZeRO 1 takes of each GPU for a model of `total_params` parameters."""
    _show(partial(_cold, total_params), 1, num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what ZeRO 2 takes of each GPU for this model, which may be on the meta device."""
    _show(lambda _: model_of_module(model), 2, num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what ZeRO 2 takes of each GPU for a model of `total_params` parameters."""
    _show(partial(_cold, total_params), 2, num_gpus_per_node, num_nodes)


def show(model: Model, run: Run, methods: Sequence[Method]) -> None:
    """One row per method: bytes of each kind, then their sum."""
    frozen = f", {in_units(model.frozen)} of them frozen" if model.frozen else ""
    counted = f" ({model.counted})" if model.counted else ""
    show_line(f"{model.name}: {in_units(model.parameters)} parameters{frozen}{counted}")
    held = {method.name: method.held(model, run) for method in methods}
    show_table(
        ("", "weights", "states", "gradients", "buffers", "per GPU"),
        (
            (name, *(in_units(count, "B") for count in (*asdict(parts).values(), parts.total)))
            for name, parts in held.items()
        ),
    )


def _cold(total_params: int, run: Run) -> Model:
    _require_positive("total_params", total_params)
    return model_of_size(total_params, run)


def _show(model_for: Callable[[Run], Model], stage: int, num_gpus_per_node: int, num_nodes: int) -> None:
    _require_positive("num_gpus_per_node", num_gpus_per_node)
    _require_positive("num_nodes", num_nodes)
    run = Run(num_gpus_per_node * num_nodes, stage)
    nodes, gpus = ("node", "nodes")[num_nodes > 1], ("GPU", "GPUs")[num_gpus_per_node > 1]
    show_line(f"What a GPU holds under ZeRO {stage}, without activations:")
    show_line(f"{num_nodes} {nodes}, {num_gpus_per_node} {gpus} per node")
    show(model_for(run), run, (STOCK, STOCK_BF16_STATES, *levels().values()))


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refusal(name, value, "an integer, 1 or more")
