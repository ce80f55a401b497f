"""Models split over ranks, by AutoTP and by an mpu: training beside stock DeepSpeed, and refusals."""

import logging
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from engines import Lines, assert_same_bits, build, packed, refusal, whole_states
from hf_runs import FP8, LLAMA, assert_like_bf16, assert_same_run, result_of, trainer_of
from hf_runs import ds_config as hf_config
from packaging.version import Version
from ranks import RankPools
from split_models import (
    BUCKET,
    NEAREST,
    SIZE,
    Mpu,
    SplitModel,
    bits_of,
    config_of,
    engine_of,
    llama,
    loss_of,
    run,
    splits_forgotten,
    train,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import ds_fp8
from ds_fp8.estimate.methods import levels
from ds_fp8.estimate.runs import Run, model_of_module

SECONDS = 120.0
slow = pytest.mark.slow
EVERYTHING = {"micro_steps": 2, "clipping": 0.5, "zero": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("kind", "number", "stage", "options"),
    [
        pytest.param("autotp", 2, 1, {}, marks=slow),
        pytest.param("autotp", 2, 2, {}),
        pytest.param("autotp", 4, 1, {}, marks=slow),
        pytest.param("autotp", 4, 2, {}, marks=slow),
        pytest.param("autotp", 4, 2, EVERYTHING, marks=slow),
        pytest.param("mpu", 2, 2, EVERYTHING, marks=slow),
        pytest.param("mpu", 4, 1, {}, marks=slow),
        pytest.param("mpu", 4, 2, {}),
        pytest.param("mpu", 4, 1, EVERYTHING),
    ],
)
def test_equals_stock(ranks: RankPools, kind: str, number: int, stage: int, options: dict[str, Any]) -> None:
    """Losses and norms of stock ZeRO; what peers hold alike stays alike to the bit."""
    configs = (config_of(kind, fp8, stage=stage, **options) for fp8 in (NEAREST, None))
    runs, stock = (ranks.run(number, train, kind, each, seconds=SECONDS) for each in configs)
    ours, expected = runs[0], stock[0]
    assert ours["about"]["model_parallel_size"] == SIZE
    for step, (loss, other) in enumerate(zip(ours["losses"], expected["losses"], strict=True)):
        assert abs(loss - other) < 0.01, f"step {step}: loss {loss:.4f} and {other:.4f}"
    for step, (norm, other) in enumerate(zip(ours["norms"][:10], expected["norms"][:10], strict=True)):
        assert abs(norm / other - 1) < 0.02, f"step {step}: norm {norm:.4f} and {other:.4f}"
    assert statistics.fmean(ours["losses"][-5:]) < ours["losses"][0] - 0.3, "it does not learn"
    assert len(ours["whole"]) > 3
    for other in runs:
        assert other["norms"] == ours["norms"]
        assert_same_bits(*({name: each["weights"][name] for name in ours["whole"]} for each in (ours, other)))


def test_norms_are_those_of_data_parallelism(ranks: RankPools) -> None:
    """What peers hold alike counts once."""
    fp8 = {"gradients": {"dtype": "bf16"}}
    split = ranks.run(4, train, "autotp", config_of("autotp", fp8), 3, seconds=SECONDS)[0]
    whole = ranks.run(2, train, "autotp", config_of("autotp", fp8, 1), 3, 1, seconds=SECONDS)[0]
    assert whole["about"]["model_parallel_size"] == 1
    for norm, expected in zip(split["norms"], whole["norms"], strict=True):
        assert abs(norm / expected - 1) < 0.005, (split["norms"], whole["norms"])


def states_of(mpu: bool, stage: int) -> dict[str, Tensor]:
    """After 3 steps of the model, whole on every rank."""
    with splits_forgotten():
        alone = Mpu(1)
        options = {"mpu": alone} if mpu else {}
        engine = build(config_of("mpu", {}, 1, stage=stage), SplitModel(alone), **options)
        run(engine, 0, 3, 1)
        states = {
            f"{name} {key}": each
            for name, entry in packed(engine.optimizer).items()
            for key, each in entry.items()
            if isinstance(each, Tensor)
        }
        engine.destroy()
        return states | bits_of(engine)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_mpu_of_one_rank_changes_no_bit(ranks: RankPools, stage: int) -> None:
    with_mpu, without = (ranks.run(2, states_of, mpu, stage)[0] for mpu in (True, False))
    assert_same_bits(with_mpu, without)


def spoil(kind: str, name: str, spoiled: tuple[int, ...]) -> dict[str, Any]:
    """A step with an infinite gradient on some ranks, between two others."""
    with splits_forgotten():
        engine = engine_of(kind, config_of(kind, {"stats": {"interval": 1}}))
        found: dict[str, Any] = run(engine, 0, 1)
        before, lines = bits_of(engine), Lines()
        logging.getLogger("ds_fp8").addHandler(lines)
        parameter = dict(engine.module.named_parameters())[name]
        handle = None
        if dist.get_rank() in spoiled:
            handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
        engine.backward(loss_of(engine, 1, SIZE))
        engine.step()
        logging.getLogger("ds_fp8").removeHandler(lines)
        unchanged = all(torch.equal(each, before[key]) for key, each in bits_of(engine).items())
        stats = ds_fp8.stats(engine)
        assert stats is not None
        found |= {
            "unchanged": unchanged,
            "skipped": [float(engine.get_global_grad_norm()), engine.skipped_steps],
            "blocks": stats["total"]["gradient_non_finite_blocks"],
            "lines": [each for each in lines.lines if "skipped" in each],
        }
        if handle is not None:
            handle.remove()
        found["after"] = run(engine, 2, 1)["norms"]
        engine.destroy()
        return found


def test_every_rank_skips(ranks: RankPools) -> None:
    """An infinite gradient of one peer's part: all replicas and peers skip, and rank 0 names it."""
    found = ranks.run(4, spoil, "mpu", "blocks.1.up", (3,), seconds=SECONDS)
    for each in found:
        assert each["unchanged"]
        assert each["skipped"] == [float("inf"), 1]
        assert each["after"] == found[0]["after"]
    assert "blocks.1.up" in found[0]["lines"][0]


def late() -> dict[str, Any]:
    """A gradient that one peer is given after backward."""
    with splits_forgotten():
        engine = engine_of("mpu", config_of("mpu", {}))
        engine.backward(loss_of(engine, 0, SIZE))
        if dist.get_rank() == 3:
            up = engine.module.blocks[1].up
            up.grad = torch.full_like(up, 0.1)
        engine.step()
        found: dict[str, Any] = {"norm": float(engine.get_global_grad_norm())}
        found |= run(engine, 1, 1)
        engine.destroy()
        return found


def test_a_late_gradient_of_one_peer_counts(ranks: RankPools) -> None:
    found = ranks.run(4, late, seconds=SECONDS)
    plain = ranks.run(4, train, "mpu", config_of("mpu", {}), 1, seconds=SECONDS)[0]
    assert found[0]["norm"] > 1.1 * plain["norms"][0]
    for each in found:
        assert each == found[0]


def objected() -> str:
    """The words of a step after one peer has replaced a weight by another shape."""
    with splits_forgotten():
        engine = engine_of("mpu", config_of("mpu", {}))
        engine.backward(loss_of(engine, 0, SIZE))
        if dist.get_rank() == 3:
            engine.module.blocks[1].up.data = torch.zeros(3)
        words = refusal(engine.step)
        engine.destroy()
        return words


def test_an_objection_of_one_peer_is_everyones(ranks: RankPools) -> None:
    for words in ranks.run(4, objected, seconds=SECONDS):
        assert words.startswith("rank 3: blocks.1.up: received")


def test_health_counts_once_what_peers_hold_alike(ranks: RankPools) -> None:
    """The bias has one block; both peers of both replicas have an infinite gradient in it."""
    found = ranks.run(4, spoil, "mpu", "blocks.1.bias", (0, 1, 2, 3), seconds=SECONDS)
    assert [each["blocks"] for each in found] == [2, 2, 2, 2]


def test_is_said(ranks: RankPools) -> None:
    lines = ranks.run(4, said, "autotp")[0]
    assert "ZeRO 2, 4 ranks, model parallel 2 |" in lines


def said(kind: str) -> str:
    lines = Lines()
    logging.getLogger("ds_fp8").addHandler(lines)
    with splits_forgotten():
        engine_of(kind, config_of(kind, {})).destroy()
    logging.getLogger("ds_fp8").removeHandler(lines)
    return "\n".join(lines.lines)


def bytes_of() -> tuple[int, int]:
    """Of this rank's states and reduced gradients, and of its weights."""
    with splits_forgotten():
        engine = engine_of("autotp", config_of("autotp", {}))
        held = engine.optimizer.nbytes
        buffers = sum(each.buffer.nbytes for each in engine.optimizer.parts.weights)
        frozen = sum(each.nbytes for each in engine.module.parameters() if not each.requires_grad)
        engine.destroy()
        return held, buffers + frozen


@pytest.mark.skipif(
    Version(version("deepspeed")) < Version("0.19.8"), reason="AutoTP leaves the head whole before 0.19.8"
)
def test_bytes_are_those_of_the_estimate(ranks: RankPools) -> None:
    found = ranks.run(4, bytes_of, seconds=SECONDS)
    run_of = Run(4, 2, bucket_elements=BUCKET, model_parallel_size=SIZE)
    held = levels()["O2"].held(model_of_module(llama()), run_of)
    assert max(each[0] for each in found) == held.states + held.gradients
    assert {each[1] for each in found} == {held.weights}


# Refused


class Pipeline(Mpu):
    def get_pipeline_model_parallel_world_size(self) -> int:
        return 2


class NoGrid(Mpu):
    def get_model_parallel_group(self) -> Any:
        return self.get_data_parallel_group()


class Unequal(SplitModel):
    """Made of another seed on every rank."""

    def __init__(self, mpu: Mpu) -> None:
        super().__init__(mpu)
        torch.manual_seed(dist.get_rank())
        nn.init.normal_(self.tokens.weight)


class Adapted(nn.Module):
    """A Llama in the arms of PEFT."""

    @staticmethod
    def make() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        model: Any = llama()
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))


def words_of(what: str) -> str:
    """The refusal of an engine."""
    with splits_forgotten():
        if what == "sizes":
            size = {"tensor_parallel": {"autotp_size": 3}}
            return refusal(lambda: build(config_of("autotp", {}) | size, llama()))
        if what == "lora":
            return refusal(lambda: build(config_of("autotp", {}), Adapted.make()))
        mpu = {"pipeline": Pipeline, "no grid": NoGrid}.get(what, Mpu)(SIZE)
        model = Unequal(mpu) if what == "unequal" else SplitModel(mpu)
        options: dict[str, Any] = {"O3": {"opt_level": "O3"}, "tensor": {"scaling": "tensor"}}.get(what, {})
        config = config_of("mpu", options, stage=3 if what == "stage" else 2)
        return refusal(lambda: build(config, model, mpu=mpu))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "O3",
            'fp8.opt_level: received "O3", allowed: "O1", "O2", "O2+" with an mpu of model parallel size 2',
        ),
        ("tensor", 'fp8.scaling: received "tensor", allowed: "block" with an mpu of model parallel size 2'),
        ("stage", "zero_optimization.stage: received 3, allowed: 1, 2 with an mpu of model parallel size 2"),
        ("pipeline", "deepspeed.initialize: received an mpu with pipeline stages"),
        ("no grid", "deepspeed.initialize: received an mpu whose groups hold the ranks"),
        ("unequal", "rank 0: tokens.weight: received other values than on the first model-parallel rank"),
        ("sizes", "tensor_parallel.autotp_size: received 3, allowed: divisors of the world size 2: 1, 2"),
        ("lora", "received adapters of PEFT, allowed with tensor_parallel.autotp_size 2: none"),
    ],
)
def test_refused(ranks: RankPools, what: str, words: str) -> None:
    for message in ranks.run(2, words_of, what, seconds=SECONDS):
        assert words in message


# The Trainer, whose accelerate makes the groups


def train_by_trainer(
    folder: str, fp8: dict[str, Any] | None, steps: int, resume: str | None = None
) -> dict[str, Any]:
    with splits_forgotten():
        keys = {"tensor_parallel": {"autotp_size": SIZE}}
        config = hf_config(fp8, **keys)
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        options = {"max_steps": steps, "logging_steps": 1, "save_strategy": "steps", "save_steps": 6}
        trainer = trainer_of(folder, config, shape=LLAMA, bf16=True, per_device_train_batch_size=4, **options)
        trainer.train(resume_from_checkpoint=resume)
        result = result_of(trainer) | {"weights": bits_of(trainer.model_wrapped)}
        trainer.save_model(f"{folder}/model")
        trainer.model_wrapped.destroy()
        return result


def test_trainer(ranks: RankPools, tmp_path: Path) -> None:
    """Beside stock; a resumed training is the unbroken one; the saved model is whole."""
    ours, again = str(tmp_path / "ours"), str(tmp_path / "again")
    unbroken = ranks.run(2, train_by_trainer, ours, FP8 | NEAREST, 12, seconds=SECONDS)
    stock = ranks.run(2, train_by_trainer, str(tmp_path / "stock"), None, 12, seconds=SECONDS)[0]
    assert_like_bf16(unbroken[0], stock, last=6)
    checkpoint = f"{ours}/checkpoint-6"
    resumed = ranks.run(2, train_by_trainer, again, FP8 | NEAREST, 12, checkpoint, seconds=SECONDS)
    for before, after in zip(unbroken, resumed, strict=True):
        assert_same_run(after, before)
    model = LlamaForCausalLM.from_pretrained(f"{ours}/model", dtype=torch.bfloat16)
    parts = [each["weights"] for each in unbroken]
    for name, tensor in model.state_dict().items():
        shapes = zip(tensor.shape, parts[0][name].shape, strict=True)
        cut = next((at for at, (whole, part) in enumerate(shapes) if whole != part), None)
        expected = parts[0][name] if cut is None else torch.cat([part[name] for part in parts], cut)
        assert torch.equal(tensor, expected), name


def offloaded(executor: str) -> None:
    """A split model with states on the device and in host memory: the same losses, norms and bits."""
    runs = []
    for offload in (None, {"executor": executor}):
        fp8 = {"offload": offload} if offload else {}
        zero = {"offload_optimizer": {"device": "cpu"}} if offload else None
        found = train("mpu", config_of("mpu", fp8, zero=zero), steps=3)
        assert found["about"].get("offload") == (executor if offload else None)
        runs.append(found)
    plain, away = runs
    assert (away["losses"], away["norms"]) == (plain["losses"], plain["norms"])
    assert_same_bits(away["weights"], plain["weights"])
    assert_same_bits(whole_states([away["states"]]), whole_states([plain["states"]]))


@pytest.mark.parametrize("executor", ["stream", "host"])
def test_offload_changes_no_bit(ranks: RankPools, executor: str) -> None:
    ranks.run(4, offloaded, executor)
