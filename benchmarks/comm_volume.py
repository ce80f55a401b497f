"""Bytes that a rank sends in a step, counted and by formula, and a model of when FP8 is faster.

    python benchmarks/comm_volume.py --out comm_volume.json

Counted: the model of examples/train_lm.py takes a step on 2 and on 4 ranks, with ds_fp8 and with stock
DeepSpeed, ZeRO 1 and 2. The inputs of every collective are added up, and converted to the bytes that a rank
sends for them in a ring or in pairs. The script ends if the bytes of a run differ from the formula's by more
than padding. "reduce to owners" is stock with use_multi_rank_bucket_allreduce: false, FP32 with
communication_data_type.

By formula: bytes per parameter that a rank sends for gradients, and those of them that leave its node, up to
1,024 ranks. Modelled: the time of a bucket's exchange, from latency and bandwidth of the two links of a rank
(inside its node, out of it); `benchmarks/comm_model.py` explains how.
"""

import argparse
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from comm_model import OURS, STOCK, WAYS, Cluster, all_gather, fastest, fp8_wins_from
from ranks_cpu import run_ranks
from rich.console import Console
from rich.table import Table
from timing import parser_of, round_count, write

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

COUNTED = (2, 4)
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BUCKETS = (1 << 16, 1 << 20, 1 << 24, 1 << 28)  # elements
COLLECTIVES = {
    "alltoall_base_": "all-to-all",
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "_allgather_base_": "all-gather",
}


def runs(ranks: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return, by run, the formula for its gradients, and what it adds to the ds_config."""

    def stage(number: int, **zero: Any) -> dict[str, Any]:
        return {"zero_optimization": {"stage": number, **zero}}

    fp8 = {"enabled": True, "opt_level": "O2"}
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for number in (1, 2):
        found[f"stock BF16, ZeRO {number}"] = ("BF16 all-reduce", stage(number))
        wide = {"communication_data_type": "fp32", **stage(number, reduce_scatter=False)}
        found[f"stock FP32, ZeRO {number}"] = ("FP32 all-reduce", wide)
        found[f"ds_fp8, ZeRO {number}"] = ("FP8 one hop", {"fp8": fp8, **stage(number)})
    reduce = stage(2, use_multi_rank_bucket_allreduce=False)
    found["stock BF16, ZeRO 2, reduce to owners"] = ("BF16 reduce", reduce)
    if ranks > 2:
        for between, way in {"e4m3": "FP8 two hops", "bf16": "FP8 two hops, BF16 between"}.items():
            nodes = {"intra_node_size": 2, "inter_node_dtype": between}
            config = {"fp8": {**fp8, "gradients": nodes}, **stage(2)}
            found[f"ds_fp8, ZeRO 2, nodes of 2, {between} between"] = (way, config)
    return found


def count(additions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, on a rank, the bytes of one step with each ds_config, and the model's parameters."""
    import deepspeed
    from meters import Traffic
    from train_lm import ByteGPT, Corpus, Shape, read_corpus

    found = []
    batches = Corpus(read_corpus("topics"), Shape().context).batches(2, torch.distributed.get_rank())
    for addition in additions:
        model = ByteGPT(Shape())
        parameters = model.parameters()
        engine = deepspeed.initialize(model=model, model_parameters=parameters, config=ds_config(addition))[0]
        for _ in range(2):
            with Traffic(node_size=2) as traffic:
                engine.backward(engine(next(batches)))
                engine.step()
        engine.destroy()
        sums = {name: dict(getattr(traffic, name)) for name in ("handed", "sent", "crossed")}
        found.append({"parameters": sum(each.numel() for each in model.parameters()), **sums})
    return found


def ds_config(addition: dict[str, Any]) -> dict[str, Any]:
    params = {"lr": 1e-3} if "fp8" in addition else {"lr": 1e-3, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": params},
        "steps_per_print": 10**9,
        **addition,
    }


def counted(ranks: int) -> list[dict[str, Any]]:
    """Return one row per run: bytes that rank 0 sends in a step, by collective."""
    rows = []
    made = runs(ranks)
    per_run = run_ranks(ranks, count, [addition for _, addition in made.values()])[0]
    for (name, (way, _)), found in zip(made.items(), per_run, strict=True):
        formula = WAYS[way](Cluster(ranks, node_size=2)).sent * found["parameters"]
        gradients = sum(size for each, size in found["sent"].items() if each != "_allgather_base_")
        if not formula <= gradients <= formula * 1.02:
            raise SystemExit(f"{name} on {ranks} ranks: counted {gradients:,.0f}, by formula {formula:,.0f}")
        rows.append({"name": name, "ranks": ranks, "way": way, "formula": formula, **found})
    return rows


def volumes(node_size: int) -> list[dict[str, Any]]:
    """Return bytes per parameter that a rank sends by formula, and those that leave the node."""
    rows = []
    for ranks in RANKS:
        cluster = Cluster(ranks, node_size)
        gradients = {name: way(cluster) for name, way in WAYS.items()}
        row: dict[str, Any] = {"ranks": ranks}
        row |= {name: [each.sent, each.crossed] for name, each in gradients.items()}
        row |= {f"weights, {hops} hop": all_gather(cluster, 2.0, hops=hops) for hops in (1, 2)}
        rows.append(row)
    return rows


def winners(cluster: Cluster) -> list[dict[str, Any]]:
    """Return, by ranks and bucket, the best FP8 way, and its time divided by each of stock's."""
    rows = []
    for ranks in RANKS:
        here = replace(cluster, ranks=ranks)
        cells = []
        for elements in BUCKETS:
            ours, seconds = fastest(OURS, here, elements)
            ratios = {name: seconds / fastest((name,), here, elements)[1] for name in STOCK}
            cells.append({"elements": elements, "fp8": ours, "seconds": seconds, "by_stock": ratios})
        wins = {name: fp8_wins_from(here, (name,)) for name in STOCK}
        rows.append({"ranks": ranks, "buckets": cells, "fp8_wins_from": wins})
    return rows


def print_counted(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"KB that a rank sends in a step, counted; {rows[0]['parameters']:,} parameters")
    columns = ("", "ranks", *COLLECTIVES.values(), "sum", "bytes per parameter", "of gradients", "formula")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        sent, parameters = row["sent"], row["parameters"]
        total = sum(sent.values())
        gradients = total - sent["_allgather_base_"]
        figures = [f"{sent.get(name, 0) / 1000:,.1f}" for name in COLLECTIVES]
        each = [f"{size / parameters:.3f}" for size in (total, gradients, row["formula"])]
        table.add_row(row["name"], str(row["ranks"]), *figures, f"{total / 1000:,.1f}", *each)
    console.print(table)


def print_volumes(console: Console, rows: list[dict[str, Any]], node_size: int) -> None:
    names = [name for name in rows[0] if name != "ranks"]
    title = f"Bytes per parameter that a rank sends / that leave its node of {node_size}, by formula"
    table = Table(title=title)
    for column in ("ranks", *names):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row[name][0]:.3f} / {row[name][1]:.3f}" for name in names]
        table.add_row(f"{row['ranks']:,}", *cells)
    console.print(table)


def print_winners(console: Console, rows: list[dict[str, Any]], cluster: Cluster) -> None:
    links = (
        f"inside a node {cluster.intra_latency * 1e6:g} us, {cluster.intra_bandwidth / 1e9:g} GB/s; "
        f"out of it {cluster.inter_latency * 1e6:g} us, {cluster.inter_bandwidth / 1e9:g} GB/s"
    )
    table = Table(
        title=f"Model: time of FP8's best way / of stock BF16's all-reduce, / of an ideal reduce; {links}"
    )
    sizes = [f"bucket of {elements:,}" for elements in BUCKETS]
    for column in ("ranks", *sizes, "FP8 beats all-reduce from", "FP8 beats reduce from"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{' / '.join(f'{each:.2f}' for each in cell['by_stock'].values())}, {fp8_way(cell['fp8'])}"
            for cell in row["buckets"]
        ]
        wins = ["never" if each is None else f"{each:,}" for each in row["fp8_wins_from"].values()]
        table.add_row(f"{row['ranks']:,}", *cells, *wins)
    console.print(table)
    console.print("below 1 FP8 is faster, above 1 BF16")


def fp8_way(name: str) -> str:
    return name.removeprefix("FP8 ").replace(" hops", "").replace(" hop", "")


def positive(text: str) -> float:
    """Parse a positive number, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"received {text!r}, allowed: a number above 0")
    return value


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=False)
    default = Cluster(ranks=2)
    parser.add_argument("--node-size", type=round_count, default=default.node_size, help="ranks per node")
    for link in ("intra", "inter"):
        microseconds = getattr(default, f"{link}_latency") * 1e6
        gigabytes = getattr(default, f"{link}_bandwidth") / 1e9
        parser.add_argument(f"--{link}-latency", type=positive, default=microseconds, metavar="US")
        parser.add_argument(f"--{link}-bandwidth", type=positive, default=gigabytes, metavar="GB/S")
    rate = {"quantize": default.quantize_rate, "sum": default.sum_rate}
    for kernel, value in rate.items():
        help_text = "G elements per second; the default is one H200's"
        parser.add_argument(
            f"--{kernel}-rate", type=positive, default=value / 1e9, metavar="G", help=help_text
        )
    return parser


def main() -> None:
    parser = options()
    arguments = parser.parse_args()
    if any(ranks > arguments.node_size and ranks % arguments.node_size for ranks in RANKS):
        parser.error(f"--node-size: received {arguments.node_size}, allowed: powers of two")
    cluster = Cluster(
        ranks=2,
        node_size=arguments.node_size,
        intra_latency=arguments.intra_latency / 1e6,
        intra_bandwidth=arguments.intra_bandwidth * 1e9,
        inter_latency=arguments.inter_latency / 1e6,
        inter_bandwidth=arguments.inter_bandwidth * 1e9,
        quantize_rate=arguments.quantize_rate * 1e9,
        sum_rate=arguments.sum_rate * 1e9,
    )
    console = Console(width=200)
    counts = [row for ranks in (COUNTED[:1] if arguments.quick else COUNTED) for row in counted(ranks)]
    print_counted(console, counts)
    formulas, model = volumes(cluster.node_size), winners(cluster)
    print_volumes(console, formulas, cluster.node_size)
    print_winners(console, model, cluster)
    write(arguments.out, {"counted": counts, "formula": formulas, "cluster": asdict(cluster), "model": model})


if __name__ == "__main__":
    main()
