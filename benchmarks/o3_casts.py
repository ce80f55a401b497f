"""The effect of casts on real activations and gradients, early and late in training, by shape of the scales.

    nice python benchmarks/o3_casts.py --out benchmarks/cpu/o3_casts.json

A byte-level GPT (examples/train_lm.py) and a Hugging Face Llama, both of about 3 M parameters, train by O3
with every linear layer in FP8, emulated. At an early step and at the last one every input x of a linear layer
and every gradient dy of its output are cast as for products, and in other ways:

    rows      a scale per token and 128 features: x in forward, dy for the gradient of x
    columns   a scale per feature and 128 tokens: dy for the gradient of the weight
    tiles     a scale per 128 x 128: x for the gradient of the weight

Printed are shares of non-zero elements: "underflow", whose code is zero, and "saturated", at the largest code
(values that round to it; none is clipped); and the spread, log2 of the largest scale over the smallest. Each
as the mean over the layers, and the worst layer's.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from claims import Claim, print_claims
from o3_losses import EVERY_LINEAR, SIZE
from precision import SIZES, Size, rate, start
from recipes import engine
from rich.console import Console
from rich.table import Table
from timing import facts, parser_of, write
from torch import Tensor, nn
from train_lm import ByteGPT, Corpus, read_corpus, train_step

from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.products import TILE, Operand, cast_gradient, cast_input
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter

EARLY, STEPS = 10, 300
FIGURES = ("underflow", "saturated", "amax_spread")
MOST = 0.01  # share of underflow, in the mean over the layers, with the casts of products
TAKEN = ("x rows", "x tiles", "dy rows", "dy columns")
Shares = dict[str, float]


class Llama(nn.Module):
    """Hugging Face's, over bytes; returns the mean cross entropy of the next byte."""

    def __init__(self, size: Size) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        shape = size.shape
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                intermediate_size=shape.width * 43 // 16,
                vocab_size=256,
                max_position_embeddings=shape.context + 1,
                use_cache=False,
            )
        )

    def forward(self, text: Tensor) -> Tensor:  # [batch, context + 1] int64
        loss: Tensor = self.llama(input_ids=text, labels=text).loss
        return loss


MODELS: dict[str, Callable[[Size], nn.Module]] = {"GPT": lambda size: ByteGPT(size.shape), "Llama": Llama}


def figures(values: Tensor, cast: Operand) -> Shares:
    """Return shares. values: [rows, inner], or all zeros; the cast may have more of both, as padding."""
    rows, inner = values.shape
    scales = cast.scales.repeat_interleave(TILE, 1)[:, :inner]
    if len(cast.scales) != len(cast.codes):
        scales = scales.repeat_interleave(TILE, 0)
    live = values != 0
    codes, scales = cast.codes[:rows, :inner].float().abs()[live], scales[:rows][live]
    if not len(codes):
        return dict.fromkeys(FIGURES, 0.0)
    shares = ((codes == 0).double().mean(), (codes == E4M3.max).double().mean())
    return dict(zip(FIGURES, map(float, (*shares, (scales.max() / scales.min()).log2())), strict=True))


def of_input(x: Tensor) -> dict[str, Shares]:
    """x: [tokens, K] bfloat16."""
    cast = cast_input(x, wgrad=True)
    assert cast.wgrad is not None
    return {"x rows": figures(x, cast.forward), "x tiles": figures(x.t(), cast.wgrad)}


def of_gradient(dy: Tensor) -> dict[str, Shares]:
    """dy: [tokens, N] bfloat16."""
    cast, tiled = cast_gradient(dy, dgrad=True, wgrad=True, bias=False), cast_input(dy, wgrad=True).wgrad
    assert cast.dgrad is not None
    assert cast.wgrad is not None
    assert tiled is not None
    return {
        "dy rows": figures(dy, cast.dgrad),
        "dy columns": figures(dy.t(), cast.wgrad),
        "dy tiles": figures(dy.t(), tiled),
    }


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, dict[str, Shares]]]:
    """Collect figures by layer of the forwards and backwards within the `with`; the last of each counts."""
    found: dict[str, dict[str, Shares]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, FP8Parameter):
            layer = found.setdefault(name, {})

            def before(_: nn.Module, inputs: Any, layer: dict[str, Shares] = layer) -> None:
                layer.update(of_input(inputs[0].detach().flatten(0, -2)))

            def after(_: nn.Module, __: Any, outputs: Any, layer: dict[str, Shares] = layer) -> None:
                layer.update(of_gradient(outputs[0].detach().flatten(0, -2)))

            handles += [module.register_forward_pre_hook(before), module.register_full_backward_hook(after)]
    yield found
    for each in handles:
        each.remove()


def trained(model: nn.Module, size: Size, steps: int) -> Iterator[tuple[int, dict[str, dict[str, Shares]]]]:
    """Yield figures of every layer at the early step and at the last one."""
    built = engine(model, size.batch, bf16=True, fp8={"opt_level": "O3", "weights": EVERY_LINEAR})
    batches = Corpus(read_corpus("topics"), size.shape.context).batches(size.batch, 0)
    for step in range(1, steps + 1):
        for group in built.optimizer.param_groups:
            group["lr"] = rate(step - 1, steps)
        if step not in (min(EARLY, steps - 1), steps):
            train_step(built, batches)
            continue
        with watched(built.module) as found:
            train_step(built, batches)
        yield step, found
    built.destroy()


def rows_of(model: str, step: int, layers: dict[str, dict[str, Shares]]) -> list[dict[str, Any]]:
    """Return a row per cast: the mean over the layers, and the worst layer."""
    rows = []
    for cast in next(iter(layers.values())):
        by_figure = {each: [layer[cast][each] for layer in layers.values()] for each in FIGURES}
        means = {each: statistics.fmean(values) for each, values in by_figure.items()}
        worst = {each: max(values) for each, values in by_figure.items()}
        rows.append({"model": model, "step": step, "cast": cast, "mean": means, "worst": worst})
    return rows


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """Return claims about the casts that products use."""
    underflow: dict[str, float] = {}
    for row in rows:
        if row["cast"] in TAKEN:
            text = f"{row['model']}, step {row['step']}: underflow of the worst of {', '.join(TAKEN)}"
            underflow[text] = max(underflow.get(text, 0.0), row["mean"]["underflow"])
    return [Claim.at_most(text, share, MOST) for text, share in underflow.items()]


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="mean over the layers (worst layer)")
    for column in ("", "step", "cast", *FIGURES):
        table.add_column(column)
    for row in rows:
        texts = [f"{row['mean'][each]:.1e} ({row['worst'][each]:.1e})" for each in FIGURES[:2]]
        texts.append(f"{row['mean'][FIGURES[2]]:.1f} ({row['worst'][FIGURES[2]]:.0f})")
        table.add_row(row["model"], str(row["step"]), row["cast"], *texts)
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__, rounds=False)
    parser.set_defaults(out=Path("o3_casts.json"))
    arguments = parser.parse_args()
    os.environ["DS_FP8_PRODUCTS"] = "emulated"
    size, steps = (SIZES["tiny"], 3) if arguments.quick else (SIZE, STEPS)
    machine, console = facts(), Console(width=132)
    start()
    rows: list[dict[str, Any]] = []
    for name, build in MODELS.items():
        torch.manual_seed(0)
        for step, layers in trained(build(size), size, steps):
            rows += rows_of(name, step, layers)
            write(arguments.out, {"machine": machine, "size": asdict(size), "rows": rows})
    print_rows(rows, console)
    claims = claims_of(rows)
    print_claims(claims, console)
    found = {"machine": machine, "size": asdict(size), "rows": rows}
    write(arguments.out, {**found, "claims": [asdict(each) for each in claims]})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
