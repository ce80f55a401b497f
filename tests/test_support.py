"""Every row of docs/support.md, run."""

import os
import re
import statistics
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed import comm as dist
from engines import batches, ds_config
from packaging.version import Version
from ranks import RankPools
from support import (
    FEATURES,
    O3,
    PROVED_ELSEWHERE,
    PROVED_UNDER_3,
    REFUSED,
    REFUSED_BY_MODEL,
    build_feature,
    markdown,
)
from torch import nn

from ds_fp8.config import ds_config as rest

STEPS = 30
ROOT = Path(__file__).resolve().parent.parent


def train(name: str, stage: int, fp8: bool) -> dict[str, list[float]]:
    """30 steps of a feature: mean loss over ranks and gradient norm of each."""
    with patch.dict(os.environ, {"DS_FP8_PRODUCTS": "emulated"}):
        engine = build_feature(name, stage, fp8)
    source = batches(engine)
    result: dict[str, list[float]] = {"losses": [], "norms": [], "rates": []}
    for _ in range(STEPS):
        loss = FEATURES[name].step(engine, source).detach().float()
        dist.all_reduce(loss)
        result["losses"].append(loss.item() / dist.get_world_size())
        result["norms"].append(float(engine.get_global_grad_norm()))
        result["rates"].append(engine.get_lr()[0])
    engine.destroy()
    return result


EARLY = {f"{O3}{name}" for name in ("gradient accumulation", "tied parameters")}


def cases() -> Iterator[Any]:
    """Stages in turn in `make test`, each feature's other one in `make test-all`, as is most of O3."""
    for number, (name, feature) in enumerate(FEATURES.items()):
        for place, stage in enumerate(feature.stages):
            late = place != number % len(feature.stages) or (name.startswith(O3) and name not in EARLY)
            yield pytest.param(name, stage, id=f"{name}-{stage}", marks=[pytest.mark.slow] if late else [])


@pytest.mark.parametrize(("name", "stage"), [*cases()])
def test_works(ranks: RankPools, name: str, stage: int) -> None:
    if Version(version("deepspeed")) < Version(FEATURES[name].since):
        pytest.skip(f"stock DeepSpeed cannot do it on a CPU before {FEATURES[name].since}")
    ours, stock = (ranks.run(FEATURES[name].ranks, train, name, stage, fp8)[0] for fp8 in (True, False))
    last = [statistics.fmean(run["losses"][-10:]) for run in (ours, stock)]
    assert abs(last[0] - last[1]) < 0.01, f"last 10 losses: {last[0]:.4f} and {last[1]:.4f}"
    assert last[0] < ours["losses"][0] - 0.3, "it does not learn"
    for step, (norm, expected) in enumerate(zip(ours["norms"][:10], stock["norms"][:10], strict=True)):
        assert abs(norm / expected - 1) < 0.02, f"step {step}: norm {norm:.4f} and {expected:.4f}"
    assert ours["rates"] == stock["rates"]


def test_a_torch_scheduler_in_ds_config_sets_the_rate(ranks: RankPools) -> None:
    rates = ranks.run(2, train, "a torch scheduler in ds_config", 2, True)[0]["rates"]
    assert rates == [1e-3] * 9 + [5e-4] * 10 + [2.5e-4] * 10 + [1.25e-4]


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        rest.check({"zero_optimization": {"stage": 2}, **given})


def refuse_by_model(name: str) -> str:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import PipelineModule
    from deepspeed.utils import groups

    config, options = ds_config({}), {}
    if name == "a PipelineModule":
        layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
        model = PipelineModule(layers=layers, num_stages=1, loss_fn=nn.MSELoss())
    elif name == "a model with MoE layers":
        model = nn.Sequential(MoE(4, nn.Linear(4, 4), num_experts=2))
    elif name == "sparse embeddings":
        model = nn.Sequential(nn.Embedding(4, 4, sparse=True))
    else:
        model = nn.Linear(4, 4)
    if name == "O3 and no matrix that can be FP8":
        config["fp8"]["opt_level"] = "O3"
    if name == "an mpu with pipeline stages":
        options = {"mpu": Mpu()}
    if name == "sequence_parallel_size without DeepSpeed's mpu":
        config["sequence_parallel_size"] = 2
    if name == "grad_accum_dtype other than ours":
        config["data_types"] = {"grad_accum_dtype": "fp16"}
    try:
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, **options)
    except ValueError as error:
        return str(error)
    finally:
        groups.mpu = None  # DeepSpeed keeps what the model or the caller gave
    return "nothing was refused"


class Mpu:
    """Model parallelism of one rank, of two in a pipeline."""

    def get_pipe_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_group(self) -> Any:
        return torch.distributed.group.WORLD

    def get_model_parallel_group(self) -> Any:
        return torch.distributed.new_group([dist.get_rank()])

    get_tensor_model_parallel_group = get_model_parallel_group


@pytest.mark.parametrize("name", REFUSED_BY_MODEL)
def test_is_refused_by_model(ranks: RankPools, name: str) -> None:
    message = ranks.run(1, refuse_by_model, name)[0]
    assert REFUSED_BY_MODEL[name] in message


def test_the_page_is_what_the_tests_say() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    assert page == markdown(), "run `make support`"


def test_the_page_names_tests_that_exist() -> None:
    for test in (PROVED_ELSEWHERE | PROVED_UNDER_3).values():
        name, function = test.split("::")
        assert f"def {function}(" in (ROOT / "tests" / name).read_text(), test
