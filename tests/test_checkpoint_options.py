"""The arguments of save_checkpoint and load_checkpoint, and what the folders hold."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import (
    SMALL,
    assert_same_bits,
    batches,
    build,
    ds_config,
    state_bits,
    train_losses,
    weight_bits,
    zero3,
)
from foreign_files import MODEL, STATES
from ranks import RankPools
from torch import nn
from train_lm import ByteGPT

from ds_fp8.zero_fp8.checkpoint import manifest

STAGES = pytest.mark.parametrize("stage", [2, 3])
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}


class PartlyFrozen(ByteGPT):
    def __init__(self) -> None:
        super().__init__(SMALL)
        self.blocks[0].requires_grad_(False)


class Anything:
    """A client's object, which only unpickling brings back."""


def make(seed: int = 0, model: type[nn.Module] = PartlyFrozen, level: str = "O2", **options: Any) -> Any:
    torch.manual_seed(seed)
    scheduler, stage = options.pop("scheduler", WARMUP), options.pop("stage", 2)
    zero = zero3() if stage == 3 else {}
    fp8 = {"opt_level": level, **options.pop("fp8", {})}
    config = ds_config(fp8, stage=stage, zero=zero, scheduler=scheduler)
    return build({**config, **options}, model())


def trained(steps: int = 2, **options: Any) -> Any:
    engine = make(**options)
    train_losses(engine, batches(engine), steps)
    return engine


def model_file(stage: int) -> str:
    """That of this rank."""
    return MODEL if stage < 3 else f"zero_pp_rank_{dist.get_rank()}_{MODEL}"


def assert_loaded(engine: Any, other: Any) -> None:
    """The same weights, states and counters."""
    assert_same_bits(weight_bits(engine), weight_bits(other))
    assert_same_bits(state_bits(engine.optimizer), state_bits(other.optimizer))
    assert engine.global_steps == other.global_steps
    assert engine.optimizer.optimizer.steps == other.optimizer.optimizer.steps


def tags_and_latest(folder: str, stage: int) -> None:
    engine, latest = trained(stage=stage), Path(folder, "latest")
    fresh = make(seed=1, stage=stage)
    assert fresh.load_checkpoint(folder) == (None, None)
    engine.save_checkpoint(folder)
    assert latest.read_text() == "global_step2"
    engine.save_checkpoint(folder, tag="kept", save_latest=False)
    assert latest.read_text() == "global_step2"
    engine.save_checkpoint(folder, tag=7)
    assert latest.read_text() == "7"
    dist.barrier()
    assert sorted(path.name for path in Path(folder).iterdir() if path.is_dir()) == [
        "7",
        "global_step2",
        "kept",
    ]
    for tag in (None, "kept", 7, "global_step2"):
        path, _ = make(seed=1, stage=stage).load_checkpoint(folder, tag=tag)
        name = "7" if tag is None else str(tag)
        assert path == os.path.join(folder, name, model_file(stage))
    fresh.load_checkpoint(folder)
    assert_loaded(fresh, engine)
    with pytest.raises(ValueError, match="no such folder"):
        fresh.load_checkpoint(folder, tag="lost")
    with pytest.raises(ValueError, match="save_checkpoint: received"):
        engine.save_checkpoint(folder, tag="")


@STAGES
def test_tags_and_latest(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    ranks.run(2, tags_and_latest, str(tmp_path), stage)


def client_state(folder: str, level: str, stage: int) -> None:
    """Objects of the client come back, beside split masters as well."""
    engine = trained(level=level, stage=stage)
    engine.save_checkpoint(folder, client_state={"epoch": 3, "object": Anything()})
    fresh = make(seed=1, level=level, stage=stage)
    _, state = fresh.load_checkpoint(folder)
    assert state["epoch"] == 3
    assert isinstance(state["object"], Anything)
    assert_loaded(fresh, engine)
    other = make(seed=1, level="O1", fp8={"checkpoint": {"allow_conversion": True}}, stage=stage)
    other.load_checkpoint(folder)
    assert other.global_steps == 2
    for name, bits in weight_bits(engine).items():
        assert torch.equal(weight_bits(other)[name], bits), name


@pytest.mark.parametrize(("level", "stage"), [("O2", 2), ("O2+", 2), ("O2+", 3)])
def test_client_state(ranks: RankPools, tmp_path: Path, level: str, stage: int) -> None:
    ranks.run(2, client_state, str(tmp_path), level, stage)


class Holder:
    """A client's object with a tensor in it."""

    def __init__(self) -> None:
        self.kept = torch.arange(5000)


def after_the_file_is_gone(folder: str) -> None:
    engine, kept = make(), torch.arange(5000)
    engine.save_checkpoint(folder, client_state={"a": kept, "b": [{"c": (kept + 1,)}], "object": Holder()})
    _, state = engine.load_checkpoint(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        os.truncate(Path(folder, "global_step0", MODEL), 0)  # what is mapped there is no more
    dist.barrier()
    found = (state["a"], state["b"][0]["c"][0] - 1, state["object"].kept)
    assert all(torch.equal(each, kept) for each in found)
    engine.destroy()


def test_a_client_state_outlives_its_file(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(2, after_the_file_is_gone, str(tmp_path), seconds=60)


def parts(folder: str, stage: int) -> None:
    engine = trained(stage=stage)
    engine.save_checkpoint(folder)

    weights_only = trained(steps=1, seed=1, stage=stage)
    before, steps = state_bits(weights_only.optimizer), weights_only.optimizer.optimizer.steps
    weights_only.load_checkpoint(folder, load_optimizer_states=False)
    now = state_bits(weights_only.optimizer)
    assert weights_only.global_steps == 2
    assert weights_only.optimizer.optimizer.steps == steps
    for key, bits in now.items():
        if "master" not in key:
            assert torch.equal(bits, before[key])
    loaded = weight_bits(weights_only)
    for name, bits in weight_bits(engine).items():
        close = torch.isclose(
            loaded[name].view(torch.bfloat16), bits.view(torch.bfloat16), rtol=1e-2, atol=1e-6
        )
        assert close.all(), name

    module_only = make(seed=1, stage=stage)
    learning_rate = module_only.get_lr()
    module_only.load_checkpoint(folder, load_module_only=True)
    assert module_only.global_steps == 0
    assert module_only.get_lr() == learning_rate
    assert_same_bits(weight_bits(module_only), loaded)

    no_scheduler = make(seed=1, stage=stage)
    scheduled = no_scheduler.lr_scheduler.state_dict()
    no_scheduler.load_checkpoint(folder, load_lr_scheduler_states=False)
    assert no_scheduler.lr_scheduler.state_dict() == scheduled
    assert_loaded(no_scheduler, engine)


@STAGES
def test_parts(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    ranks.run(2, parts, str(tmp_path), stage)


def frozen_left_out(folder: str, stage: int) -> None:
    engine = trained(stage=stage)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    fresh = make(seed=1, stage=stage)
    before = weight_bits(fresh)
    with pytest.raises(ValueError, match="load_module_strict=False takes what both have"):
        fresh.load_checkpoint(folder)
    fresh.load_checkpoint(folder, load_module_strict=False)
    for name, each in weight_bits(fresh).items():
        source = before if name.startswith("blocks.0.") else weight_bits(engine)
        assert torch.equal(each, source[name]), name
    assert_same_bits(state_bits(fresh.optimizer), state_bits(engine.optimizer))


def overwriting(folder: str) -> str:
    engine = make()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 its words are what the test returns
        engine.save_checkpoint(folder, client_state={"epoch": 3, "module": {}, "global_steps": 7})
    engine.destroy()
    assert not any(Path(folder).iterdir())
    return str(caught.value)


def test_client_state_does_not_overwrite_what_deepspeed_keeps(ranks: RankPools, tmp_path: Path) -> None:
    for message in ranks.run(2, overwriting, str(tmp_path)):
        assert "received client_state with module, global_steps, allowed" in message


@STAGES
def test_exclude_frozen_parameters(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    ranks.run(2, frozen_left_out, str(tmp_path), stage)


def what_is_frozen_must_fit(folder: str, stage: int) -> None:
    engine = trained(model=lambda: ByteGPT(SMALL), stage=stage)
    engine.save_checkpoint(folder)
    for options in ({}, {"load_optimizer_states": False}):
        fresh = make(seed=1, stage=stage)
        before = weight_bits(fresh)
        with pytest.raises(ValueError, match="frozen in this run, trained in the checkpoint"):
            fresh.load_checkpoint(folder, **options)
        assert_same_bits(weight_bits(fresh), before)
    unscheduled = trained(scheduler=None, stage=stage)
    unscheduled.save_checkpoint(folder, tag="unscheduled")
    fresh = make(seed=1, stage=stage)
    with pytest.raises(ValueError, match="load_lr_scheduler_states=False keeps it"):
        fresh.load_checkpoint(folder)
    fresh.load_checkpoint(folder, load_lr_scheduler_states=False)
    assert_loaded(fresh, unscheduled)


@STAGES
def test_what_is_frozen_and_scheduled_must_fit(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    ranks.run(2, what_is_frozen_must_fit, str(tmp_path), stage)


def custom_load(folder: str, stage: int) -> None:
    engine, fresh, seen = trained(stage=stage), make(seed=1, stage=stage), []

    def load(src: dict[str, Any], dst: nn.Module) -> None:
        seen.append(len(src))
        dst.load_state_dict(src)

    engine.save_checkpoint(folder)
    fresh.load_checkpoint(folder, custom_load_fn=load)
    assert seen == [len(engine.module.state_dict())]
    assert_loaded(fresh, engine)
    if stage == 3:
        for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
            with pytest.raises(ValueError, match="received custom_load_fn without optimizer states"):
                fresh.load_checkpoint(folder, custom_load_fn=load, **options)
        assert len(seen) == 1


@STAGES
def test_custom_load_fn(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    ranks.run(2, custom_load, str(tmp_path), stage)


def save_again(folder: str, stage: int) -> None:
    trained(stage=stage).save_checkpoint(folder, tag="again")


@STAGES
def test_a_tag_saved_again_has_no_files_of_the_old_one(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    """Files of ranks that are no more would end up in zero_to_fp32."""
    ranks.run(3, save_again, str(tmp_path), stage)
    ranks.run(1, save_again, str(tmp_path), stage)
    assert len(list((tmp_path / "again").glob("*_optim_states.pt"))) == 1
    facts = manifest.read(tmp_path / "again")
    assert facts is not None
    assert set(facts.files) | {manifest.NAME} == {path.name for path in (tmp_path / "again").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["again"]


def on_nodes(folder: str, stage: int) -> list[str]:
    """As many nodes as ranks, each with a folder that only it sees."""
    os.environ["LOCAL_RANK"] = "0"
    own = os.path.join(folder, f"node{dist.get_rank()}")
    try:
        storage = {"checkpoint": {"use_node_local_storage": True}}
        engine = trained(**storage, stage=stage)
        engine.save_checkpoint(own)
        fresh = make(seed=1, **storage, stage=stage)
        fresh.load_checkpoint(own)
        assert_loaded(fresh, engine)
        damaged = Path(own, "global_step2", model_file(stage))
        if dist.get_rank() == 1:
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        with pytest.raises(ValueError, match=r"rank 1: .*SHA-256 does not match"):
            make(seed=1, **storage, stage=stage).load_checkpoint(own)
    finally:
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
    return sorted(path.name for path in Path(own, "global_step2").iterdir())


@STAGES
def test_use_node_local_storage(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    for rank, files in enumerate(ranks.run(2, on_nodes, str(tmp_path), stage)):
        model = MODEL if stage == 2 else f"zero_pp_rank_{rank}_{MODEL}"
        assert files == sorted([STATES.format(rank), manifest.NAME, model])
        assert (tmp_path / f"node{rank}" / "latest").read_text() == "global_step2"
