"""FP8AdamW without DeepSpeed: an optimizer like torch's, with the same kernels and exact resume."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_fp8 import FP8AdamW
from ds_fp8.ops.backend import VARIABLE
from ds_fp8.zero_fp8.optimizer.replacement import replace_optimizer

HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
Optimizer = Callable[..., torch.optim.Optimizer]


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Odd widths: every parameter ends in a block that is not full."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 65), nn.GELU(), nn.Linear(65, 11)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 37, generator=generator)
    return inputs.to(dtype), torch.tanh(inputs[:, :11] * 2 - inputs[:, 11:22]).to(dtype)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype = torch.float32
) -> list[float]:
    losses = []
    for step in steps:
        inputs, targets = batch(step, dtype)
        loss = nn.functional.mse_loss(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(net: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in net.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("level", "bound"), [("O1", 1e-5), ("O2", 0.02)])
def test_it_trains_as_torchs(level: str, bound: float) -> None:
    ours, theirs = model(), model()
    losses = train(ours, FP8AdamW(ours.parameters(), **HYPER, fp8={"opt_level": level}), range(300))
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), **HYPER), range(300))
    assert expected[-1] < 0.2 * expected[0]
    assert sum(losses[-50:]) == pytest.approx(sum(expected[-50:]), rel=bound)


def test_l2_is_torchs_adam() -> None:
    ours, theirs = model(), model()
    optimizer = FP8AdamW(ours.parameters(), **HYPER, adam_w_mode=False, fp8={"opt_level": "O1"})
    losses = train(ours, optimizer, range(50))
    assert losses == pytest.approx(
        train(theirs, torch.optim.Adam(theirs.parameters(), **HYPER), range(50)), rel=1e-4
    )


EVERY_WAY = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.bfloat16, {"opt_level": "O2+"}),
    (torch.bfloat16, {"optimizer": {"master_dtype": "split8", "rounding": "stochastic"}}),
    (torch.float32, {"optimizer": {"rounding": "stochastic", "exp_avg_sq_dtype": "ue4m4"}}),
]
each_way = pytest.mark.parametrize(("dtype", "fp8"), EVERY_WAY)


@each_way
def test_every_backend_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fp8: dict[str, Any]
) -> None:
    found = []
    for backend in ("reference", None, "triton"):
        if backend is None:
            monkeypatch.delenv(VARIABLE)
        else:
            monkeypatch.setenv(VARIABLE, backend)
        net = model(dtype)
        train(net, FP8AdamW(net.parameters(), **HYPER, fp8=fp8), range(3), dtype)
        found.append(weights(net))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def saved_and_read(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


@each_way
def test_resume_is_exact(dtype: torch.dtype, fp8: dict[str, Any]) -> None:
    """torch would cast the states to the parameters' dtype on load."""
    net = model(dtype)
    optimizer = FP8AdamW(net.parameters(), **HYPER, fp8=fp8)
    train(net, optimizer, range(20), dtype)
    kept = saved_and_read(optimizer.state_dict()), copy.deepcopy(net)
    unbroken = train(net, optimizer, range(20, 40), dtype)
    resumed = FP8AdamW(kept[1].parameters(), lr=1.0, fp8=fp8)
    resumed.load_state_dict(kept[0])
    assert train(kept[1], resumed, range(20, 40), dtype) == unbroken
    assert same(weights(kept[1]), weights(net))
    assert resumed.param_groups[0]["lr"] == HYPER["lr"]


def test_a_loaded_state_is_a_copy() -> None:
    net = model()
    optimizer = FP8AdamW(net.parameters(), **HYPER)
    train(net, optimizer, range(2))
    state = optimizer.state_dict()
    before = {key: each.clone() for key, each in state["state"][0].items() if isinstance(each, Tensor)}
    other = model()
    resumed = FP8AdamW(other.parameters())
    resumed.load_state_dict(state)
    train(other, resumed, range(2))
    assert all(torch.equal(before[key], state["state"][0][key]) for key in before)


@pytest.mark.parametrize(
    ("fp8", "bytes_per_parameter"),
    [
        ({}, 5 + 3 / 128),
        ({"opt_level": "O1"}, 12),
        ({"opt_level": "O2+"}, 4 + 2 / 128),
        ({"block_size": 64}, 5 + 3 / 64),
    ],
)
def test_states_take_what_the_design_says(fp8: dict[str, Any], bytes_per_parameter: float) -> None:
    parameter = nn.Parameter(torch.randn(256, 64, dtype=torch.bfloat16))
    optimizer = FP8AdamW([parameter], fp8=fp8)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = sum(each.nbytes for each in optimizer.state[parameter].values() if isinstance(each, Tensor))
    assert held == bytes_per_parameter * parameter.numel()


def test_shapes_that_fit_no_block() -> None:
    """A scalar, an empty parameter, one that is not contiguous, a gradient that is not."""
    torch.manual_seed(1)
    parameters = [
        nn.Parameter(torch.tensor(0.5)),
        nn.Parameter(torch.empty(0, 7)),
        nn.Parameter(torch.randn(20, 30).t()),
        nn.Parameter(torch.randn(30, 20)),
    ]
    twins = [nn.Parameter(each.detach().clone()) for each in parameters]
    gradients = [torch.randn(each.shape) * 0.1 for each in parameters]
    gradients[3] = torch.randn(20, 30).t()
    for group, kind in ((parameters, FP8AdamW), (twins, torch.optim.AdamW)):
        extra = {"fp8": {"opt_level": "O1"}} if kind is FP8AdamW else {}
        optimizer = kind(group, **HYPER, **extra)
        for _ in range(5):
            for parameter, gradient in zip(group, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    for ours, theirs in zip(parameters, twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_parameter_without_gradient_waits() -> None:
    """Its bias correction begins with its own first step."""
    nets = model(), model()
    kinds = (lambda p: FP8AdamW(p, **HYPER, fp8={"opt_level": "O1"}), lambda p: torch.optim.AdamW(p, **HYPER))
    for net, kind in zip(nets, kinds, strict=True):
        optimizer = kind(net.parameters())
        first = next(net.parameters())
        first.requires_grad_(False)
        train(net, optimizer, range(10))
        first.requires_grad_(True)
        train(net, optimizer, range(10, 20))
    for ours, theirs in zip(weights(nets[0]), weights(nets[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_schedulers_closures_and_groups() -> None:
    net = model()
    first, *others = net.parameters()
    optimizer = FP8AdamW([first], **HYPER)
    optimizer.add_param_group({"params": others, "lr": 1e-4})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        inputs, targets = batch(0)
        loss = nn.functional.mse_loss(net(inputs), targets)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [HYPER["lr"] / 2, 5e-5]
    with pytest.raises(ValueError, match=r"optimizer.params.lr: received -1\.0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0})


def test_the_last_parameter_draws_other_random_bits() -> None:
    """Two parameters of equal values and gradients do not round alike."""
    values = torch.randn(4096)
    twins = [nn.Parameter(values.clone()) for _ in range(2)]
    optimizer = FP8AdamW(twins, **HYPER)
    gradient = torch.randn(4096)
    for _ in range(3):
        for each in twins:
            each.grad = gradient
        optimizer.step()
    codes = [optimizer.state[each]["exp_avg_sq"] for each in twins]
    assert not torch.equal(codes[0], codes[1])


STEPPED = "allowed: one without state"


def stepped(**options: Any) -> tuple[nn.Module, FP8AdamW]:
    net = model()
    optimizer = FP8AdamW(net.parameters(), **options)
    train(net, optimizer, range(1))
    return net, optimizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state["param_groups"][0].pop("fp8"),
            r"state_dict fp8\.master: received None, expected 'fp16'",
        ),
        (
            lambda state: state["param_groups"][0]["fp8"].update(block_size=64),
            r"fp8\.block_size: received 64, expected 128",
        ),
        (
            lambda state: state["state"].update({9: state["state"][0]}),
            r"received parameter 9, allowed: 0 to 3",
        ),
        (
            lambda state: state["state"].update({1: state["state"][0]}),
            r"of parameter 1 .*shape \[65, 37\], expected",
        ),
        (lambda state: state["state"][0].pop("exp_avg_scales"), r"of parameter 0 .*received states"),
        (
            lambda state: state["state"][0].update(master=state["state"][0]["master"].to(torch.bfloat16)),
            r"torch\.bfloat16.*expected",
        ),
    ],
)
def test_a_foreign_state_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """By name, and nothing is changed."""
    state = saved_and_read(stepped()[1].state_dict())
    change(state)
    optimizer = stepped(lr=0.5)[1]
    before = saved_and_read(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, each in before["state"][0].items():
        assert torch.equal(each, after["state"][0][key]) if isinstance(each, Tensor) else True


def test_bad_parameters_are_refused() -> None:
    def step(parameter: nn.Parameter, gradient: Tensor, **options: Any) -> None:
        parameter.grad = gradient
        FP8AdamW([parameter], **options).step()

    with pytest.raises(
        ValueError, match=r"parameter of torch\.float64, allowed: torch\.bfloat16, torch\.float32"
    ):
        step(nn.Parameter(torch.zeros(3, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \[3\] with inf or NaN"):
        step(nn.Parameter(torch.tensor([1.0, torch.nan, 2.0])), torch.zeros(3))
    with pytest.raises(ValueError, match=r"parameter of torch\.float32, allowed: torch\.bfloat16$"):
        step(nn.Parameter(torch.zeros(3)), torch.zeros(3), fp8={"opt_level": "O2+"})
    with pytest.raises(ValueError, match=r"sparse tensor as its gradient"):
        step(nn.Parameter(torch.zeros(3)), torch.zeros(3).to_sparse())
    with pytest.raises(ValueError, match=r'fp8\.opt_level: received "O9"'):
        FP8AdamW([nn.Parameter(torch.zeros(3))], fp8={"opt_level": "O9"})


def test_deepspeed_takes_only_a_fresh_one() -> None:
    with pytest.raises(ValueError, match=STEPPED):
        replace_optimizer(stepped()[1])
    with pytest.raises(ValueError, match=r"FP8AdamW\(fp8=\.\.\.\): .*O1.*with DeepSpeed: none"):
        replace_optimizer(FP8AdamW(model().parameters(), fp8={"opt_level": "O1"}))
