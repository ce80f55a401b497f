"""Checkpoints of stock DeepSpeed and universal ones, spoiled in every place; everything here runs on a rank."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from engines import assert_same_bits, build, ds_config, state_bits, weight_bits
from torch import Tensor, nn

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
MODEL = "mp_rank_00_model_states.pt"
STATES = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
COMMON = "zero/optimizer_state.pt"
PARTS = {"stock": (MODEL, STATES.format(0), STATES.format(1)), "universal": (MODEL, COMMON)}
DEPTH = 6

Path_ = tuple[Any, ...]  # keys and indices that lead to an entry


class Small(nn.Module):
    """With a frozen layer, a buffer and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 4)
        self.fixed = nn.Linear(24, 24)
        self.fixed.requires_grad_(False)
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y: Tensor = self.last(self.fixed(self.first(x).relu())).float().square().mean()
        return y

    def get_extra_state(self) -> Tensor:
        """It grows, as Transformer Engine's does."""
        return torch.full((self.seen + 1,), self.seen, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert state.dtype is torch.uint8
        self.seen = int(state[0])


def make(
    fp8: dict[str, Any] | None,
    seed: int = 0,
    *,
    universal: bool = False,
    scheduler: bool = True,
    steps: int = 0,
) -> Any:
    torch.manual_seed(seed)
    config = ds_config(fp8, scheduler=WARMUP if scheduler else None)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine = build(config, Small())
    for _ in range(steps):
        engine.backward(engine(torch.randn(4, 16, dtype=torch.bfloat16)))
        engine.step()
    return engine


def save(folder: str, fp8: dict[str, Any] | None, scheduler: bool = True) -> None:
    engine = make(fp8, scheduler=scheduler, steps=3)
    engine.save_checkpoint(folder, tag="tag")
    engine.destroy()


# Spoiling


def entries(value: Any, depth: int = DEPTH) -> Iterator[Path_]:
    """The way to every entry of dicts and to the first one of lists."""
    keys = list(value) if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
    for key in keys if depth else ():
        yield (key,)
        yield from ((key, *rest) for rest in entries(value[key], depth - 1))


def spoilers(value: Any) -> list[tuple[str, Any]]:
    """What may stand in an entry's place; `...`: nothing."""
    found: list[tuple[str, Any]] = [("without", ...), ("none", None), ("text", "x"), ("object", [{}])]
    if isinstance(value, Tensor) and value.numel():
        found += [("cut", value.view(-1)[:-1].clone()), ("whole", value.to(torch.int64))]
    elif isinstance(value, list):
        found.append(("empty", []))
    elif isinstance(value, dict):
        found.append(("empty", {}))
    elif isinstance(value, int | float):
        found += [("nan", float("nan")), ("below", -5)]
    return found


def spoil(file: Any, way: Path_, instead: Any) -> Any:
    changed = copy.deepcopy(file)
    place = changed
    for key in way[:-1]:
        place = place[key]
    if instead is ...:
        del place[way[-1]]
    else:
        place[way[-1]] = instead
    return changed


def cases(tag: Path, kind: str) -> list[tuple[str, Path_, str, Any]]:
    """Every spoiled file: its name, the way to the entry, what was done, and what stands there then."""
    found = []
    for name in PARTS[kind]:
        file = torch.load(tag / name, weights_only=False)
        for way in entries(file):
            if way[0] in IGNORED:
                continue
            value = file
            for key in way:
                value = value[key]
            found += [(name, way, what, instead) for what, instead in spoilers(value)]
    return found


# What nobody reads on the way into a run with FP8.
IGNORED = ("ds_config", "ds_version", "param_shapes", "buffer_names", "shared_params", "frozen_param_shapes")


# Loading


def snapshot(engine: Any) -> dict[str, Any]:
    """Every bit that a load may change."""
    optimizer = engine.optimizer.optimizer
    bits = {**weight_bits(engine), **state_bits(engine.optimizer)}
    bits |= {name: each.clone().view(-1) for name, each in engine.module.named_buffers()}
    counters = (
        engine.global_steps,
        engine.global_samples,
        engine.skipped_steps,
        engine.module.seen,
        optimizer.steps,
        optimizer.clamp_squares,
        [{key: each for key, each in group.items() if key != "params"} for group in optimizer.param_groups],
        engine.lr_scheduler and sorted(vars(engine.lr_scheduler).items(), key=lambda each: each[0])[:-1],
        engine.lr_scheduler and engine.lr_scheduler.state_dict(),
        engine.optimizer.wire.state(engine.optimizer.parameter_names),
        vars(engine.optimizer.loss_scaler),
    )
    return {"bits": bits, "counters": repr(counters)}


def same(first: dict[str, Any], second: dict[str, Any], *, counters: bool = True) -> bool:
    try:
        assert_same_bits(first["bits"], second["bits"])
    except AssertionError:
        return False
    return not counters or bool(first["counters"] == second["counters"])


def attempt(engine: Any, folder: Path, **options: Any) -> str:
    """The words of the ValueError; "" if it has loaded."""
    try:
        engine.load_checkpoint(str(folder), **options)
    except ValueError as error:
        return str(error)
    return ""


def on_first(act: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def load_spoiled(root: str, kind: str, chosen: slice) -> list[tuple[str, str, bool, bool]]:
    """Of each case: what was done, the error, whether all is as before, and whether it is as if loaded whole."""
    source, folder = Path(root, kind), Path(root, f"spoiled {kind}")
    fp8 = {"opt_level": "O1", "checkpoint": {"allow_conversion": True}}
    whole, engine = (make(fp8, seed, universal=kind == "universal", steps=1) for seed in (1, 5))
    assert not attempt(whole, source)
    loaded, before, told = snapshot(whole), snapshot(engine), []
    on_first(lambda: shutil.copytree(source, folder))
    for name, way, what, instead in cases(source / "tag", kind)[chosen]:
        file = torch.load(source / "tag" / name, weights_only=False)
        on_first(lambda f=spoil(file, way, instead), n=name: torch.save(f, folder / "tag" / n))
        error, now = attempt(engine, folder), snapshot(engine)
        told.append((f"{name} {way} {what}", error, same(now, before), same(now, loaded)))
        on_first(lambda n=name: shutil.copy(source / "tag" / n, folder / "tag" / n))
        if not error:
            engine.destroy()
            engine = make(fp8, 5, universal=kind == "universal", steps=1)
            before = snapshot(engine)
    on_first(lambda: shutil.rmtree(folder))
    whole.destroy()
    engine.destroy()
    return told


def count_cases(root: str, kind: str) -> int:
    return len(cases(Path(root, kind, "tag"), kind)) if os.path.isdir(root) else 0
