"""FP8 weights under ZeRO 3: the bits of ZeRO 2, whoever reads, edits, saves or loads them."""

import logging
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import test_o3_frozen
import test_zero3
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import (
    Lines,
    assert_same_bits,
    build,
    ds_config,
    packed,
    refusal,
    weight_bits,
    whole_states,
    zero3,
)
from fp8_weights import hold
from ranks import RankPools
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_fp8.cli import main
from ds_fp8.ops.masters import write_weights
from ds_fp8.ops.products import Operand
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.weights.sliced import fetch
from ds_fp8.zero_fp8.weights.sliced.slices import CODES, is_away
from ds_fp8.zero_fp8.weights.tiled import matrices_of

O3 = {"opt_level": "O3", "weights": {"min_elements": 128}}
BOTH = {"opt_level": "O3", "weights": {"min_elements": 128, "frozen": "e4m3"}}
MASTERS = {**O3, "checkpoint": {"weights": "masters"}}
O2 = {"optimizer": {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "ue4m4"}}
SECONDS = 60.0
SMALL = zero3(persistence=60, prefetch=2000, reuse=1000)
SOME_PERSIST = zero3(persistence=6656, prefetch=0, reuse=0)  # matrices, too


def train(kind: str, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        return test_zero3.train(kind, config, **options)


RUNS: list[tuple[int, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (1, "reentrant", SMALL, {"micro_steps": 2, "bucket": 1000}, {}),
    (2, "tied", SMALL, {"micro_steps": 2, "bucket": 4000}, {}),
    (2, "block twice", SOME_PERSIST, {"bucket": 10**6}, {"spoil": 2}),
    (3, "checkpointing", SMALL, {"bucket": 1000}, {}),
    (3, "frozen", SMALL, {"bucket": 4000}, {}),
    (3, "head by function", {**SOME_PERSIST, "overlap_comm": True}, {"bucket": 4000}, {}),
]


@pytest.mark.parametrize(
    ("world_size", "kind", "zero", "run", "options"), RUNS, ids=lambda each: str(each)[:12]
)
def test_zero_3_is_zero_2_bit_for_bit(
    ranks: RankPools,
    world_size: int,
    kind: str,
    zero: dict[str, Any],
    run: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Losses, norms, skips, weights and states; matrices are cut within tiles and rows."""
    fp8 = BOTH if kind == "frozen" else O3
    two, three = (
        ranks.run(
            world_size, train, kind, ds_config(fp8, stage=stage, zero=keys, **run), options, seconds=SECONDS
        )
        for stage, keys in ((2, {}), (3, zero))
    )
    test_zero3.assert_equal(three, two)
    for each in three:
        assert_same_bits(each["weights"], three[0]["weights"])


@contextmanager
def engine_of(
    fp8: dict[str, Any] = O3,
    *,
    stage: int = 3,
    zero: dict[str, Any] = SMALL,
    kind: str = "plain",
    scale: float = 1.0,
) -> Iterator[Any]:
    """An engine, destroyed at the end; scale: of the weights that it is given."""
    config = ds_config(fp8, stage=stage, zero=zero if stage == 3 else {}, bucket=4000)
    torch.manual_seed(0)
    model = test_zero3.Model(kind, *test_zero3.CODED)
    for each in model.parameters():
        each.data.mul_(scale)
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        engine = build(config, model)
    yield engine
    engine.destroy()


def steps(engine: Any, count: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + count):
        loss = engine(test_zero3.tokens_of(engine, step, 0))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def coded(engine: Any) -> dict[str, Any]:
    """The parameters that are codes, by name."""
    return {name: each for name, each in engine.module.named_parameters() if hasattr(each, CODES)}


def slices_of(engine: Any) -> dict[str, Tensor]:
    """What this rank holds of codes, and all exponents."""
    found = {name: each.ds_tensor.clone() for name, each in coded(engine).items()}
    return found | {each.name: each.exponents.clone() for each in matrices_of(engine.optimizer.parts.weights)}


def gathered(engine: Any) -> dict[str, Tensor]:
    return {name: each.view(torch.bfloat16) for name, each in weight_bits(engine).items()}


def read_everywhere() -> None:
    """What modules multiply, GatheredParameters, a 16-bit state_dict and a save have the same bits."""
    with engine_of(zero={**SMALL, "stage3_gather_16bit_weights_on_model_save": True}) as engine:
        steps(engine, 2)
        assert all(is_away(each) and type(each) is nn.Parameter for each in coded(engine).values())
        seen: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module) -> None:
            weight = module.weight
            if isinstance(weight, FP8Parameter):
                seen[name] = weight.matrix.values()

        for name, module in engine.module.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda own, _, name=name: look(f"{name}.weight", own))
        engine.eval()
        with torch.no_grad():
            engine(test_zero3.tokens_of(engine, 0, 0))
        engine.train()
        before = slices_of(engine)
        assert {*seen} == {*coded(engine)}
        assert len(seen) == 6
        values = gathered(engine)
        assert_same_bits(seen, {name: values[name] for name in seen})
        state = engine._zero3_consolidated_16bit_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(dict(state), values)
        assert_same_bits(slices_of(engine), before)  # after a round trip through modifier_rank=0
        assert [each.decodes for each in matrices_of(engine.optimizer.parts.weights)] == [0] * 6


def test_whoever_reads_has_the_same_bits(ranks: RankPools) -> None:
    ranks.run(2, read_everywhere, seconds=SECONDS)


def take_masters() -> None:
    """Masters that are taken from an edit are what was written, before it was rounded to codes."""
    with engine_of() as engine:
        steps(engine, 1)
        weight = engine.module.blocks[1].up.weight
        values = torch.randn(weight.ds_shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
            weight.copy_(values)
        engine.optimizer.refresh_fp32_params()
        assert torch.equal(safe_get_full_fp32_param(weight), values.float())


def test_masters_are_taken_from_an_edit(ranks: RankPools) -> None:
    ranks.run(2, take_masters, seconds=SECONDS)


def rounded(values: Tensor) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    write_weights(values, out)
    return out


def edit() -> None:
    """Edits are encoded, and last as the docs say; what cannot be done is refused by name."""
    lines = Lines()
    logging.getLogger("ds_fp8").addHandler(lines)
    with engine_of(zero=SOME_PERSIST) as engine:
        steps(engine, 2)
        name, weight = "blocks.1.up.weight", engine.module.blocks[1].up.weight
        assert isinstance(weight, FP8Parameter), "it persists"
        with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.weight: mul_ would write"), torch.no_grad():
            weight.mul_(2)
        words = refusal(lambda: safe_set_local_fp32_param(weight, torch.zeros(weight.ds_tensor.numel())))
        assert f"{name}: safe_set_local_fp32_param received a part of an FP8 weight, allowed:" in words
        before = gathered(engine)[name]
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                weight.mul_(4)
        assert torch.equal(gathered(engine)[name], 4 * before)
        master = safe_get_full_fp32_param(weight)
        steps(engine, 1, first=2)
        assert float((gathered(engine)[name] - before).abs().max()) < 0.1, "masters decide"
        logged = any("masters do not follow" in line and name in line for line in lines.lines)
        assert logged or dist.get_rank()
        safe_set_full_fp32_param(weight, 3 * master)
        encoded = hold(rounded(safe_get_full_fp32_param(weight)))
        assert torch.equal(gathered(engine)[name], encoded.values())
        assert float((encoded.values() - 3 * master).abs().max()) <= float(3 * master.abs().max()) / 16
        engine(test_zero3.tokens_of(engine, 0, 0))
        weight.data = torch.zeros(weight.ds_shape, dtype=torch.bfloat16)
        words = refusal(lambda: steps(engine, 1))
        assert f"{name}: received" in words
        assert "GatheredParameters" in words
    logging.getLogger("ds_fp8").removeHandler(lines)


def test_edits(ranks: RankPools) -> None:
    ranks.run(2, edit, seconds=SECONDS)


def count_whole(kind: str) -> tuple[int, int, int]:
    """The most matrices and bytes of codes that are there at a time in a step; elements of the largest."""
    with engine_of(zero=zero3(persistence=0, prefetch=0, reuse=0), kind=kind) as engine:
        matrices = list(matrices_of(engine.optimizer.parts.weights))
        counts, nbytes = [], []

        def look(*_: Any) -> None:
            here = [each for each in matrices if each.is_here]
            counts.append(len(here))
            nbytes.append(sum(each.codes.untyped_storage().nbytes() for each in here))

        for module in engine.module.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(look)
                module.weight.register_hook(look)  # in backward
        steps(engine, 3)
        assert not any(each.is_here for each in matrices)
        return max(counts), max(nbytes), max(each.codes.numel() for each in matrices)


@pytest.mark.parametrize("kind", ["plain", "checkpointing"])
def test_codes_are_there_while_they_are_multiplied(ranks: RankPools, kind: str) -> None:
    """If nothing is fetched ahead or kept: one matrix at a time, in 1 byte per element."""
    assert ranks.run(2, count_whole, kind, seconds=SECONDS) == [(1, 6656, 6656)] * 2


def masters(engine: Any) -> dict[str, Tensor]:
    """FP32 masters, whole."""
    named = engine.module.named_parameters()
    return {name: safe_get_full_fp32_param(each) for name, each in named}


def assert_rounded(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same to BF16 and to the format of masters; E4M3 is ten times as coarse."""
    for name, each in wanted.items():
        assert (found[name].float() - each).norm() < 0.003 * each.norm(), name


def hand_over(stage: int) -> None:
    """Parameters that an engine lets go of are its masters in BF16 for a next engine, of ours or of stock."""
    with engine_of(stage=stage) as engine:
        steps(engine, 2)
        model, values, kept = engine.module, gathered(engine), masters(engine)
    for fp8 in (O3, {"opt_level": "O2+"}, None):
        config = ds_config(fp8, stage=3, zero=SMALL, lr=0.0, weight_decay=0.0)
        with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
            engine = build(config, model)
        if fp8 is O3:
            assert_same_bits(gathered(engine), values)
        else:
            assert_rounded(gathered(engine), kept)
        if fp8:
            assert_rounded(masters(engine), kept)
        assert len(coded(engine)) == (6 if fp8 is O3 else 0)
        engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_next_engine_has_the_weights(ranks: RankPools, stage: int) -> None:
    ranks.run(2, hand_over, stage, seconds=SECONDS)


def hand_over_to_stock() -> None:
    with engine_of(stage=2) as engine:
        steps(engine, 2)
        model, kept = engine.module, masters(engine)
    engine = build(ds_config(None, stage=2), model)
    assert_rounded({name: each.detach() for name, each in model.named_parameters()}, kept)
    steps(engine, 1)
    engine.destroy()


def test_stock_deepspeed_goes_on_from_the_masters(ranks: RankPools) -> None:
    ranks.run(2, hand_over_to_stock, seconds=SECONDS)


def take_over(stage: int, then: int) -> None:
    """A second engine goes on from the masters, in BF16, of a first one that is not destroyed."""
    with engine_of(stage=stage, zero=SOME_PERSIST) as first:
        steps(first, 2)
        values, kept = gathered(first), masters(first)
        first(test_zero3.tokens_of(first, 2, 0))  # persistent ones are fetched
        for each in coded(first).values():
            each.ds_active_sub_modules.add(-1)  # as a forward that raised leaves it
        with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
            zero = SMALL if then == 3 else {}
            second = build(ds_config(O3, stage=then, zero=zero, lr=0.0, weight_decay=0.0), first.module)
        assert len(list(matrices_of(second.optimizer.parts.weights))) == 6
        assert_same_bits(gathered(second), values)
        assert_rounded(masters(second), kept)
        with pytest.raises(RuntimeError, match="trained by an engine that was made after it"):
            first.step()
        steps(second, 2)
        second.destroy()


@pytest.mark.parametrize(("stage", "then"), [(2, 2), (2, 3), (3, 3)])
def test_a_second_engine_has_the_weights(ranks: RankPools, stage: int, then: int) -> None:
    ranks.run(2, take_over, stage, then, seconds=SECONDS)


class Narrow(nn.Module):
    """Matrices of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)).relu()).float().square().mean()


def take_over_narrow() -> None:
    """The third rank owns nothing of a matrix that is whole on all."""
    config = ds_config(O3, stage=3, zero=zero3(persistence=256, prefetch=0, reuse=0))
    torch.manual_seed(0)
    model, x = Narrow().bfloat16(), torch.ones(2, 16, dtype=torch.bfloat16)
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        first = build(config, model)
        first.backward(first(x))
        first.step()
        kept = masters(first)
        first(x)
        assert len(gathered_now(model)) == 2
        second = build(config, model)
    assert not gathered_now(model)
    assert_rounded(masters(second), kept)
    first.destroy()
    second.destroy()


def gathered_now(model: Any) -> list[str]:
    """Names of the matrices of which this rank has all elements, but for the head."""
    named = list(model.named_parameters())[:2]
    return [name for name, each in named if each.ds_status is ZeroParamStatus.AVAILABLE]


def test_every_rank_lets_go_of_a_matrix_of_few_blocks(ranks: RankPools) -> None:
    ranks.run(3, take_over_narrow, seconds=SECONDS)


def multiplied_by_deepspeed(default: bool, compiled: bool) -> tuple[list[float], list[int]]:
    zero = {**SMALL, "memory_efficient_linear": True} if default else SMALL
    with engine_of(zero=zero) as engine:
        if compiled:
            engine.compile(backend="aot_eager")
        losses = steps(engine, 3)
        return losses, [each.decodes for each in matrices_of(engine.optimizer.parts.weights)]


@pytest.mark.parametrize("compiled", [False, True])
def test_deepspeeds_own_linear_leaves_codes_to_us(ranks: RankPools, compiled: bool) -> None:
    """Which it is unless the config says otherwise; the head, without a bias, has its bits."""
    own, decodes = ranks.run(2, multiplied_by_deepspeed, True, compiled, seconds=SECONDS)[0]
    torchs, _ = ranks.run(2, multiplied_by_deepspeed, False, False, seconds=SECONDS)[0]
    assert own == torchs
    assert decodes == [0] * 6


# Checkpoints


def facts(engine: Any) -> dict[str, Any]:
    return {"packed": packed(engine.optimizer), "weights": weight_bits(engine)}


def save(folder: str, stage: int) -> dict[str, Any]:
    with engine_of(stage=stage) as engine:
        steps(engine, 2)
        engine.save_checkpoint(folder, tag="start")
        return {**facts(engine), "losses": steps(engine, 2, first=2), "after": weight_bits(engine)}


def move(source: str, target: str, fp8: dict[str, Any], stage: int) -> dict[str, Any]:
    with engine_of(fp8, stage=stage, scale=1.5) as engine:
        assert engine.load_checkpoint(source)[0] is not None
        engine.save_checkpoint(target, tag="moved")
        return facts(engine)


def resume(folder: str) -> dict[str, Any]:
    with engine_of(scale=1.5, zero=SOME_PERSIST) as engine:
        engine.load_checkpoint(folder)
        return {"losses": steps(engine, 2, first=2), "after": weight_bits(engine)}


def test_checkpoints_of_other_stages_and_ranks(ranks: RankPools, tmp_path: Path) -> None:
    """States and weights are the same bits after every hop, and training goes on."""
    start = ranks.run(2, save, str(tmp_path / "0"), 2, seconds=SECONDS)
    hops = [(3, O3, 3), (2, O2, 3), (1, O3, 3), (2, O3, 2)]
    for hop, (world_size, fp8, stage) in enumerate(hops):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        moved = ranks.run(world_size, move, *folders, fp8, stage, seconds=SECONDS)
        assert_same_bits(*(whole_states([each["packed"] for each in run]) for run in (start, moved)))
        for each in moved if fp8 is O3 else ():
            assert_same_bits(each["weights"], start[0]["weights"])
    for before, now in zip(start, ranks.run(2, resume, str(tmp_path / "4"), seconds=SECONDS), strict=True):
        assert now["losses"] == before["losses"]
        assert_same_bits(now["after"], before["after"])


def save_16bit(folder: str, fp8: dict[str, Any]) -> dict[str, Tensor] | None:
    with engine_of(fp8, zero={**SMALL, "stage3_gather_16bit_weights_on_model_save": True}) as engine:
        steps(engine, 2)
        engine.save_16bit_model(folder, "model.bin")
        masters = {name: safe_get_full_fp32_param(each) for name, each in engine.module.named_parameters()}
        values = gathered(engine)
    if dist.get_rank():
        return None
    wanted = {name: rounded(each) for name, each in masters.items()} if "checkpoint" in fp8 else values
    saved = torch.load(f"{folder}/model.bin", weights_only=True)
    assert_same_bits(saved, wanted)
    return wanted


def test_save_16bit_model_has_codes_values_or_masters(ranks: RankPools, tmp_path: Path) -> None:
    values, masters = (
        ranks.run(2, save_16bit, str(tmp_path), fp8, seconds=SECONDS)[0] for fp8 in (O3, MASTERS)
    )
    assert any(not torch.equal(values[name], masters[name]) for name in values)


# Frozen matrices

FROZEN = test_o3_frozen.FROZEN
KEEP_NONE = zero3(persistence=100, prefetch=2000, reuse=0)


def lora_engine(fp8: dict[str, Any], stage: int, model: Any = None) -> Any:
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        config = ds_config(fp8, stage=stage, lr=1e-2, zero=KEEP_NONE if stage == 3 else {})
        return build(config, test_o3_frozen.lora() if model is None else model)


def base_of(engine: Any) -> dict[str, Tensor]:
    return {name: each for name, each in weight_bits(engine).items() if "lora" not in name}


def save_lora(folder: str, stage: int) -> tuple[dict[str, Tensor], list[float]]:
    """A base, beside adapters, that has been edited; and how training goes on."""
    engine = lora_engine(FROZEN, stage)
    test_o3_frozen.train(engine, 2)
    engine.save_checkpoint(folder)
    base = base_of(engine)
    losses = test_o3_frozen.train(engine, 2, first=2)
    assert_same_bits(base_of(engine), base)
    engine.destroy()
    return base, losses


def load_lora(folder: str, stage: int) -> tuple[dict[str, Tensor], list[float]]:
    engine = lora_engine(FROZEN, stage, test_o3_frozen.shifted())
    engine.load_checkpoint(folder)
    base, losses = base_of(engine), test_o3_frozen.train(engine, 2, first=2)
    engine.destroy()
    return base, losses


@pytest.mark.parametrize(("saved", "loaded", "world_size"), [(3, 3, 2), (2, 3, 3), (3, 2, 2)])
def test_a_checkpoint_has_the_base(
    ranks: RankPools, tmp_path: Path, saved: int, loaded: int, world_size: int
) -> None:
    before = ranks.run(2, save_lora, str(tmp_path), saved, seconds=SECONDS)
    after = ranks.run(world_size, load_lora, str(tmp_path), loaded, seconds=SECONDS)
    assert_same_bits(before[0][0], after[0][0])
    if (saved, world_size) == (loaded, 2):
        assert before[0][1] == after[0][1]


def merge() -> None:
    """What TRL does: an adapter is merged where weights are gathered, and nothing of it stays."""
    engine = lora_engine(FROZEN, 3)
    test_o3_frozen.train(engine, 1)
    before = base_of(engine)
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        engine.module.merge_adapter()
        engine.module.unmerge_adapter()
    assert_same_bits(base_of(engine), before)
    lines = Lines()
    logging.getLogger("ds_fp8").addHandler(lines)
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        engine.module.merge_adapter()
    merged = base_of(engine)
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        engine.module.unmerge_adapter()
    unmerged = base_of(engine)
    test_o3_frozen.train(engine, 1, first=1)
    assert_same_bits(base_of(engine), unmerged)
    logging.getLogger("ds_fp8").removeHandler(lines)
    name = next(name for name, each in merged.items() if not torch.equal(each, before[name]))
    assert any("rounded to FP8 again" in line and name in line for line in lines.lines)
    engine.destroy()


def test_a_merged_base_is_encoded_again(ranks: RankPools) -> None:
    ranks.run(2, merge, seconds=SECONDS)


class Streams:
    """In the place of torch.cuda: which stream is the current one, and what waits for what."""

    def __init__(self) -> None:
        self.current, self.log = "compute", []

    def Event(self) -> Any:  # noqa: N802  # torch's name
        return SimpleNamespace(record=lambda: self.log.append(f"{self.current} records"))

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_event=lambda _: self.log.append(f"{self.current} waits"))


def log_streams() -> list[str]:
    """What a step, a fetch by the coordinator and an edit do to streams, with the parameters on a GPU."""
    with engine_of(zero=zero3(persistence=0, prefetch=0, reuse=0)) as engine:
        steps(engine, 1)
        weight, slices = engine.module.blocks[0].up.weight, engine.optimizer.fetching._slices
        streams = Streams()
        written = slices.written
        with (
            patch.object(fetch.torch, "cuda", streams),
            patch.object(slices, "written", lambda _: written(torch.device("cuda"))),
        ):
            engine.optimizer.fetching.fetch_persistent()
            streams.current = "fetch"
            weight.all_gather_coalesced([weight]).wait()
        weight.partition()
        return streams.log


def test_a_fetch_waits_for_what_writes_slices(ranks: RankPools) -> None:
    """On a GPU, where DeepSpeed fetches on a stream of its own."""
    assert ranks.run(2, log_streams, seconds=SECONDS)[0] == ["compute records", "fetch waits"]


def rows(step: int, noise: float) -> Tensor:
    """Rows that count on from a random byte; a share of the bytes is any byte."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    counted = (torch.randint(256, (8, 1), generator=generator) + torch.arange(17)) % 256
    others = torch.randint(256, counted.shape, generator=generator)
    return torch.where(torch.rand(counted.shape, generator=generator) < noise, others, counted)


def adapt(model: Any, fp8: dict[str, Any], steps: int, noise: float, stage: int, lr: float) -> list[float]:
    """Train a model; mean losses over the ranks."""
    zero = zero3(persistence=100, prefetch=2000, reuse=0) if stage == 3 else {}
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        engine = build(ds_config(fp8, stage=stage, lr=lr, weight_decay=0.0, zero=zero), model)
    losses = []
    for step in range(steps):
        tokens = rows(step, noise)
        losses.append(engine(input_ids=tokens, labels=tokens).loss)
        engine.backward(losses[-1])
        engine.step()
    mean = torch.stack(losses).detach().float()
    dist.all_reduce(mean)
    engine.destroy()
    return [float(each) for each in mean / dist.get_world_size()]


def adapt_trained() -> dict[str, list[float]]:
    """Adapters over a base that has learnt to count, which are to learn that a byte may be any."""
    base = test_o3_frozen.lora().unload()
    for each in base.parameters():
        each.requires_grad_(True)
    found = {"base": adapt(base, test_o3_frozen.BF16, 100, 0.0, 2, 3e-3)}
    state = {name: each.detach().clone() for name, each in base.state_dict().items()}
    for name, fp8 in (("bf16", test_o3_frozen.BF16), ("fp8", FROZEN)):
        model = test_o3_frozen.lora()
        names = [each for each in model.get_base_model().state_dict() if "lora" not in each]
        learnt = {each: state[each.replace(".base_layer", "")] for each in names}
        model.get_base_model().load_state_dict(learnt, strict=False)
        found[name] = adapt(model, fp8, 150, 0.3, 3, 5e-3)
    return found


@pytest.mark.slow
def test_lora_over_a_trained_base_ends_where_that_over_bf16_does(ranks: RankPools) -> None:
    found = ranks.run(2, adapt_trained, seconds=300.0)[0]
    assert found["base"][-1] < 0.01, "it has learnt"
    bf16, fp8 = (statistics.fmean(found[name][-20:]) for name in ("bf16", "fp8"))
    assert bf16 < 0.6 * found["bf16"][0]
    assert abs(bf16 - fp8) < 0.01, (bf16, fp8)


def save_for_others(folder: str) -> dict[str, dict[str, Tensor]] | None:
    with engine_of() as engine:
        steps(engine, 2)
        engine.save_checkpoint(folder)
        masters = {name: safe_get_full_fp32_param(each) for name, each in engine.module.named_parameters()}
        values = gathered(engine)
        found = {"masters": masters, "codes": {name: values[name] for name in coded(engine)}}
    return None if dist.get_rank() else found


def load_weights(folder: str, stage: int) -> dict[str, Tensor]:
    with engine_of(stage=stage, scale=1.5) as engine:
        engine.load_checkpoint(folder, load_optimizer_states=False)
        return {name: safe_get_full_fp32_param(each) for name, each in engine.module.named_parameters()}


def test_what_leaves(ranks: RankPools, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masters to everybody, and to an export of codes the run's."""
    saved = ranks.run(2, save_for_others, str(tmp_path / "run"), seconds=SECONDS)[0]
    source = str(tmp_path / "run")
    main(["inspect", source])
    assert "6 tensors, saved as masters alone" in capsys.readouterr().out
    main(["export", source, str(tmp_path / "fp32")])
    assert_same_bits(load_file(tmp_path / "fp32" / "model.safetensors"), saved["masters"])
    assert_same_bits(get_fp32_state_dict_from_zero_checkpoint(source), saved["masters"])
    main(["export", source, str(tmp_path / "fp8"), "--fp8"])
    exported = load_file(tmp_path / "fp8" / "model.safetensors")
    for name, values in saved["codes"].items():
        decoded = Operand(exported[name], exported[f"{name}_scale_inv"]).decode()
        assert torch.equal(decoded, values.float()), name
    for stage in (2, 3):
        found = ranks.run(3, load_weights, source, stage, seconds=SECONDS)[0]
        for name, each in found.items():
            assert torch.equal(rounded(each), rounded(saved["masters"][name])), name
