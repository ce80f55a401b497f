"""Offload as users turn it on: keys, optimizers, Hugging Face, bytes, and the memory of the machine."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from engines import assert_same_bits, build, refusal, weight_bits
from grids import grid
from hf_runs import FP8
from hf_runs import ds_config as hf_config
from hf_runs import train as hf_train
from ranks import RankPools
from test_offload import LEVELS, Model, config_of, logged, make, small_chunks, train

import ds_fp8
from ds_fp8.cli import main
from ds_fp8.config import ds_config, offload
from ds_fp8.config.rules import Rules
from ds_fp8.estimate import memory
from ds_fp8.estimate.methods import levels
from ds_fp8.estimate.runs import Run, model_of_module
from ds_fp8.zero_fp8.recipe import Offload
from ds_fp8.zero_fp8.states import arena, host_memory

SECONDS = 120.0
CPU_ADAM = "deepspeed.ops.adam.cpu_adam.CPUAdamBuilder"

# Keys

CPU = {"device": "cpu"}
REFUSED = [  # the section, fp8's own, path and value, what is allowed
    ({"device": "nvme", "nvme_path": "/x"}, {}, 'offload_optimizer.device: received "nvme"', '"cpu", "none"'),
    ({"device": "disk"}, {}, 'offload_optimizer.device: received "disk"', '"cpu", "none"'),
    ({**CPU, "ratio": 0.5}, {}, "offload_optimizer.ratio: received 0.5", "fp8.offload.ratio"),
    ({**CPU, "super_offload": True}, {}, "offload_optimizer.super_offload: received true", "false"),
    ({**CPU, "pin": True}, {}, "offload_optimizer.pin: received true", "the key left out"),
    (5, {}, "zero_optimization.offload_optimizer: received 5", "an object"),
    (CPU, {"scaling": "tensor"}, 'fp8.scaling: received "tensor"', '"block"'),
    (
        CPU,
        {"offload": {"executor": "gpu"}},
        'fp8.offload.executor: received "gpu"',
        '"auto", "stream", "host"',
    ),
    (CPU, {"offload": {"ratio": 0}}, "fp8.offload.ratio: received 0", "more than 0"),
    (CPU, {"offload": {"threads": 0}}, "fp8.offload.threads: received 0", "1 or more"),
    (CPU, {"offload": {"executor": "stream", "threads": 3}}, "fp8.offload.threads: received 3", "left out"),
    (CPU, {"offload": {"executor": "host", "ratio": 0.5}}, "fp8.offload.ratio: received 0.5", "1.0 with"),
    (None, {"offload": {"ratio": 0.5}}, "fp8.offload.ratio: received 0.5", '{"device": "cpu"} beside it'),
    ({"device": "none"}, {"offload": {"executor": "stream"}}, 'executor: received "stream"', "left out"),
]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("section", "fp8", "received", "allowed"), REFUSED)
def test_refused(section: Any, fp8: dict[str, Any], received: str, allowed: str, stage: int) -> None:
    config = {
        "zero_optimization": {"stage": stage, "offload_optimizer": section},
        "fp8": {"enabled": True, **fp8},
    }
    said = refusal(lambda: ds_config.check(config))
    assert received in said
    assert allowed in said.split("allowed:")[1]


@pytest.mark.parametrize(
    "zero",
    [
        {"offload_optimizer": CPU},
        {"offload_optimizer": {**CPU, "pin_memory": False, "nvme_path": None, "ratio": 1.0}},
        {"offload_optimizer": {"device": "none", "nvme_path": "/x", "buffer_count": 5}},
        {"cpu_offload": True},
        {"cpu_offload": False, "offload_optimizer": None},
    ],
)
def test_accepted_without_a_word(zero: dict[str, Any]) -> None:
    config = {"zero_optimization": {"stage": 2, **zero}, "fp8": {"enabled": True, "offload": {}}}
    assert ds_config.check(config) == []


def test_keys_without_effect_are_named() -> None:
    section = {**CPU, "buffer_count": 4, "pipeline_read": True, "fast_init": False, "nvme_path": "/x"}
    zero = {"stage": 2, "offload_optimizer": section, "cpu_offload_use_pin_memory": True}
    idle = ds_config.check({"zero_optimization": zero, "aio": {"block_size": 1}, "fp8": {"enabled": True}})
    assert [each.removeprefix("zero_optimization.") for each in idle] == [
        "aio (states are not written to files)",
        "cpu_offload_use_pin_memory (is offload_optimizer.pin_memory in DeepSpeed)",
        "offload_optimizer.buffer_count (three chunks of states are on the device at a time)",
        "offload_optimizer.pipeline_read (states always travel while others are swept)",
        "offload_optimizer.nvme_path (states are not written to files)",
    ]


def test_an_optimizer_alone_has_no_host_memory() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    said = refusal(lambda: ds_fp8.FP8AdamW([weight], fp8={"offload": {"executor": "host"}}))
    assert 'fp8.offload.executor: received "host", allowed: the key left out' in said


def test_every_field_of_deepspeeds_section_is_classed() -> None:
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    table: Rules = offload.OFFLOAD
    assert set(DeepSpeedZeroOffloadOptimizerConfig.model_fields) == set(table)


# Bytes


def count_bytes(level: str, micro_steps: int, offload: dict[str, Any]) -> dict[str, Any]:
    engine = make(config_of(level, 2, micro_steps, offload))
    train(engine, "clip", range(2))
    parts, recipe, rank = engine.optimizer.parts, engine.optimizer.recipe, torch.distributed.get_rank()
    with small_chunks():
        settings, several = Offload(**offload), micro_steps > 1
        expected = memory.offloaded_bytes(recipe, settings, 2, parts.buckets, rank, several=several)
    states = sum(each.host_nbytes for each in parts.shards)
    found = {"about": ds_fp8.describe(engine), "expected": expected, "host": states}
    found["resident"] = sum(each.nbytes for each in parts.shards) - states
    found["gradients"] = parts.host_nbytes - states
    arenas = [parts.residence.away.arena, parts.residence.away.landing]
    found["unused"] = [each.nbytes - each.used for each in arenas if each]
    engine.destroy()
    return found


@grid(level=LEVELS, micro_steps=[1, 2], offload=[{}, {"ratio": 0.3}, {"executor": "host"}])
def test_bytes_are_those_of_the_estimate(
    ranks: RankPools, level: str, micro_steps: int, offload: dict[str, Any]
) -> None:
    """Host memory, buffers on the device, and what stays there."""
    for found in ranks.run(2, count_bytes, level, micro_steps, offload, seconds=SECONDS):
        about, expected = found["about"], found["expected"]
        assert about["host_bytes"] == expected.host
        assert found["host"] <= expected.host < found["host"] + 64 * 6 * 9
        assert about["landing_bytes"] == expected.landing
        assert set(found["unused"]) == {0}
        assert about["ring_bytes"] == expected.buffers
        assert found["resident"] == expected.resident
        assert (expected.resident > 0) is ("ratio" in offload)
        assert (found["gradients"] > 0) is (expected.landing > 0) is not expected.gradient_on_device
        assert about["pinned_bytes"] == 0  # no GPU reads it


def test_the_estimate_of_a_large_model() -> None:
    """5.02 bytes of host memory per parameter at O2, 4.02 at O2+, and next to nothing on the GPU.

    If the host sweeps 1.01 more, or 4 if micro-steps add up, besides buffers.
    """
    with torch.device("meta"):
        model = model_of_module(torch.nn.Linear(40_000, 25_000, bias=False))
    for level, rate in (("O1", 12), ("O2", 5 + 3 / 128), ("O2+", 4 + 2 / 128)):
        plain, away = (levels(each)[level].held(model, Run()) for each in (None, Offload()))
        assert plain.states == round(rate * 1e9)
        assert 0 <= away.host - plain.states < 6 * 64  # tensors begin at multiples of 64 bytes
        assert away.states == 0
        ring = away.buffers - plain.buffers
        assert ring == round(3 * rate * 2**23)
        assert away.total == plain.total - plain.states + ring  # and no host memory
        for micro_steps, landed, added in ((1, 1 + 1 / 128, 0.0), (2, 4.0, 1 + 1 / 128)):
            run = Run(micro_steps=micro_steps)
            plain, away = (levels(each)[level].held(model, run) for each in (None, Offload("host")))
            assert away.gradients == away.states == 0
            staged = 3 * 2 * 2**23
            assert abs(away.host - (rate + landed + 2 * added) * 1e9 - staged) < 1000
            assert abs(away.buffers - plain.buffers - 2 * landed * 1e9) < 1000


# Optimizers


def build_with(client: str | None, extra: dict[str, Any]) -> dict[str, Any]:
    """An engine of ours, with an optimizer of the client's or of the config."""
    config = config_of("O2", 2, 1, {}) | extra
    torch.manual_seed(0)
    model, optimizer = Model("clip"), None
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if client is not None:
        del config["optimizer"]
    with patch(CPU_ADAM, MagicMock()) as builder, logged() as log, small_chunks():
        if client == "AdamW":
            optimizer = torch.optim.AdamW(model.parameters(), **options)
        if client == "DeepSpeedCPUAdam":
            optimizer = DeepSpeedCPUAdam(model.parameters(), **options)
        engine = build(config, model, **({"optimizer": optimizer} if optimizer else {}))
    found = {
        "seen": train(engine, "clip", range(2)),
        "weights": weight_bits(engine),
        "builds": builder.call_count,
        "log": log,
    }
    engine.destroy()
    return found


def test_an_optimizer_of_the_client_is_replaced(ranks: RankPools) -> None:
    """DeepSpeed would refuse AdamW here, unless zero_force_ds_cpu_optimizer is false."""
    ours, adamw, forced, cpu_adam = (
        ranks.run(1, build_with, client, extra, seconds=SECONDS)[0]
        for client, extra in (
            (None, {}),
            ("AdamW", {}),
            ("AdamW", {"zero_force_ds_cpu_optimizer": True}),
            ("DeepSpeedCPUAdam", {}),
        )
    )
    for each in (adamw, forced, cpu_adam):
        assert each["seen"] == ours["seen"]
        assert_same_bits(each["weights"], ours["weights"])
    assert [each["builds"] for each in (ours, adamw, forced, cpu_adam)] == [0, 0, 0, 1]
    said = [
        "zero_force_ds_cpu_optimizer" in " ".join(each["log"]) for each in (ours, adamw, forced, cpu_adam)
    ]
    assert said == [False, False, True, True]


def train_with_hugging_face(folder: str, away: bool, optimizer: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 2, **({"offload_optimizer": CPU} if away else {})}
    config = hf_config(FP8, optimizer=optimizer, zero_optimization=zero)
    if not optimizer:
        config["zero_force_ds_cpu_optimizer"] = False
    compiled = patch(f"{CPU_ADAM}.load", side_effect=AssertionError("cpu_adam is compiled"))
    with compiled, logged() as log:
        found = hf_train(folder, config, {"max_steps": 3, "logging_steps": 1})
    assert away is any("offload, kernels" in line for line in log)
    return found


@pytest.mark.parametrize("optimizer", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hugging_face(ranks: RankPools, tmp_path: Path, optimizer: bool) -> None:
    """With an optimizer in the config and without: the same bits, and nothing of DeepSpeed's is compiled."""
    plain, away = (
        ranks.run(1, train_with_hugging_face, str(tmp_path), each, optimizer, seconds=SECONDS)[0]
        for each in (False, True)
    )
    assert away["losses"] == plain["losses"]
    assert_same_bits(away["weights"], plain["weights"])


def banner_of(config: dict[str, Any]) -> str:
    with logged() as log:
        engine = make(config)
    engine.destroy()
    return next(line for line in log if ": ON" in line)


def test_the_banner_says_where_states_are(ranks: RankPools) -> None:
    away, plain = (
        ranks.run(1, banner_of, config_of("O2+", 2, 1, each), seconds=SECONDS)[0] for each in ({}, None)
    )
    assert "bytes per parameter, offload, kernels" in away
    assert "offload" not in plain


# The memory of the machine


class Cuda:
    """What `torch.cuda` does for an arena. codes: what registering answers, call by call."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.registered = list(codes), dict[int, int]()
        self.device = lambda device: SimpleNamespace(__enter__=None)

    def cudart(self) -> "Cuda":
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            self.registered[address] = nbytes
        return code

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.registered[address]


def test_memory_is_registered_in_one_call_and_let_go() -> None:
    """CUDA refuses a copy from or to memory that two calls have registered."""
    cuda = Cuda()
    device = torch.device("cuda", 0)
    large = 1 << 37
    with patch("torch.cuda.cudart", cuda.cudart):
        with patch("torch.cuda.device"), patch.object(arena, "mapped", lambda _: bytearray(1)):
            found = arena.Arena(large, device)
        assert found.pinned
        assert list(cuda.registered.values()) == [large]
        found.close()
        found.close()
        assert not cuda.registered
        with patch("torch.cuda.device"):
            found = arena.Arena(100_000, device)
        assert list(cuda.registered.values()) == [100_000]
        del found  # an engine that was dropped
        assert not cuda.registered


def test_memory_that_cannot_be_pinned_is_said_and_used() -> None:
    cuda = Cuda(2)
    with (
        patch("torch.cuda.cudart", cuda.cudart),
        patch("torch.cuda.device"),
        patch("torch.zeros", side_effect=RuntimeError("the error that CUDA keeps")) as asked,
        logged() as log,
    ):
        found = arena.Arena(200_000, torch.device("cuda", 0))
    assert asked.called
    assert not cuda.registered
    assert not found.pinned
    assert "NOT pinned" in log[0]
    assert "error 2" in log[0]
    assert "3 to 6 times slower" in log[0]
    assert found.tensor((5, 7), torch.bfloat16).sum() == 0


def test_tensors_of_an_arena_are_apart_and_fill_it() -> None:
    shapes = [((3, 32), torch.uint8), ((3,), torch.uint8), ((0, 32), torch.float32), ((5, 32), torch.float16)]
    room = sum(arena.aligned(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in shapes)
    found = arena.Arena(room, None)
    tensors = [found.tensor(*each) for each in shapes]
    for number, each in enumerate(tensors):
        each.fill_(number + 1)
    for number, (each, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert (each.shape, each.dtype) == (shape, dtype)
        assert (each == number + 1).all()
        assert each.data_ptr() % 64 == 0
        assert each.untyped_storage().nbytes() == each.nbytes  # so that a file holds no more than the tensor
    with pytest.raises(ValueError, match="buffer"):
        found.tensor((1,), torch.uint8)


def test_a_forked_process_has_no_copy_of_the_states() -> None:
    """A data loader's worker would copy what it inherits, pinned pages at once."""
    found = arena.Arena(1 << 20, None)
    tensor = found.tensor((1 << 20,), torch.uint8)
    tensor.fill_(7)
    address, maps = tensor.data_ptr(), Path("/proc/self/maps")

    def is_mapped() -> bool:
        ranges = (line.split()[0].split("-") for line in maps.read_text().splitlines())
        return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)

    assert is_mapped()
    child = os.fork()
    if child == 0:
        os._exit(1 if is_mapped() else 0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tensor == 7).all()


GB = 10**9


@pytest.mark.parametrize(
    ("asked", "ranks_here", "limits", "outcome"),
    [
        (10 * GB, 1, [(64 * GB, 60 * GB)], ""),
        (10 * GB, 8, [(64 * GB, 60 * GB)], "refused"),
        (70 * GB, 1, [(64 * GB, 60 * GB)], "refused"),
        (10 * GB, 1, [(64 * GB, 60 * GB), (8 * GB, 7 * GB)], "refused"),
        (10 * GB, 1, [(64 * GB, 60 * GB), (32 * GB, 7 * GB)], "warned"),
        (10 * GB, 1, [], ""),
    ],
)
def test_more_than_the_machine_or_the_container_has(
    asked: int, ranks_here: int, limits: list[tuple[int, int]], outcome: str
) -> None:
    with (
        patch.object(host_memory, "limits", lambda: iter(limits)),
        patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(ranks_here)}),
        logged() as log,
    ):
        if outcome == "refused":
            with pytest.raises(ValueError, match=r"take \d+\.00 GB of host memory per rank, with \d on"):
                host_memory.refuse_too_much(asked)
        else:
            host_memory.refuse_too_much(asked)
    assert bool(log) is (outcome == "warned")


def test_limits_of_a_container(tmp_path: Path) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("8000000000\n")
    used.write_text("3000000000\n")
    with patch.object(host_memory, "GROUPS", ((limit, used),)):
        machine, container = host_memory.limits()
        assert container == (8 * GB, 5 * GB)
        assert 0 < machine[1] <= machine[0]
        limit.write_text("max\n")
        assert len(list(host_memory.limits())) == 1


# The command line


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["estimate", *arguments])
    return capsys.readouterr().out


def test_estimate_has_a_row_for_each_executor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    size = ("--params", "7G", "--gpus", "4")
    told = json.loads(output(capsys, *size, "--offload", "--opt-level", "O2", "--json"))["models"][0]["bytes"]
    rows = {each["method"]: each for each in told}
    assert [name for name in rows if "ds_fp8" in name] == ["ds_fp8 O2, stream", "ds_fp8 O2, host"]
    stream, host = rows["ds_fp8 O2, stream"], rows["ds_fp8 O2, host"]
    plain = json.loads(output(capsys, *size, "--opt-level", "O2", "--json"))["models"][0]["bytes"][-1]
    assert stream["host"] > 0.99 * plain["states"] > 10**9
    assert host["host"] > stream["host"] + 0.99 * plain["gradients"]
    assert (stream["gradients"], host["gradients"]) == (plain["gradients"], 0)
    assert all(each["total"] == sum(each[key] for key in PARTS) for each in (stream, host, plain))
    assert " host " in output(capsys, *size, "--offload")
    assert " host " not in output(capsys, *size)
    config = tmp_path / "ds_config.json"
    for executor, names in (("auto", ["stream", "host"]), ("host", ["host"])):
        fp8 = {"enabled": True, "offload": {"executor": executor}}
        zero = {"stage": 2, "offload_optimizer": CPU}
        config.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero, "fp8": fp8}))
        told = json.loads(output(capsys, *size, "--config", str(config), "--json"))["models"][0]["bytes"]
        assert [each["method"].rpartition(", ")[2] for each in told[2:]] == names


PARTS = ("weights", "states", "gradients", "buffers", "persistent", "fetched")
