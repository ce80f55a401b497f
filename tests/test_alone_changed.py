"""FP8AdamW without DeepSpeed, when weights, gradients or states change between steps.

A step is refused by a ValueError that names the parameter, or has the right numbers; never does a kernel
reach memory that is not the parameter's. A refused step changes nothing, whichever parameter is at fault.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_fp8 import FP8AdamW

SHAPE = (40, 10)
LEVELS = ({}, {"opt_level": "O1"}, {"opt_level": "O2+"})


def optimizer_of_three(fp8: dict[str, Any] | None = None, steps: int = 2) -> tuple[FP8AdamW, nn.Parameter]:
    """Two groups of named parameters; the last, which the tests change, comes after two that are in order."""
    torch.manual_seed(0)
    level = fp8 or {}
    dtype = torch.bfloat16 if level.get("opt_level") == "O2+" else torch.float32
    parameters = [nn.Parameter(torch.randn(SHAPE, dtype=dtype)) for _ in range(3)]
    optimizer = FP8AdamW([("first", parameters[0]), ("second", parameters[1])], lr=1e-2, fp8=fp8)
    optimizer.add_param_group({"params": [("last", parameters[2])], "lr": 1e-3})
    for _ in range(steps):
        give_gradients(optimizer)
        optimizer.step()
    give_gradients(optimizer)
    return optimizer, parameters[2]


def give_gradients(optimizer: FP8AdamW) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)


def everything(optimizer: FP8AdamW) -> list[Any]:
    """Bytes of weights and states that are there, and counters."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    held = [optimizer.state.get(each, {}) for each in parameters]
    numbers = [{key: value for key, value in each.items() if not isinstance(value, Tensor)} for each in held]
    tensors = [value for each in held for value in each.values() if isinstance(value, Tensor)]
    there = [each for each in (*parameters[:2], *tensors) if not each.is_meta]
    there = [each for each in there if each.untyped_storage().nbytes() > 8]
    return [numbers, [bytes(each.detach().contiguous().view(torch.uint8).numpy()) for each in there]]


def shrink(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(8)


def change_state(key: str, change: Callable[[Any], Any]) -> Callable[[FP8AdamW, nn.Parameter], None]:
    def apply(optimizer: FP8AdamW, parameter: nn.Parameter) -> None:
        state = optimizer.state[parameter]
        state[key] = change(state[key])

    return apply


def swap_weight(change: Callable[[Tensor], Tensor]) -> Callable[[FP8AdamW, nn.Parameter], None]:
    """The same parameter becomes one of another kind, as `module.to` and `fully_shard` may make it."""

    def apply(_: FP8AdamW, parameter: nn.Parameter) -> None:
        other = nn.Parameter(change(parameter.data))
        other.grad, parameter.grad = change(torch.ones(SHAPE, dtype=other.dtype)), None
        torch.utils.swap_tensors(parameter, other)

    return apply


def set_weight(change: Callable[[Tensor], Tensor]) -> Callable[[FP8AdamW, nn.Parameter], None]:
    """The gradient follows, as it does in a loop that begins with zero_grad."""

    def apply(_: FP8AdamW, parameter: nn.Parameter) -> None:
        parameter.grad = None
        parameter.data = change(parameter.data)
        parameter.grad = torch.ones_like(parameter)

    return apply


def set_gradient(change: Callable[[Tensor], Tensor]) -> Callable[[FP8AdamW, nn.Parameter], None]:
    def apply(_: FP8AdamW, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        parameter.grad.data = change(parameter.grad.data)

    return apply


class Wrapped(Tensor):
    """A tensor whose values lie elsewhere, as those of a DTensor do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, arguments: tuple[Any, ...], __: Any = None) -> Any:
        assert function is torch.ops.aten.detach.default, "nobody computes with it"
        return cls(arguments[0])


def wrap_gradient(_: FP8AdamW, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad = Wrapped(parameter.grad)


WEIGHTS = {
    "grows": (set_weight(lambda w: torch.cat([w, w[:7]])), r"shape \[47, 10\], allowed: .*shape \[40, 10\]"),
    "grows much": (set_weight(lambda w: w.repeat(500, 1)), r"shape \[20000, 10\]"),
    "shrinks": (set_weight(lambda w: w[:5].clone()), r"shape \[5, 10\]"),
    "is transposed": (set_weight(lambda w: w.t().clone()), r"shape \[10, 40\]"),
    "is flattened": (set_weight(torch.flatten), r"shape \[400\]"),
    "is empty": (set_weight(lambda w: w[:0]), r"shape \[0, 10\]"),
    "is float64": (set_weight(lambda w: w.double()), r"parameter of torch\.float64"),
    "is float16": (set_weight(lambda w: w.half()), r"parameter of torch\.float16"),
    "is complex": (set_weight(lambda w: torch.complex(w.float(), w.float())), r"torch\.complex64"),
    "is on meta": (swap_weight(lambda w: w.to("meta")), "device meta"),
    "is wrapped": (swap_weight(Wrapped), "a Wrapped"),
    "is expanded": (set_weight(lambda w: w[:1].clone().expand(SHAPE)), "elements share memory"),
    "has no memory": (lambda _, p: shrink(p.data), r"a view of \d+ bytes into a storage of 8"),
}  # fmt: skip
GRADIENTS = {
    "is longer": (set_gradient(lambda g: g.repeat(2, 1)), r"gradient of shape \[80, 10\]"),
    "is shorter": (set_gradient(lambda g: g[:3]), r"gradient of shape \[3, 10\]"),
    "has other dimensions": (set_gradient(lambda g: g.view(10, 40)), r"gradient of shape \[10, 40\]"),
    "is float64": (set_gradient(lambda g: g.double()), r"gradient of torch\.float64"),
    "is of integers": (set_gradient(lambda g: g.int()), r"gradient of torch\.int32"),
    "is sparse": (lambda _, p: setattr(p, "grad", p.grad.to_sparse()), "a sparse tensor as its gradient"),
    "is wrapped": (wrap_gradient, "a Wrapped as its gradient"),
    "has no memory": (lambda _, p: shrink(p.grad), r"into a storage of 8 as its gradient"),
}  # fmt: skip
STATES = {
    "is short": (change_state("master", lambda s: s[:-1]), r"as master, expected"),
    "is cast": (change_state("exp_avg_sq", lambda s: s.float()), r"of torch\.float32 .*as exp_avg_sq"),
    "has gaps": (change_state("exp_avg", lambda s: s.repeat(2)[::2]), r"in steps of \(2,\)"),
    "is on meta": (change_state("exp_avg", lambda s: s.to("meta")), "device meta"),
    "begins at byte 1": (change_state("master", lambda s: s.repeat(2)[1 : len(s) + 1]), "from 1 on"),
    "is a number": (change_state("exp_avg", lambda s: 0), "a int as exp_avg"),
    "counts no steps": (change_state("step", lambda s: -1), "step -1"),
    "lacks a key": (lambda o, p: o.state[p].pop("exp_avg"), "states"),
    "has no memory": (lambda o, p: shrink(o.state[p]["master"]), "into a storage of 8"),
}  # fmt: skip
CHANGES = {
    f"{what} {name}": case
    for what, cases in (("weight", WEIGHTS), ("gradient", GRADIENTS), ("state", STATES))
    for name, case in cases.items()
}


@pytest.mark.parametrize("fp8", LEVELS, ids=["O2", "O1", "O2+"])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_changed_after_steps_is_refused_by_name_and_nothing_changes(
    change: Callable[[FP8AdamW, nn.Parameter], Any], message: str, fp8: dict[str, Any]
) -> None:
    optimizer, last = optimizer_of_three(fp8)
    change(optimizer, last)
    before = copy.deepcopy(everything(optimizer))
    with pytest.raises(ValueError, match=rf"parameter 2 \(param group 1, 'last'\): received .*{message}"):
        optimizer.step()
    assert everything(optimizer) == before


@pytest.mark.parametrize(
    "change",
    [
        set_weight(lambda w: w.to(torch.bfloat16)),
        lambda _, p: p.data.fill_(torch.nan),
        lambda o, _: o.param_groups[1].update(betas=(0.9, 1.0)),
    ],
)
def test_a_first_step_that_is_refused_makes_no_state(
    change: Callable[[FP8AdamW, nn.Parameter], Any],
) -> None:
    optimizer, last = optimizer_of_three(steps=0)
    change(optimizer, last)
    if last.dtype is torch.bfloat16:  # is right at the first step: a state is made for what is there
        optimizer.step()
        assert all(optimizer.state.values())
        return
    with pytest.raises(ValueError, match="received"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("shape", [(257,), (33, 65), (3, 4, 50)])
@pytest.mark.parametrize("fp8", LEVELS, ids=["O2", "O1", "O2+"])
def test_strides_do_not_count(fp8: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Of weight and gradient: steps, transposed, expanded, offset; beside contiguous copies of them."""
    dtype = torch.bfloat16 if fp8.get("opt_level") == "O2+" else torch.float32
    torch.manual_seed(2)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)
    strided = (wide[..., ::2], wide.movedim(0, -1).clone().movedim(-1, 0)[..., : shape[-1]])
    gradients = (wide[..., 1::2], torch.randn((), dtype=dtype).expand(shape), strided[1] * 2)
    for weight in strided:
        ours, twin = nn.Parameter(torch.empty(0, dtype=dtype)), nn.Parameter(weight.clone().contiguous())
        ours.data = weight
        twins = FP8AdamW([ours], fp8=fp8), FP8AdamW([twin], fp8=fp8)
        for gradient in gradients:
            ours.grad, twin.grad = gradient, gradient.clone().contiguous()
            for each in twins:
                each.step()
            assert torch.equal(ours, twin)
        assert ours.stride() == weight.stride()


def test_a_gradient_of_another_precision_is_read_as_it_is() -> None:
    weights = [nn.Parameter(torch.ones(300, dtype=torch.bfloat16)) for _ in range(2)]
    fine = torch.linspace(-1, 1, 300).to(torch.float16)
    weights[0].grad, weights[1].grad = torch.zeros(300, dtype=torch.bfloat16), None
    weights[0].grad.data = fine
    optimizer = FP8AdamW([weights[0]])
    optimizer.step()
    weights[1].grad = torch.zeros(300, dtype=torch.bfloat16)
    weights[1].grad.data = fine.float()
    FP8AdamW([weights[1]]).step()
    assert torch.equal(*weights)


def test_autograd_sees_that_a_step_has_written() -> None:
    """A backward through a weight that was stepped meanwhile is an error, as with torch's."""
    weight = nn.Parameter(torch.randn(128, 2))
    inputs = torch.randn(4, 128, requires_grad=True)
    loss = (inputs @ weight).square().sum()
    weight.grad = torch.ones_like(weight)
    FP8AdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TestGroups:
    def test_a_wrapped_parameter_is_refused_when_it_is_given(self) -> None:
        """By name, and the group is not there afterwards."""
        optimizer, _ = optimizer_of_three()
        wrapped = nn.Parameter(Wrapped(torch.ones(3)))
        with pytest.raises(ValueError, match=r"parameter 3 \(param group 2, 'sharded'\): received a Wrapped"):
            optimizer.add_param_group({"params": [("sharded", wrapped)]})
        assert len(optimizer.param_groups) == len(optimizer.clamp_squares) == 2
        optimizer.step()

    def test_a_refused_group_is_not_there_afterwards(self) -> None:
        optimizer, _ = optimizer_of_three()
        for bad in ({"lr": -1.0}, {"fp8": {"opt_level": "O1"}}):
            with pytest.raises(ValueError, match=r"optimizer\.params"):
                optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3)))], **bad})
            assert len(optimizer.param_groups) == len(optimizer.clamp_squares) == 2

    def test_a_plain_subclass_of_parameter_is_taken(self) -> None:
        class Marked(nn.Parameter):
            """As bitsandbytes, Megatron and others mark parameters."""

        weight = Marked(torch.ones(200))
        weight.grad = torch.ones(200)
        FP8AdamW([weight]).step()
        assert (weight < 1).all()


LOADS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of another shape, as many elements": (
        lambda s: s["state"][2].update(made_for={"dtype": 0, "dim0": 10, "dim1": 40}),
        r"parameter 2 \(param group 1, 'last'\): received shape \[10, 40\], expected \[40, 10\]",
    ),
    "of nothing": (lambda s: s["state"][2].update(made_for=None), r"received shape None"),
    "short": (lambda s: s["state"][2].update(master=s["state"][2]["master"][:-1]), "as master"),
    "no tensor": (lambda s: s["state"][2].update(master=[1, 2]), "a list as master"),
    "no dict": (lambda s: s["state"].update({2: 7}), "received int, allowed: a dict"),
    "without memory": (lambda s: shrink(s["state"][2]["master"]), "into a storage of 8"),
    "with a group less": (lambda s: s["param_groups"].pop(), r"of \[2\] parameters, expected \[2, 1\]"),
    "with other groups": (lambda s: s["param_groups"].reverse(), r"param groups of \[1, 2\]"),
    "without lr": (lambda s: s["param_groups"][1].pop("lr"), "a param group without lr"),
    "with bad betas": (lambda s: s["param_groups"][1].update(betas=(0.9, 1.5)), "betas: received"),
    "of other formats": (lambda s: s["param_groups"][1]["fp8"].update(master="bf16"), "fp8.master: received"),
    "of torch's AdamW": (
        lambda s: s.update(torch.optim.AdamW([nn.Parameter(torch.ones(3))] * 1).state_dict()),
        r"param groups of \[1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), LOADS.values(), ids=LOADS)
def test_a_state_dict_that_does_not_fit_changes_nothing(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    saved = copy.deepcopy(optimizer_of_three()[0].state_dict())
    optimizer, _ = optimizer_of_three(steps=3)
    change(saved)
    before, groups = (
        copy.deepcopy(everything(optimizer)),
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    assert optimizer.state_dict()["param_groups"] == groups
