"""Health of FP8 products: what the casts of x, dy and w did, by matrix, and nothing on other steps."""

import csv
import gc
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed import comm as dist
from engines import batches, build, build_gpt, ds_config, train_losses
from fp8_weights import EMULATED, LAID_OUT, fp8_linear, random, take_over
from ranks import RankPools
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ds_fp8
from ds_fp8.ops.products import Operand
from ds_fp8.zero_fp8 import product_health
from ds_fp8.zero_fp8.health import Health
from ds_fp8.zero_fp8.product_health import IN_GRAPHS, ProductCounts, ProductHealth
from ds_fp8.zero_fp8.products import ways
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter

FIGURES = ("underflow", "saturated", "amax_spread")
NAMES = {f"{operand}_{figure}" for operand in ("x", "dy", "w") for figure in FIGURES}
O3 = {"opt_level": "O3", "weights": {"min_elements": 256}}


def uneven(*shape: int, seed: int) -> Tensor:
    """Normal values times powers of two from 2^-24 to 1, with a row of zeros."""
    powers = torch.arange(math.prod(shape)).view(shape) * 7 % 25
    values = random(*shape, seed=seed) * 2.0**-powers
    values[0] = 0
    return values.bfloat16()


def by_hand(values: Tensor, tile: tuple[int, int] = (1, 128)) -> tuple[int, int, int, list[int]]:
    """Non-zero elements, those that become zero, those that become 448; exponents, one tile after another."""
    nonzero = underflows = saturated = 0
    exponents = []
    for rows in values.double().split(tile[0]):
        for block in rows.split(tile[1], dim=1):
            exponents += [math.ceil(math.log2(amax / 448))] if (amax := block.abs().max().item()) else []
            down = block.abs() / 2.0 ** exponents[-1] if amax else block
            nonzero += int((block != 0).sum())
            underflows += int(((down > 0) & (down <= 2**-10)).sum())  # halfway to the smallest code: to even
            saturated += int((down >= 432).sum())  # halfway from 416 to 448: to even
    return nonzero, underflows, saturated, exponents


def shares_by_hand(operands: Mapping[str, tuple[int, int, int, list[int]]]) -> dict[str, float]:
    found = {}
    for operand, (nonzero, underflows, saturated, exponents) in operands.items():
        found |= {f"{operand}_underflow": underflows / nonzero, f"{operand}_saturated": saturated / nonzero}
        found[f"{operand}_amax_spread"] = max(exponents) - min(exponents)
    return found


# A layer


@pytest.fixture
def layer() -> nn.Linear:
    return fp8_linear(way=LAID_OUT)


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch, layer: nn.Linear) -> ProductHealth:
    """Of one rank, without a process group."""
    for name in ("sum_over_ranks", "max_over_ranks"):
        monkeypatch.setattr(product_health, name, lambda *_: None)
    return ProductHealth([layer.weight.matrix], torch.device("cpu"))


def collected(health: ProductHealth) -> dict[str, Any]:
    group: Any = None
    return health.collect(group, stepped=True)


@pytest.mark.parametrize("inputs_need_it", [True, False])
def test_casts_of_a_layer(layer: nn.Linear, health: ProductHealth, inputs_need_it: bool) -> None:
    """37 tokens are padded; without dgrad the gradient has scales per feature and 128 tokens."""
    x, dy = uneven(37, 160, seed=1), uneven(37, 96, seed=2)
    health.measure(True)
    layer(x.clone().requires_grad_(inputs_need_it)).backward(dy)
    counted = by_hand(dy if inputs_need_it else dy.t())
    found = collected(health)
    assert found["weight"] == found["total"] == shares_by_hand({"x": by_hand(x), "dy": counted})
    assert 0 < found["total"]["dy_underflow"] < 1
    assert found["total"]["x_saturated"] > 0
    assert found["total"]["x_amax_spread"] > 0


def test_what_is_not_training_does_not_count(layer: nn.Linear, health: ProductHealth) -> None:
    health.measure(True)
    with torch.no_grad():
        layer(random(5, 160))
    assert collected(health) == {"total": {}}
    layer(random(5, 160)).sum().backward()
    health.forget()
    assert collected(health) == {"total": {}}
    health.measure(False)
    assert layer.weight.matrix.counts is None


def test_a_sweep_that_begins_again_counts_weights_anew(layer: nn.Linear, health: ProductHealth) -> None:
    matrix, values = layer.weight.matrix, uneven(96, 160, seed=1)
    matrix.store(values)
    whole = Health(1, 1, torch.device("cpu"), stores_sqrt=True, products=health)
    whole.prepare(1)
    for _ in range(2):
        whole.begin_sweep()
        assert collected(health) == {"total": {}}
        matrix.counts.of_weight(values.view(-1), matrix.codes.view(-1), matrix.exponents)
        assert collected(health)["weight"] == shares_by_hand({"w": by_hand(values, (128, 128))})


def test_blocks_that_are_not_finite_do_not_count(layer: nn.Linear, health: ProductHealth) -> None:
    x = uneven(37, 160, seed=1)
    health.measure(True)
    spoilt = x.clone()
    spoilt[1, 3] = math.inf
    layer(spoilt)
    x[1, :128] = 0
    assert collected(health)["weight"] == shares_by_hand({"x": by_hand(x)})


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Leaves no graph behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Two matrices share an input; a third is stored as Conv1D has it, and its input needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(160, 96, bias=bias) for bias in (True, False))
        self.own = nn.Parameter(random(64, 96).float())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # [tokens, 160], [tokens, 64]
        x = x * 2
        return self.q(x) * self.k(x) + torch.addmm(torch.ones(96, dtype=x.dtype), z, self.own)


@pytest.mark.usefixtures("fresh_compiler")
def test_graphs_count_as_eager_products_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On measured steps, by the graph that runs on all others; recomputed in backward or not."""
    for name in ("sum_over_ranks", "max_over_ranks"):
        monkeypatch.setattr(product_health, name, lambda *_: None)
    torch.manual_seed(0)
    model = Block().bfloat16()
    matrices = [take_over(each, LAID_OUT, name) for name, each in model.named_parameters() if each.dim() == 2]
    health = ProductHealth(matrices, torch.device("cpu"))
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def step(run: Any, seed: int, *, measuring: bool) -> dict[str, Any]:
        health.measure(measuring)
        health.forget()
        x, z, dy = uneven(37, 160, seed=seed).requires_grad_(), uneven(37, 64, seed=9), uneven(37, 96, seed=8)
        run(x, z).backward(dy)
        return collected(health)

    assert step(compiled, 1, measuring=False) == {"total": {}}
    for seed in (1, 2):
        found = step(compiled, seed, measuring=True)
        assert found == step(model, seed, measuring=True)
        assert set(found) == {"total", "own", "q.weight", "k.weight"}
        assert {len(each) for each in found.values()} == {6}
        assert found["q.weight"]["dy_underflow"] != found["k.weight"]["dy_underflow"]
    assert step(compiled, 2, measuring=False) == step(model, 2, measuring=False)
    with torch.no_grad():
        health.measure(True)
        health.forget()
        compiled(uneven(37, 160, seed=1), uneven(37, 64, seed=9))
    assert collected(health) == {"total": {}}
    assert counter.frame_count == 2, "one with gradients, one without"


def test_an_engine_that_ends_on_a_measured_step_leaves_no_matrix() -> None:
    matrix = fp8_linear().weight.matrix
    ProductHealth([matrix], torch.device("cpu")).measure(True)
    gone = weakref.ref(matrix)
    del matrix
    gc.collect()
    assert gone() is None


def test_what_a_cuda_graph_replays_does_not_count(
    layer: nn.Linear, health: ProductHealth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would on every step; a compiled graph's ops among it."""
    for module in (ways, product_health):
        monkeypatch.setattr(module, "captured", lambda _: True)
    health.measure(True)
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        run(random(5, 160).requires_grad_()).sum().backward()
        assert collected(health) == {"total": {}}
    health.measure(False)


def test_codes_of_an_input_that_does_not_count_in_memory_of_one_that_did(
    layer: nn.Linear, health: ProductHealth
) -> None:
    x = uneven(37, 160, seed=1)
    health.measure(True)
    cast = EMULATED.kernels.cast_input(x, wgrad=False).forward
    for wgrad in (True, False):
        health.forget()
        IN_GRAPHS.cast(x, cast, wgrad)
        IN_GRAPHS.multiply(cast.codes, layer.weight.matrix.codes)
        assert collected(health).get("weight") == (shares_by_hand({"x": by_hand(x)}) if wgrad else None)
    health.measure(False)


def test_graphs_that_are_given_copies_of_exponents_count(layer: nn.Linear, health: ProductHealth) -> None:
    """The compiler copies them on a GPU where they begin at an odd address."""
    x, dy, matrix, ops = (
        uneven(37, 160, seed=1),
        uneven(37, 96, seed=2),
        layer.weight.matrix,
        torch.ops.ds_fp8,
    )
    name, weight = EMULATED.kernels.name, (matrix.codes, matrix.exponents.clone())
    health.measure(True)
    cast = ops.cast_input(name, x, True)
    ops.multiply(name, *cast[:2], *weight, None, False)
    ops.differentiate(name, dy, *weight, *cast[2:], [True, True, False], False)
    found = collected(health)["weight"]
    health.measure(False)
    assert {each.split("_")[0] for each in found} == {"x", "dy"}


# On ranks


class Pair(nn.Module):
    """A matrix whose input needs a gradient; dy is the gradient of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(160, 272, bias=False)
        self.scale = nn.Parameter(torch.ones(160))

    def forward(self, x: Tensor, dy: Tensor) -> Tensor:
        return (self.layer(x * self.scale).float() * dy).sum()


def known(steps: int) -> list[Any]:
    """Health after each step; the weight stays as it is."""
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        torch.manual_seed(0)
        model = Pair()
        with torch.no_grad():
            model.layer.weight.copy_(weight())
        fp8 = {**O3, "stats": {"interval": 2}, "optimizer": {"master_dtype": "fp32"}}
        config = ds_config(fp8, micro_steps=2, lr=0.0, weight_decay=0.0)
        engine = build(config, model)
    found = []
    for step in range(steps):
        for micro_step in range(2):
            engine.backward(engine(*inputs(step, micro_step, dist.get_rank())))
            engine.step()
        counts = engine.module.layer.weight.matrix.counts
        assert (counts is not None) == (step % 2 == 0)  # of the step that comes
        found.append(ds_fp8.stats(engine))
    engine.destroy()
    return found


def weight() -> Tensor:
    """With a tile of zeros."""
    values = uneven(272, 160, seed=5)
    values[:128, :128] = 0
    return values


def inputs(step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
    seed = 100 * step + 10 * micro_step + 2 * rank
    return uneven(37, 160, seed=seed), uneven(37, 272, seed=seed + 1)


def joined(counts: list[tuple[int, int, int, list[int]]]) -> tuple[int, int, int, list[int]]:
    nonzero, underflows, saturated, exponents = zip(*counts, strict=True)
    return sum(nonzero), sum(underflows), sum(saturated), [each for some in exponents for each in some]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_known_layer_on_ranks(ranks: RankPools, world_size: int) -> None:
    """Micro-steps and ranks add up; the weight is counted once, in the parts that ranks own."""
    runs = ranks.run(world_size, known, 4)
    assert all(each == runs[0] for each in runs)
    assert [each and each["step"] for each in runs[0]] == [None, 2, 2, 4]
    for step in (1, 3):
        given = [inputs(step, micro_step, rank) for micro_step in range(2) for rank in range(world_size)]
        x, dy = (joined([by_hand(each[side]) for each in given]) for side in range(2))
        w = by_hand(weight(), (128, 128))
        assert runs[0][step]["products"]["layer.weight"] == shares_by_hand({"x": x, "dy": dy, "w": w})


def overflown() -> dict[str, Any]:
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        engine = build(ds_config({**O3, "stats": {"interval": 1}}), Pair())
    x, dy = inputs(0, 0, 0)
    dy[3, 4] = math.inf
    engine.backward(engine(x, dy))
    engine.step()
    found = ds_fp8.stats(engine)
    engine.destroy()
    assert found is not None
    return found


def test_a_skipped_step_tells_nothing_of_weights(ranks: RankPools) -> None:
    found = ranks.run(1, overflown)[0]
    assert not found["taken"]
    assert set(found["products"]["layer.weight"]) == {each for each in NAMES if not each.startswith("w")}


def trained(
    fp8: dict[str, Any], folder: str = "", products: str = "emulated", backend: str = ""
) -> tuple[Any, Any, list[int]]:
    """Losses, health, and how often each of four steps counted something; backend: of engine.compile()."""
    config, calls = ds_config({**O3, **fp8}), [0]
    config["csv_monitor"] = {"enabled": bool(folder), "output_path": folder, "job_name": "job"}
    with patch.dict(os.environ, DS_FP8_PRODUCTS=products):
        engine = build_gpt(config)
    if backend:
        engine.compile(backend=backend)

    def watch(name: str) -> Any:
        counting = getattr(ProductCounts, name)

        def watched(self: ProductCounts, *given: Tensor | Operand) -> None:
            calls[0] += 1
            counting(self, *given)

        return patch.object(ProductCounts, name, watched)

    counted, losses, source = [], [], batches(engine)
    with watch("of_input"), watch("of_gradient"), watch("of_weight"):
        for _ in range(4):
            calls[0] = 0
            losses += train_losses(engine, source, 1)
            counted.append(calls[0])
    matrices = sum(isinstance(each, FP8Parameter) for each in engine.module.parameters())
    found = ds_fp8.stats(engine) if "stats" in fp8 else None
    engine.destroy()
    return losses, found, [each // matrices for each in counted]


def test_only_measured_steps_count_and_no_bit_changes(ranks: RankPools, tmp_path: Path) -> None:
    losses, _, counted = ranks.run(2, trained, {})[0]
    assert counted == [0] * 4
    measured, found, counted = ranks.run(2, trained, {"stats": {"interval": 2}}, str(tmp_path))[0]
    assert measured == losses
    assert counted[::2] == [0, 0]
    assert counted[1] == counted[3] > 0
    total, *layers = found["products"].values()
    assert len(layers) == 8
    for name in NAMES:
        assert total[name] == pytest.approx(sum(each[name] for each in layers) / len(layers))
    check_events(tmp_path, total)


def test_a_compiled_engine_tells_the_same(ranks: RankPools) -> None:
    eager, compiled = (
        ranks.run(1, trained, {"stats": {"interval": 2}}, "", "emulated", backend)[0]
        for backend in ("", "aot_eager")
    )
    assert compiled[1]["products"] == eager[1]["products"]
    assert set(compiled[1]["products"]["total"]) == NAMES
    assert compiled[2][1] < eager[2][1], "its inputs are counted by ops, not by products"


def check_events(folder: Path, total: dict[str, float]) -> None:
    """Totals only: no layer's."""
    files = {path.stem: path for path in folder.rglob("*FP8_products*.csv")}
    assert set(files) == {f"Train_FP8_products_{name}" for name in NAMES}
    for name in NAMES:
        rows = list(csv.reader(files[f"Train_FP8_products_{name}"].open()))[1:]
        assert [int(step) for step, _ in rows] == [2, 4]
        assert float(rows[-1][1]) == pytest.approx(total[name])


def test_products_of_decoded_weights_tell_of_weights(ranks: RankPools) -> None:
    """Nothing else is cast."""
    _, found, _ = ranks.run(1, trained, {"stats": {"interval": 2}}, "", "decoded")[0]
    assert set(found["products"]["total"]) == {each for each in NAMES if each.startswith("w")}
