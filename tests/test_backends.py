"""The whole handler on the C++ and on the interpreted Triton kernels trains to the bits of the reference."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same_bits, batches, build_gpt, ds_config, state_bits, train_losses, weight_bits
from grids import some_of
from ranks import RankPools
from train_lm import Shape

import ds_fp8
from ds_fp8.ops.cpu import build, kernels

TINY = Shape(layers=1, width=24, heads=2, context=16)  # 24: parameters end inside a block
STEPS = 4
KERNELS = ["triton", *(["cpu"] if build.compiler() else [])]


def train(backend: str, fp8: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    os.environ["DS_FP8_BACKEND"] = backend
    try:
        engine = build_gpt(ds_config(fp8, micro_batch=2, bucket=6_000, **options), TINY)
    finally:
        del os.environ["DS_FP8_BACKEND"]
    losses = train_losses(engine, batches(engine, shape=TINY), STEPS)
    result = {
        "kernels": ds_fp8.describe(engine)["kernels"],
        "losses": torch.tensor(losses),
        "norm": engine.get_global_grad_norm(),
        "weights": weight_bits(engine),
        "states": state_bits(engine.optimizer),
    }
    engine.destroy()
    return result


RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"opt_level": "O2"}, {"stage": 2}),
    ({"opt_level": "O2+"}, {"stage": 2}),
    ({"opt_level": "O1", "block_size": 32}, {"stage": 2, "micro_steps": 2}),
    ({"opt_level": "O2"}, {"stage": 1, "bf16": False}),
    ({"optimizer": {"master_dtype": "split8", "rounding": "stochastic"}}, {"stage": 2}),
    (
        {"opt_level": "O2", "gradients": {"dtype": "e5m2", "accum_dtype": "bf16"}},
        {"stage": 2, "clipping": 0.0},
    ),
]


@pytest.mark.parametrize("backend", KERNELS)
@some_of(["fp8", "options"], RUNS, 3)
def test_same_bits_as_the_reference(
    ranks: RankPools, backend: str, fp8: dict[str, Any], options: dict[str, Any]
) -> None:
    if backend == "triton":  # a GPU sums squares in an order of its own: no bits through a clip factor
        options = {**options, "clipping": 0.0}
    expected = ranks.run(2, train, "reference", fp8, options)
    assert {each["kernels"] for each in expected} == {"reference"}
    found = ranks.run(2, train, backend, fp8, options, seconds=300)
    assert {each["kernels"] for each in found} == {backend}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["losses"].tolist() == theirs["losses"].tolist()
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-6)
        assert_same_bits(ours["weights"], theirs["weights"])
        assert_same_bits(ours["states"], theirs["states"])


def refused(backend: str) -> str:
    os.environ["DS_FP8_BACKEND"] = backend
    try:
        build_gpt(ds_config({}), TINY)
    except ValueError as error:
        return str(error)
    finally:
        del os.environ["DS_FP8_BACKEND"]
    return "not refused"


def test_a_wrong_backend_is_refused_by_name(ranks: RankPools) -> None:
    for message in ranks.run(2, refused, "cuda"):
        assert "DS_FP8_BACKEND" in message
        assert "'cuda'" in message
        assert "reference, cpu, triton" in message


def without_compiler(empty: str) -> tuple[str, list[str]]:
    """What runs, and the warnings about it."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("ds_fp8")
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", empty)
        patch.delenv("CXX", raising=False)
        patch.setenv("TORCH_EXTENSIONS_DIR", empty)
        patch.setattr(kernels, "_library", kernels._library.__wrapped__)
        patch.setattr(kernels, "kernels", kernels.kernels.__wrapped__)
        engine = build_gpt(ds_config({}), TINY)
        train_losses(engine, batches(engine, shape=TINY), 2)
    logger.removeHandler(handler)
    runs = ds_fp8.describe(engine)["kernels"]
    engine.destroy()
    return runs, told


def test_without_a_compiler_one_rank_warns_once(ranks: RankPools, tmp_path: Path) -> None:
    (kernels, told), (other, silent) = ranks.run(2, without_compiler, str(tmp_path))
    assert kernels == other == "reference"
    assert len(told) == 1
    assert "plain PyTorch instead of kernels" in told[0]
    assert "install g++" in told[0]
    assert silent == []
