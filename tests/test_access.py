"""DeepSpeed's safe_get_full_* and safe_set_full_* on FP8 engines."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import safe_update_full_grad_vectorized
from engines import (
    SMALL,
    assert_same_bits,
    batches,
    build,
    build_gpt,
    ds_config,
    train_losses,
    weight_bits,
    zero3,
)
from grids import some_of
from ranks import RankPools
from torch import Tensor, nn
from train_lm import ByteGPT

STATES = ("exp_avg", "exp_avg_sq")


def compare_with_stock(stage: int, level: str) -> dict[str, float]:
    """Relative difference of each kind of tensor, over all parameters, after three steps."""
    ours, stock = build_gpt(ds_config({"opt_level": level}, stage=stage)), build_gpt(ds_config(stage=stage))
    source, same = batches(ours), batches(stock)
    train_losses(ours, source, 3)
    train_losses(stock, same, 3)
    ours.backward(ours(next(source)))
    stock.backward(stock(next(same)))
    errors, sizes = (dict.fromkeys(("param", "grad", *STATES), 0.0) for _ in range(2))
    for p, q in zip(ours.module.parameters(), stock.module.parameters(), strict=True):
        pairs = {
            "param": (safe_get_full_fp32_param(p), safe_get_full_fp32_param(q)),
            "grad": (safe_get_full_grad(p), safe_get_full_grad(q)),
            **{
                key: (safe_get_full_optimizer_state(p, key), safe_get_full_optimizer_state(q, key))
                for key in STATES
            },
        }
        for key, (mine, theirs) in pairs.items():
            assert mine.shape == p.shape
            assert mine.dtype == torch.float32
            errors[key] += (mine - theirs.float()).square().sum().item()
            sizes[key] += theirs.float().square().sum().item()
    ours.destroy()
    stock.destroy()
    return {key: math.sqrt(error / sizes[key]) for key, error in errors.items()}


@some_of(["stage", "level"], [(1, "O1"), (2, "O2"), (1, "O2+"), (2, "O1"), (1, "O2"), (2, "O2+")], 3)
def test_reading(ranks: RankPools, stage: int, level: str) -> None:
    for errors in ranks.run(2, compare_with_stock, stage, level):
        assert errors["param"] < 0.01
        assert errors["grad"] < 0.06
        assert errors["exp_avg"] < 0.06
        assert errors["exp_avg_sq"] < (0.08 if level == "O2+" else 0.06)


def write_and_read(level: str) -> None:
    engine = build_gpt(ds_config({"opt_level": level}))
    source = batches(engine)
    train_losses(engine, source, 2)
    exact = 1e-6 if level == "O1" else 0.07  # half a code of E4M3 and a little, more than of UE4M4
    generator = torch.Generator().manual_seed(1)
    for name, parameter in engine.module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        safe_set_full_fp32_param(parameter, value)
        read = safe_get_full_fp32_param(parameter)
        assert torch.allclose(read, value, rtol=1e-3, atol=1e-6), name
        assert torch.allclose(parameter.float(), value, rtol=1e-2, atol=1e-6), name
        for key in reversed(STATES):  # exp_avg lies over the root of exp_avg_sq
            wanted = value.abs() if key == "exp_avg_sq" else value
            safe_set_full_optimizer_state(parameter, wanted, key)
            read = safe_get_full_optimizer_state(parameter, key)
            assert ((read - wanted).norm() / wanted.norm()).item() < exact, (name, key)
    before = {name: each.detach().clone() for name, each in engine.module.named_parameters()}
    engine.optimizer.saved.weights_from_masters()
    for name, each in engine.module.named_parameters():
        assert torch.equal(each, before[name]), f"{name} is not what its masters say"
    assert engine.optimizer.optimizer.clamp_squares == [float("inf")]

    engine.backward(engine(next(source)))
    norms = []
    for parameter in engine.module.parameters():
        wanted = torch.randn(parameter.shape, generator=generator)
        safe_set_full_grad(parameter, wanted)
        read = safe_get_full_grad(parameter)
        assert ((read - wanted).norm() / wanted.norm()).item() < 0.07
        norms.append(wanted.norm())
    engine.step()
    assert abs(engine.get_global_grad_norm() / torch.stack(norms).norm().item() - 1) < 0.02
    engine.destroy()


@some_of(["world_size", "level"], [(3, "O1"), (1, "O2"), (3, "O2+"), (1, "O1"), (3, "O2"), (1, "O2+")], 3)
def test_writing(ranks: RankPools, world_size: int, level: str) -> None:
    ranks.run(world_size, write_and_read, level)


def misuse() -> list[str]:
    engine = build_gpt(ds_config({}))
    parameter = next(iter(engine.module.parameters()))
    messages = []
    attempts: list[Any] = [
        lambda: safe_get_full_grad(parameter),
        lambda: safe_set_full_grad(parameter, torch.zeros_like(parameter)),
        lambda: safe_get_full_optimizer_state(parameter, "momentum"),
        lambda: safe_set_full_fp32_param(parameter, torch.zeros(3)),
        lambda: safe_set_full_optimizer_state(parameter, torch.ones_like(parameter).float(), "exp_avg"),
    ]
    for attempt in attempts:
        try:
            attempt()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    for key in ("exp_avg_sq", "exp_avg"):
        safe_set_full_optimizer_state(parameter, torch.ones_like(parameter).float(), key)
    try:
        safe_set_full_optimizer_state(parameter, torch.zeros_like(parameter).float(), "exp_avg_sq")
    except ValueError as error:
        messages.append(str(error))
    for key in ("exp_avg_sq", "exp_avg"):
        read = safe_get_full_optimizer_state(parameter, key)
        assert torch.allclose(read, torch.ones_like(read), rtol=0.01), "what is refused changes nothing"
    engine.destroy()
    assert safe_get_full_fp32_param(parameter) is None
    assert dist.get_world_size() == 2
    return messages


def test_misuse_is_told(ranks: RankPools) -> None:
    told = ranks.run(2, misuse)
    for messages in told:
        assert "between engine.backward() and engine.step()" in messages[0]
        assert "between engine.backward() and engine.step()" in messages[1]
        assert "'momentum', allowed: exp_avg, exp_avg_sq" in messages[2]
        assert "received shape [3], allowed: [256, 32]" in messages[3]
    owners = [each for each in told if each[4]]
    assert owners, "no rank refused moments without a quotient"
    for messages in owners:
        assert "exp_avg: received values that leave exp_avg_sq 0" in messages[4]
        assert "exp_avg_sq: received values that leave exp_avg_sq 0" in messages[5]
        assert "set exp_avg to zeros, then exp_avg_sq, then exp_avg" in messages[5]


# ZeRO 3


class Access(NamedTuple):
    """What reads and sets one kind of tensor, whole and of this rank."""

    get: Callable[..., Any]
    set: Callable[..., Any]
    get_local: Callable[..., Any]
    set_local: Callable[..., Any]
    rest: tuple[str, ...] = ()

    def read(self, parameter: nn.Parameter, *, local: bool = False) -> Any:
        return (self.get_local if local else self.get)(parameter, *self.rest)

    def write(self, parameter: nn.Parameter, value: Tensor, *, local: bool = False) -> None:
        (self.set_local if local else self.set)(parameter, value, *self.rest)


def of_state(key: str) -> Access:
    local = (safe_get_local_optimizer_state, safe_set_local_optimizer_state)
    return Access(safe_get_full_optimizer_state, safe_set_full_optimizer_state, *local, (key,))


ALL = {
    "param": Access(
        safe_get_full_fp32_param,
        safe_set_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_local_fp32_param,
    ),
    "grad": Access(safe_get_full_grad, safe_set_full_grad, safe_get_local_grad, safe_set_local_grad),
    **{key: of_state(key) for key in STATES},
}


def slice_of(whole: Tensor, parameter: Any, beyond: float) -> Tensor:
    """This rank's part of a whole tensor, and what it has beyond its end."""
    held = parameter.ds_tensor.numel()
    padded = torch.full((held * dist.get_world_size(),), beyond)
    padded[: whole.numel()] = whole.reshape(-1)
    return padded.view(-1, held)[dist.get_rank()]


def frozen_norm() -> nn.Module:
    model = ByteGPT(SMALL)
    model.blocks[0].norm1.requires_grad_(False)
    return model


def access(stage: int, level: str, persistence: int, local: bool) -> dict[str, Any]:
    """Read all, halve and set all, step: all that was read, losses and weights."""
    zero = zero3(persistence=persistence, reuse=0) if stage == 3 else {}
    torch.manual_seed(0)
    engine = build(ds_config({"opt_level": level}, stage=stage, zero=zero, bucket=5000), frozen_norm())
    source = batches(engine)
    train_losses(engine, source, 2)
    engine.backward(engine(next(source)))
    found: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        for kind, way in ALL.items():
            value = way.read(parameter)
            if not parameter.requires_grad:
                assert value is None
                continue
            found[f"{name}/{kind}"] = value
            if stage == 3:
                assert torch.equal(way.read(parameter, local=True), slice_of(value, parameter, 0.0))
            way.write(parameter, slice_of(value / 2, parameter, 7.0) if local else value / 2, local=local)
    if stage == 3 and not local:
        assert_whole_weights_follow(engine)
    safe_update_full_grad_vectorized(list(engine.module.parameters()), lambda gradient, _: gradient * 3)
    engine.step()
    found["losses"] = torch.tensor(train_losses(engine, source, 2))
    found |= weight_bits(engine)
    engine.destroy()
    return found


def assert_whole_weights_follow(engine: Any) -> None:
    """What stays whole is what its slices give, which is what masters say."""
    persistent = [each for each in engine.module.parameters() if each.ds_persist]
    before = [each.detach().clone() for each in persistent]
    assert [each.shape for each in before] == [each.ds_shape for each in persistent]
    engine.optimizer.saved.weights_from_masters()
    with engine.optimizer.fetching.released():
        pass
    for each, was in zip(persistent, before, strict=True):
        assert torch.equal(each.detach(), was)


@some_of(
    ["level", "persistence", "local"],
    [
        ("O2", 100, False),
        ("O2+", 100, True),
        ("O1", 10**6, True),
        ("O2+", 10**6, False),
        ("O2", 0, True),
        ("O1", 100, False),
    ],
    2,
)
def test_zero_3_is_accessed_as_zero_2(ranks: RankPools, level: str, persistence: int, local: bool) -> None:
    found = ranks.run(2, access, 3, level, persistence, local, seconds=60)
    expected = ranks.run(2, access, 2, level, persistence, False, seconds=60)
    for three, two in zip(found, expected, strict=True):
        assert_same_bits(three, two)
