"""Checkpoints of ZeRO 3: exact resume, any number of ranks, any stage, without a bit lost."""

import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import (
    SMALL,
    assert_same_bits,
    batches,
    ds_config,
    packed,
    train_losses,
    weight_bits,
    whole_states,
    zero3,
)
from foreign_files import convert, on_first
from grids import some_of
from packaging.version import Version
from ranks import RankPools
from safetensors.torch import load_file
from torch import Tensor, nn
from train_lm import ByteGPT

from ds_fp8.cli import main
from ds_fp8.ops.masters import write_weights

SECONDS = 100.0
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
LEVELS = {
    "wide": {"opt_level": "O2"},  # of a model in FP32
    "O1": {"opt_level": "O1"},
    "O2": {"opt_level": "O2"},
    "O2+": {"opt_level": "O2+"},
    "split8": {"block_size": 32, "optimizer": {"master_dtype": "split8", "exp_avg_dtype": "e5m2"}},
}


class Everything(ByteGPT):
    """Parameters that are tied, frozen, of odd sizes, of another dtype; buffers and extra state."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.head.weight = self.tokens.weight
        self.blocks[0].requires_grad_(False)
        self.odd = nn.Parameter(torch.randn(7, 37))
        self.register_buffer("floats", torch.arange(5) / 3)
        self.register_buffer("large", torch.tensor(2**40 + 1))
        self.seen = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.seen += 1
        return super().forward(*arguments, **options) + 1e-3 * self.odd.float().square().sum()

    def get_extra_state(self) -> Tensor:
        return torch.full((self.seen + 1,), self.seen, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = int(state[0])


def config(level: str, stage: int, bucket: int = 10_000, **options: Any) -> dict[str, Any]:
    zero = zero3() if stage == 3 else {}
    options = {"bucket": bucket, "bf16": level != "wide", "scheduler": WARMUP, **options}
    return ds_config(LEVELS[level], stage=stage, zero=zero, **options)


def make(config: dict[str, Any], seed: int = 0, *, empty: bool = False, groups: int = 2) -> Any:
    """An engine. empty: with a parameter that has no elements, which stock ZeRO 3 does not bear."""
    torch.manual_seed(seed)
    model = Everything()
    if empty:
        model.none = nn.Parameter(torch.empty(0, 5))
    if seed:
        model.floats.zero_()
        model.large.zero_()
    large = [each for each in model.parameters() if each.dim() > 1]
    small = [each for each in model.parameters() if each.dim() < 2]
    two = [{"params": large}, {"params": small, "weight_decay": 0.0, "lr": 3e-3}]
    parameters = two if groups == 2 else model.parameters()
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def facts(engine: Any) -> dict[str, Any]:
    """This rank's packed states, the weights, buffers, and what every rank has alike."""
    optimizer, module = engine.optimizer.optimizer, engine.module
    return {
        "packed": packed(engine.optimizer),
        "weights": weight_bits(engine),
        "buffers": {name: each.clone().view(-1) for name, each in module.named_buffers()},
        "counters": [
            optimizer.steps,
            list(optimizer.clamp_squares),
            [
                {key: each for key, each in group.items() if key != "params"}
                for group in optimizer.param_groups
            ],
            engine.global_steps,
            engine.skipped_steps,
            engine.optimizer.loss_scale,
            engine.lr_scheduler.state_dict(),
            module.seen,
        ],
        "whole": [name for name, each in module.named_parameters() if each.numel() == each_numel(each)],
    }


def each_numel(parameter: Any) -> int:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape)).numel()


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Whatever the stages and numbers of ranks of two runs."""
    assert repr(first[0]["counters"]) == repr(second[0]["counters"])
    assert_same_bits(*(whole_states([each["packed"] for each in run]) for run in (first, second)))
    for key in ("weights", "buffers"):
        for each in (*first, *second):
            assert_same_bits(each[key], first[0][key])


def train_and_save(folder: str, config: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """Save, train on; what there was, and what came of it."""
    engine = make(config, empty=True)
    source = batches(engine)
    train_losses(engine, source, steps)
    saved = facts(engine)
    engine.save_checkpoint(folder, tag="start", client_state={"note": dist.get_rank()})
    kept = facts(engine)
    assert repr(kept["whole"]) == repr(saved["whole"])
    losses = train_losses(engine, source, 3)
    later = facts(engine)
    engine.destroy()
    return {"saved": kept, "losses": losses, "later": later}


def resume(folder: str, config: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    engine = make(config, seed=9, empty=True)
    train_losses(engine, batches(engine, seed=5), 1)
    path, state = engine.load_checkpoint(folder)
    assert path is not None
    loaded, source = facts(engine), batches(engine)
    for _ in range(steps):
        next(source)
    losses = train_losses(engine, source, 3)
    later = facts(engine)
    engine.destroy()
    return {"saved": loaded, "losses": losses, "later": later, "note": state["note"]}


@some_of(
    ["level", "stage"],
    [["O2+", 3], ["wide", 3], ["O2", 3], ["O1", 3], ["split8", 3], ["O2+", 2], ["O2", 1]],
    2,
)
def test_resume_is_exact(ranks: RankPools, tmp_path: Path, level: str, stage: int) -> None:
    """Into ZeRO 3 from any stage, to the bit: also what comes after, but for other stages' forward order."""
    unbroken = ranks.run(2, train_and_save, str(tmp_path), config(level, stage), seconds=SECONDS)
    resumed = ranks.run(2, resume, str(tmp_path), config(level, 3), seconds=SECONDS)
    for when in ("saved", "later"):
        assert_same([each[when] for each in unbroken], [each[when] for each in resumed])
    for rank, (one, other) in enumerate(zip(unbroken, resumed, strict=True)):
        assert one["losses"] == other["losses"]
        assert other["note"] == (rank if stage == 3 else 0)


def move(source: str, target: str, config: dict[str, Any]) -> dict[str, Any]:
    """Load and save, without training between."""
    engine = make(config, seed=7, empty=True)
    path, _ = engine.load_checkpoint(source)
    assert path is not None
    engine.save_checkpoint(target, tag="moved")
    found = facts(engine)
    engine.destroy()
    return found


WAYS = [
    (3, 3, 700),
    (1, 3, 10_000),
    (2, 2, 3000),
    (4, 3, 10**6),
    (2, 1, 500),
    (3, 3, 10_000),
    (1, 2, 800),
    (4, 3, 2000),
]


@some_of(["level"], [["O2+"], ["O2"], ["split8"], ["O1"], ["wide"]], 1)
def test_stages_ranks_and_buckets(ranks: RankPools, tmp_path: Path, level: str) -> None:
    start = ranks.run(2, train_and_save, str(tmp_path / "0"), config(level, 3), seconds=SECONDS)
    saved = [each["saved"] for each in start]
    for hop, (world_size, stage, bucket) in enumerate(WAYS):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        moved = ranks.run(world_size, move, *folders, config(level, stage, bucket), seconds=SECONDS)
        assert_same(saved, moved)
        main(["export", folders[1], f"{folders[1]} out", "--dtype", "fp32" if level == "wide" else "bf16"])
        exported = load_file(f"{folders[1]} out/model.safetensors")
        for name, bits in saved[0]["weights"].items():
            assert torch.equal(exported[name].view(bits.dtype), bits), name


# Weights without states


WHOLE_FP32_MODEL = "deepspeed.runtime.engine.get_fp32_state_dict_from_zero_checkpoint"


def load_weights(
    folder: str, config: dict[str, Any], options: dict[str, Any], empty: bool = True
) -> dict[str, Any]:
    engine = make(config, seed=9, empty=empty)
    with patch(WHOLE_FP32_MODEL, side_effect=AssertionError):
        engine.load_checkpoint(folder, **options)
    found = facts(engine)
    engine.optimizer.saved.weights_from_masters()
    assert_same_bits(weight_bits(engine), found["weights"])  # masters follow the weights
    engine.destroy()
    return found


@some_of(
    ["level", "only"],
    [["O2+", "load_module_only"], ["O2", "load_optimizer_states"], ["O1", "load_module_only"]],
    2,
)
def test_weights_without_states(ranks: RankPools, tmp_path: Path, level: str, only: str) -> None:
    """Out of a checkpoint of any stage, the same weights and buffers come into any stage."""
    options = {only: only == "load_module_only"}
    start = ranks.run(2, train_and_save, str(tmp_path / "3"), config(level, 3), seconds=SECONDS)
    ranks.run(2, move, str(tmp_path / "3"), str(tmp_path / "2"), config(level, 2), seconds=SECONDS)
    expected = ranks.run(2, load_weights, str(tmp_path / "2"), config(level, 2), options, seconds=SECONDS)
    for tag, stage, world_size in (("3", 3, 3), ("3", 3, 1), ("2", 3, 2), ("3", 2, 2), ("3", 1, 3)):
        found = ranks.run(
            world_size, load_weights, str(tmp_path / tag), config(level, stage), options, seconds=SECONDS
        )
        assert_same(expected, found)
    frozen = {name: each for name, each in expected[0]["weights"].items() if name.startswith("blocks.0.")}
    assert_same_bits(frozen, {name: start[0]["saved"]["weights"][name] for name in frozen})


def load_damaged(folder: str, options: dict[str, Any]) -> list[str]:
    """The errors, once a byte of each of rank 1's files is another; nothing of the engine is."""
    engine, told = make(config("O2+", 3), seed=9, empty=True), []
    before = facts(engine)
    for path in sorted(Path(folder, "start").glob("*_rank_1_*")):
        content = path.read_bytes()
        on_first(functools.partial(path.write_bytes, content[:-1] + b"?"))
        with pytest.raises(ValueError, match="SHA-256 does not match") as caught:
            engine.load_checkpoint(folder, **options)
        told.append(str(caught.value))
        on_first(functools.partial(path.write_bytes, content))
    assert repr(facts(engine)) == repr(before)
    engine.destroy()
    return told


def test_a_damaged_file_of_any_rank_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    """Weights alone are in all of them, too."""
    ranks.run(2, train_and_save, str(tmp_path), config("O2+", 3), seconds=SECONDS)
    for options in ({}, {"load_module_only": True}):
        first, second = ranks.run(2, load_damaged, str(tmp_path), options, seconds=SECONDS)
        assert first == second
        assert len(first) == 2
        assert "optim_states" in first[0]
        assert "model_states" in first[1]


# Other programs' files


def stock_config(stage: int, **options: Any) -> dict[str, Any]:
    zero = {**zero3(), "stage3_gather_16bit_weights_on_model_save": True, "sub_group_size": 5000}
    return ds_config(stage=stage, zero=zero if stage == 3 else {}, scheduler=WARMUP, **options)


GROUPS = {2: 1, 3: 2}  # stock ZeRO 2 leaves a rank that has nothing of a group without its states


def save_stock(folder: str, stage: int) -> dict[str, Tensor]:
    """What stock DeepSpeed has of each trained parameter, in FP32."""
    engine = make(stock_config(stage), groups=GROUPS[stage])
    train_losses(engine, batches(engine), 3)
    engine.save_checkpoint(folder, tag="tag")
    found = states_of(engine)
    engine.destroy()
    return found


def states_of(engine: Any) -> dict[str, Tensor]:
    """Of each trained parameter, in FP32, as DeepSpeed's utilities give it."""
    found = {}
    for name, each in engine.module.named_parameters():
        if each.requires_grad and each_numel(each):
            found[name] = safe_get_full_fp32_param(each).clone().view(-1)
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(each, key).clone().view(-1)
    return found


CONVERTING = {"opt_level": "O1", "checkpoint": {"allow_conversion": True}}


def load_foreign(
    folder: str, stage: int, fp8: dict[str, Any] | None, universal: bool = False, groups: int = 2
) -> dict[str, Any]:
    """Load; the states that there are then, and the `facts` of an engine of ours."""
    conf = ds_config(fp8, stage=stage, zero=zero3() if stage == 3 else {}, scheduler=WARMUP, bucket=10_000)
    if universal:
        conf["checkpoint"] = {"load_universal": True}
    engine = make(conf, seed=9, groups=groups)
    engine.load_checkpoint(folder)
    found = {"states": states_of(engine), **(facts(engine) if fp8 else {})}
    engine.destroy()
    return found


@some_of(["saved", "loaded"], [[3, 3], [3, 2], [2, 3]], 2)
def test_states_of_stock_deepspeed(ranks: RankPools, tmp_path: Path, saved: int, loaded: int) -> None:
    """To the bit into FP32 states, also out of a universal checkpoint; with what is frozen, and buffers."""
    stock = ranks.run(2, save_stock, str(tmp_path / "stock"), saved, seconds=SECONDS)
    convert(tmp_path / "stock" / "tag", tmp_path / "universal" / "tag")
    runs = [
        ranks.run(
            world_size,
            load_foreign,
            str(tmp_path / kind),
            loaded,
            CONVERTING,
            kind == "universal",
            GROUPS[saved],
        )
        for kind, world_size in (("stock", 2), ("stock", 3), ("universal", 2))
    ]
    model = make_model()
    for each in (each for run in runs for each in run):
        assert_same_bits(bits_of(each["states"]), bits_of(stock[0]))
        assert_same_bits(each["buffers"], {name: each.view(-1) for name, each in model.named_buffers()})
        assert each["counters"][0] == 3
        for name, parameter in model.named_parameters():
            if name not in stock[0]:
                assert torch.equal(each["weights"][name], parameter.to(torch.bfloat16).view(torch.int16))


def make_model() -> Everything:
    torch.manual_seed(0)
    return Everything()


def bits_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.view(torch.int32) for name, each in tensors.items()}


def refuse_stock(folder: str) -> str:
    engine = make(config("O2", 3), seed=9)
    before = facts(engine)
    with pytest.raises(ValueError, match="that were not written with") as caught:
        engine.load_checkpoint(folder)
    assert repr(facts(engine)) == repr(before)
    engine.destroy()
    return str(caught.value)


def test_stock_states_are_refused_and_stock_weights_load(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, save_stock, str(tmp_path), 3, seconds=SECONDS)
    first, second = ranks.run(2, refuse_stock, str(tmp_path), seconds=SECONDS)
    assert first == second
    assert "load_optimizer_states=False" in first
    masters = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    options = {"load_optimizer_states": False}
    for stage in (3, 2):
        for each in ranks.run(
            2, load_weights, str(tmp_path), config("O1", stage), options, False, seconds=SECONDS
        ):
            for name, bits in each["weights"].items():
                rounded = torch.empty(masters[name].shape, dtype=torch.bfloat16)
                write_weights(masters[name].float(), rounded)
                assert torch.equal(bits.view(torch.bfloat16), rounded), name


def save_everything(folder: str, level: str, stage: int) -> dict[str, Any]:
    conf = config(level, stage)
    conf["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = make(conf)
    train_losses(engine, batches(engine), 3)
    engine.save_checkpoint(folder)
    assert engine.save_16bit_model(folder, "weights.bin")
    assert engine.save_16bit_model(folder, "trained.bin", exclude_frozen_parameters=True)
    found = {"states": states_of(engine), "weights": weight_bits(engine)}
    engine.destroy()
    return found


def load_into_stock(folder: str) -> bool:
    """Whether states are as before, after a stock engine of ZeRO 3 has stumbled over slices of ours."""
    engine = make(stock_config(3), seed=9)
    train_losses(engine, batches(engine), 1)
    before = states_of(engine)
    with pytest.raises(RuntimeError, match="size of tensor"):
        engine.load_checkpoint(folder)
    unchanged = all(torch.equal(each, before[name]) for name, each in states_of(engine).items())
    engine.destroy()
    return unchanged


@some_of(["level", "world_size"], [["O2+", 2], ["O2", 3], ["O1", 1], ["split8", 3]], 2)
def test_what_leaves(ranks: RankPools, tmp_path: Path, level: str, world_size: int) -> None:
    """Stock scripts, 16-bit models, `export` and `to-universal` have the engine's masters and weights."""
    run, out = tmp_path / "run", tmp_path / "out"
    saved = ranks.run(world_size, save_everything, str(run), level, 3, seconds=SECONDS)[0]
    states, weights = saved["states"], {k: v.view(torch.bfloat16) for k, v in saved["weights"].items()}
    model = make_model()
    buffers = {name: each.detach() for name, each in model.named_buffers()}
    shapes = {name: each.shape for name, each in model.named_parameters()}
    fp32 = {
        name: states[name].view(shapes[name]) if name in states else weights[name].float() for name in shapes
    }

    def check(found: dict[str, Tensor], expected: dict[str, Tensor], tied: bool = True) -> None:
        expected = {**expected, **({"head.weight": expected["tokens.weight"]} if tied else {})}
        found = {name: each for name, each in found.items() if "_extra_state" not in name}
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            assert torch.equal(found[name], each), name

    check(
        get_fp32_state_dict_from_zero_checkpoint(str(run)),
        {**fp32, "floats": buffers["floats"], "large": buffers["large"]},
    )
    check(torch.load(run / "weights.bin"), {**weights, **buffers})
    trained = {name: each for name, each in weights.items() if name in states}
    check(torch.load(run / "trained.bin"), {**trained, **buffers})
    if world_size == 2:
        assert all(ranks.run(2, load_into_stock, str(run), seconds=SECONDS))
    main(["inspect", str(run)])
    main(["export", str(run), str(out / "fp32")])
    check(load_file(out / "fp32" / "model.safetensors"), {**fp32, **buffers})
    main(
        [
            "export",
            str(run),
            str(out / "bf16"),
            "--dtype",
            "bf16",
            "--format",
            "torch",
            "--max-shard-size",
            "20KB",
        ]
    )
    parts = sorted((out / "bf16").glob("*.bin"))
    assert len(parts) > 1
    check({k: v for part in parts for k, v in torch.load(part).items()}, {**weights, **buffers})
    main(["to-universal", str(run), str(out / "universal" / "tag")])
    # DeepSpeed 0.19.5 itself leaves exp_avg in the masters of ZeRO 2 here.
    stock = [(3, None), (2, None)] if Version(version("deepspeed")) > Version("0.19.5") else [(3, None)]
    for stage, fp8 in (*stock, (3, CONVERTING), (2, CONVERTING)):
        for each in ranks.run(2, load_foreign, str(out / "universal"), stage, fp8, True, seconds=SECONDS):
            assert_same_bits(bits_of(each["states"]), bits_of(states))
            if fp8:
                assert_same_bits(each["weights"], saved["weights"])
                assert_same_bits(each["buffers"], {name: each.view(-1) for name, each in buffers.items()})
                assert each["counters"][-1] == 3


# At odd moments


def save_at_odd_moments(folder: str | None) -> dict[str, Any]:
    """Where GatheredParameters reads, and where it writes; after a skip, and between micro-steps."""
    engine = make(config("O2+", 3, micro_steps=2))
    source, losses = batches(engine), []
    parameters = list(engine.module.parameters())

    def save(tag: str) -> None:
        if folder is not None:
            engine.save_checkpoint(folder, tag=tag)

    losses += train_losses(engine, source, 1)
    with deepspeed.zero.GatheredParameters(parameters):
        save("reading")
        assert all(each.numel() == each_numel(each) for each in parameters)
        seen = engine.module.odd.detach().clone()
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        if dist.get_rank() == 0:
            engine.module.odd.data.mul_(2)  # not of the run yet
        save("writing")
    losses += train_losses(engine, source, 1)
    engine.backward(engine(next(source)) * float("nan"))
    engine.step()
    save("between micro-steps")
    engine.backward(engine(next(source)))
    engine.step()
    assert engine.skipped_steps == 1
    save("skipped")
    losses += train_losses(engine, source, 2)
    found = {"losses": losses, "seen": seen.view(-1), **facts(engine)}
    engine.destroy()
    return found


def load_moments(folder: str) -> list[dict[str, Any]]:
    found = []
    for tag in ("reading", "writing", "between micro-steps", "skipped"):
        engine = make(config("O2+", 3, micro_steps=2), seed=9)
        engine.load_checkpoint(folder, tag=tag)
        found.append(facts(engine))
        engine.destroy()
    return found


def test_saves_at_odd_moments(ranks: RankPools, tmp_path: Path) -> None:
    """A save changes nothing of what comes after it, and has what the masters have."""
    expected = ranks.run(2, save_at_odd_moments, None, seconds=SECONDS)
    saved = ranks.run(2, save_at_odd_moments, str(tmp_path), seconds=SECONDS)
    assert_same(expected, saved)
    for one, other in zip(expected, saved, strict=True):
        assert one["losses"] == other["losses"]
        assert torch.equal(one["seen"], other["seen"])
    loaded = ranks.run(2, load_moments, str(tmp_path), seconds=SECONDS)
    first, second, third, fourth = zip(*loaded, strict=True)
    assert_same(first, second)
    for key in ("packed", "weights"):
        assert repr(third[0][key]) == repr(fourth[0][key])
