"""Checkpoints of stock DeepSpeed and universal ones, spoiled in every place; runs on ranks."""

import argparse
import copy
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint import ds_to_universal
from engines import assert_same_bits, build, ds_config, refusal, state_bits, weight_bits, zero3
from torch import Tensor, nn

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
MODEL = "mp_rank_00_model_states.pt"
STATES = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
COMMON = "zero/optimizer_state.pt"
MODEL3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
PARTS = {
    "stock": (MODEL, STATES.format(0), STATES.format(1)),
    "stock 3": (*map(MODEL3.format, range(2)), *map(STATES.format, range(2))),
    "universal": (MODEL, COMMON),
    "universal 3": (*map(MODEL3.format, range(2)), COMMON),
}
DEPTH = 6

Way = tuple[Any, ...]  # keys and indices that lead to an entry


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
    bf16: bool = True,
    stage: int = 2,
) -> Any:
    torch.manual_seed(seed)
    zero = zero3(persistence=30) if stage == 3 else {}
    config = ds_config(fp8, stage=stage, zero=zero, scheduler=WARMUP, bf16=bf16)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine = build(config, Small())
    for _ in range(steps):
        train(engine)
    return engine


def train(engine: Any) -> None:
    engine.backward(engine(torch.randn(4, 16, dtype=engine.module.first.weight.dtype)))
    engine.step()


def save(folder: str, fp8: dict[str, Any] | None, stage: int = 2) -> None:
    engine = make(fp8, steps=3, stage=stage)
    engine.save_checkpoint(folder, tag="tag")
    engine.destroy()


def convert(folder: Path, out: Path) -> None:
    """DeepSpeed's own converter, in this process: starting another costs seconds."""
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    switches = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    ds_to_universal.main(
        argparse.Namespace(input_folder=str(folder), output_folder=str(out), **workers, **switches)
    )


def without_scheduler(source: Path, out: Path) -> None:
    shutil.copytree(source, out)
    for path in (out / "tag").glob("*model_states.pt"):
        torch.save({**torch.load(path, weights_only=False), "lr_scheduler": None}, path)


def of_kind(kind: str) -> dict[str, Any]:
    """What `make` needs for a checkpoint's kind."""
    return {"universal": "universal" in kind, "stage": 3 if kind.endswith("3") else 2}


# Spoiling


def entries(value: Any, depth: int = DEPTH) -> Iterator[Way]:
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


def spoil(file: Any, way: Way, instead: Any) -> Any:
    changed = copy.deepcopy(file)
    place = changed
    for key in way[:-1]:
        place = place[key]
    if instead is ...:
        del place[way[-1]]
    else:
        place[way[-1]] = instead
    return changed


def cases(tag: Path, kind: str) -> list[tuple[str, Way, str, Any]]:
    """Every spoiled file: its name, the way to the entry, what was done, and what stands there then."""
    found = []
    for name in PARTS[kind]:
        file = torch.load(tag / name, weights_only=False)
        for way in entries(file):
            if way[0] in IGNORED and not (way[0] in READ_OF_3 and name == MODEL3.format(0)):
                continue
            value = file
            for key in way:
                value = value[key]
            found += [(name, way, what, instead) for what, instead in spoilers(value)]
    return found


# Entries that a load into a run with FP8 does not read.
READ_OF_3 = ("param_shapes", "frozen_param_shapes")
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
        engine.lr_scheduler and engine.lr_scheduler.state_dict(),
        engine.optimizer.parts.gradient_scales.state(engine.optimizer.parameter_names),
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
    return refusal(lambda: engine.load_checkpoint(str(folder), **options))


def on_first(act: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()


FP8 = {"opt_level": "O1", "checkpoint": {"allow_conversion": True}}


def load_spoiled(root: str, kind: str, chosen: slice) -> list[tuple[str, str, bool, bool]]:
    """Of each case: what was done, the error, whether all is as before, whether it is as if loaded whole."""
    source, folder = Path(root, kind), Path(root, f"spoiled {kind}")
    whole, engine = (make(FP8, seed, steps=1, **of_kind(kind)) for seed in (1, 5))
    assert not attempt(whole, source)
    loaded, before, told = snapshot(whole), snapshot(engine), []
    on_first(lambda: shutil.copytree(source, folder))

    def write(name: str, way: Way, instead: Any) -> None:
        file = torch.load(source / "tag" / name, weights_only=False)
        torch.save(spoil(file, way, instead), folder / "tag" / name)

    for name, way, what, instead in cases(source / "tag", kind)[chosen]:
        on_first(functools.partial(write, name, way, instead))
        error, now = attempt(engine, folder), snapshot(engine)
        told.append((f"{name} {way} {what}", error, same(now, before), same(now, loaded)))
        on_first(functools.partial(shutil.copy, source / "tag" / name, folder / "tag" / name))
        if not error:
            engine.destroy()
            engine = make(FP8, 5, steps=1, **of_kind(kind))
            before = snapshot(engine)
    on_first(lambda: shutil.rmtree(folder))
    whole.destroy()
    engine.destroy()
    return told


def load_as_trained(root: str, kind: str, bf16: bool) -> list[str]:
    """Into a run of the same weights: what of its states and hyperparameters is part of a graph then."""
    folder = Path(root, kind)
    if not bf16:
        folder = Path(root, "stock fp32")
        engine = make(None, steps=1, bf16=False)
        engine.save_checkpoint(str(folder), tag="tag")
        engine.destroy()
    engine = make(FP8, 5, bf16=bf16, steps=1)
    assert not attempt(engine, folder)
    found = []
    for index, shard in enumerate(engine.optimizer.parts.shards):
        with shard.lend() as state:
            found += [
                f"{key} of shard {index}"
                for key in ("master", "exp_avg", "exp_avg_sq")
                for each in vars(getattr(state, key)).values()
                if isinstance(each, Tensor) and (each.requires_grad or each.grad_fn is not None)
            ]
    train(engine)  # in place, which a graph forbids
    engine.destroy()
    return found


def harm(path: Path, how: str) -> None:
    """A whole file becomes none."""
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"hello"}[how])


def load_harmed(root: str, kind: str) -> list[tuple[str, str, bool]]:
    """Of each file and harm: what was done, the error, whether all is as before."""
    source, folder, told = Path(root, kind), Path(root, f"harmed {kind}"), []
    engine = make(FP8, 5, steps=1, **of_kind(kind))
    before = snapshot(engine)
    parts = [*PARTS[kind], *(["zero/first.weight/fp32.pt"] if "universal" in kind else [])]
    for name in parts:
        for how in ("missing", "empty", "cut", "text", "folder"):
            on_first(lambda: shutil.copytree(source, folder))
            on_first(functools.partial(harm, folder / "tag" / name, how))
            told.append((name, attempt(engine, folder), same(snapshot(engine), before)))
            on_first(lambda: shutil.rmtree(folder))
    engine.destroy()
    return told


def load_without_scheduler(root: str, kind: str) -> tuple[str, bool, bool]:
    """The error, whether all is as before, and whether it loads when told to keep the scheduler."""
    engine = make(FP8, 5, steps=1, **of_kind(kind))
    before = snapshot(engine)
    error, unchanged = attempt(engine, Path(root, kind)), same(snapshot(engine), before)
    loaded = not attempt(engine, Path(root, kind), load_lr_scheduler_states=False)
    engine.destroy()
    return error, unchanged, loaded


class Stubborn:
    """A client's scheduler that takes nothing, after it has taken something."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.last_batch_iteration = optimizer, 0

    def step(self) -> None:
        self.last_batch_iteration += 1

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        strange = state["last_batch_iteration"] == 2
        self.last_batch_iteration = state["last_batch_iteration"]
        for group in self.optimizer.param_groups:
            group["lr"] = 7.0
        if strange and dist.get_rank() == 1:
            raise LookupError("not from here")


def load_into_stubborn(root: str) -> tuple[str, bool, str]:
    """The errors of a scheduler and of a custom_load_fn that refuse on one rank."""
    torch.manual_seed(0)
    engine = build(ds_config(FP8), Small(), lr_scheduler=Stubborn)
    before = snapshot(engine)
    error, unchanged = attempt(engine, Path(root, "stock")), same(snapshot(engine), before)

    def load(src: Any, dst: Any) -> None:
        if dist.get_rank() == 0:
            raise LookupError("nor this")

    options = {"load_module_only": True, "custom_load_fn": load}
    custom = attempt(engine, Path(root, "stock"), **options)
    engine.destroy()
    return error, unchanged, custom
