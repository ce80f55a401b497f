"""DeepSpeed's estimators of memory by their names, for ZeRO 1, 2 and 3 with FP8.

Each prints a table of what a GPU holds, without activations: stock DeepSpeed BF16, then FP8 at every level.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial

from torch import nn

from ds_fp8.config.refusals import refusal
from ds_fp8.estimate.methods import (
    STOCK,
    STOCK_BF16_STATES,
    Held,
    Method,
    levels,
    refusals,
)
from ds_fp8.estimate.runs import Model, Run, model_of_module, model_of_size, run_at_defaults
from ds_fp8.output import in_units, show_line, show_table

ONLY_ZERO3 = ("persistent", "fetched")  # columns


def estimate_zero1_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what each GPU holds of this model under ZeRO 1, without activations.

    Args:
        model: on any device, also on the meta device; parameters without requires_grad count as frozen.
        num_gpus_per_node: GPUs per node.
        num_nodes: nodes.

    Raises:
        ValueError: a number is less than 1, or no parameter trains.
    """
    _show(lambda _: model_of_module(model), 1, num_gpus_per_node, num_nodes)


def estimate_zero1_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what each GPU holds under ZeRO 1 of a model of which only the size is known.

    Args:
        total_params: parameters of the model.
        num_gpus_per_node: GPUs per node.
        num_nodes: nodes.

    Raises:
        ValueError: a number is less than 1.
    """
    _show(partial(_cold, total_params), 1, num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what each GPU holds of this model under ZeRO 2, without activations.

    Args:
        model: on any device, also on the meta device; parameters without requires_grad count as frozen.
        num_gpus_per_node: GPUs per node.
        num_nodes: nodes.

    Raises:
        ValueError: a number is less than 1, or no parameter trains.
    """
    _show(lambda _: model_of_module(model), 2, num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what each GPU holds under ZeRO 2 of a model of which only the size is known.

    Args:
        total_params: parameters of the model.
        num_gpus_per_node: GPUs per node.
        num_nodes: nodes.

    Raises:
        ValueError: a number is less than 1.
    """
    _show(partial(_cold, total_params), 2, num_gpus_per_node, num_nodes)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what each GPU holds of this model under ZeRO 3, without activations.

    Args:
        model: on any device, also on the meta device; parameters without requires_grad count as frozen.
        num_gpus_per_node: GPUs per node.
        num_nodes: nodes.

    Raises:
        ValueError: a number is less than 1, or no parameter trains.
    """
    _show(lambda _: model_of_module(model), 3, num_gpus_per_node, num_nodes)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int, largest_layer_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1
) -> None:
    """Print what each GPU holds under ZeRO 3 of a model of which only the size is known.

    Args:
        total_params: parameters of the model.
        largest_layer_params: parameters of the largest layer, which is whole while it computes.
        num_gpus_per_node: GPUs per node.
        num_nodes: nodes.

    Raises:
        ValueError: a number is less than 1.
    """
    _require_positive("largest_layer_params", largest_layer_params)
    _show(partial(_cold, total_params), 3, num_gpus_per_node, num_nodes, largest_layer_params)


def show(model: Model, run: Run, methods: Sequence[Method]) -> None:
    """One row per method: bytes of each kind, then their sum."""
    frozen = f", {in_units(model.frozen)} of them frozen" if model.frozen else ""
    counted = f" ({model.counted})" if model.counted else ""
    show_line(f"{model.name}: {in_units(model.parameters)} parameters{frozen}{counted}")
    refused = refusals(methods, model, run)
    held = {method.name: method.held(model, run) for method in methods if method.name not in refused}
    columns = [each.name for each in fields(Held) if run.stage == 3 or each.name not in ONLY_ZERO3]
    if not any(parts.host for parts in held.values()):
        columns.remove("host")
    show_table(
        ("", *columns, "per GPU"),
        (
            (name, *(in_units(getattr(parts, each), "B") for each in columns), in_units(parts.total, "B"))
            for name, parts in held.items()
        ),
    )
    for method in methods:
        words = refused.get(method.name) or method.note(model)
        if words is not None:
            show_line(f"{method.name}: {words}")


def _cold(total_params: int, run: Run) -> Model:
    _require_positive("total_params", total_params)
    return model_of_size(total_params, run)


def _show(
    model_for: Callable[[Run], Model], stage: int, num_gpus_per_node: int, num_nodes: int, layer: int = 0
) -> None:
    """layer: elements that ZeRO 3 fetches at a time, at least."""
    _require_positive("num_gpus_per_node", num_gpus_per_node)
    _require_positive("num_nodes", num_nodes)
    run = run_at_defaults(num_gpus_per_node * num_nodes, stage)
    keys = run.fetching
    run = replace(run, fetching=replace(keys, max_live_parameters=max(keys.max_live_parameters, layer)))
    nodes, gpus = ("node", "nodes")[num_nodes > 1], ("GPU", "GPUs")[num_gpus_per_node > 1]
    show_line(f"What a GPU holds under ZeRO {stage}, without activations:")
    show_line(f"{num_nodes} {nodes}, {num_gpus_per_node} {gpus} per node")
    show(model_for(run), run, (STOCK, STOCK_BF16_STATES, *levels().values()))


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refusal(name, value, "an integer, 1 or more")
