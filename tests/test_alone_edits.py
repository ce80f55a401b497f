"""FP8AdamW without DeepSpeed goes on from weights that were edited between steps, as torch.optim.AdamW does.

Blocks without an edit keep the bytes of their masters, so that a resume stays exact.
"""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from test_alone_changed import everything, give_gradients, optimizer_of_three
from torch import Tensor, nn

from ds_fp8 import FP8AdamW
from ds_fp8.zero_fp8.optimizer import standalone

SHAPE = (37, 11)  # 407 elements: three blocks and one that is not full
FORMATS: tuple[dict[str, Any], ...] = ({}, {"opt_level": "O1"}, {"optimizer": {"master_dtype": "bf16"}})
each_format = pytest.mark.parametrize("fp8", FORMATS, ids=["O2", "O1", "bf16"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
Edit = Callable[[nn.Parameter, Tensor], Any]


def run(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        weight.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
        optimizer.step()


def stepped(fp8: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, FP8AdamW]:
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)).to(dtype))
    optimizer = FP8AdamW([weight], fp8=fp8)
    run(weight, optimizer)
    return weight, optimizer


def state_bytes(optimizer: FP8AdamW, weight: Tensor) -> list[bytes]:
    return [bytes(each.numpy()) for each in optimizer.state[weight].values() if isinstance(each, Tensor)]


def load(weight: nn.Parameter, new: Tensor) -> None:
    """As Module.load_state_dict does."""
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": new})


def assign(weight: nn.Parameter, new: Tensor) -> None:
    weight.data = new.clone()


def assign_twice(weight: nn.Parameter, new: Tensor) -> None:
    """The allocator gives the first memory out again, and no write is counted."""
    address, spare = weight.data_ptr(), []
    weight.data = new.clone()
    while weight.data_ptr() != address and len(spare) < 1000:
        spare.append(weight.data)
        weight.data = new.clone()


def transpose(weight: nn.Parameter, new: Tensor) -> None:
    """Of the same memory: neither address nor count change."""
    weight.data = weight.data.view(-1).as_strided(SHAPE, (1, SHAPE[0]))


EDITS: dict[str, Edit] = {
    "load_state_dict": load,
    "copy_": lambda weight, new: weight.copy_(new),
    "clamp_": lambda weight, _: weight.clamp_(-0.01, 0.01),
    "mask": lambda weight, _: weight.mul_(torch.arange(SHAPE[1]) % 2),
    "zero_": lambda weight, _: weight.zero_(),
    "vector": lambda weight, new: nn.utils.vector_to_parameters(new.view(-1), [weight]),
    "data": assign,
    "data at the old address": assign_twice,
    "data of other strides": transpose,
    "swap_tensors": lambda weight, new: torch.utils.swap_tensors(weight, nn.Parameter(new.clone())),
    "through a view": lambda weight, new: weight.detach().view(-1)[-2:].copy_(new.view(-1)[-2:]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_format
def test_a_step_goes_on_from_edited_weights(fp8: dict[str, Any], dtype: torch.dtype, edit: Edit) -> None:
    weight, optimizer = stepped(fp8, dtype)
    weight.grad = None
    with torch.no_grad():
        edit(weight, (torch.randn(SHAPE) * 3).to(dtype))
    edited = weight.detach().float().clone()
    run(weight, optimizer, 1)
    lost = 2.0**-6 if fp8 or dtype is torch.bfloat16 else 2.0**-9  # rounded twice, to 8 or 11 bits
    if fp8.get("opt_level") == "O1" and dtype is torch.float32:
        lost = 0
    small = edited.abs().max() * 2.0**-18  # beside the largest of a block
    assert ((weight - edited).abs() <= 3e-3 + small + lost * edited.abs()).all()
    assert not torch.equal(weight.float(), edited)


@each_dtype
@each_format
def test_only_edited_blocks_are_rounded_anew(fp8: dict[str, Any], dtype: torch.dtype) -> None:
    """Of a block with an edit the other masters keep their values, too."""
    weight, optimizer = stepped(fp8, dtype)
    weight.grad = None
    states = optimizer._standalone
    before = states.entries.master_of(optimizer.state[weight]).codes.clone()
    scales = copy.deepcopy(optimizer.state[weight].get("master_scales"))
    with torch.no_grad():
        weight.view(-1)[130] = 0.5
        weight.view(-1)[400] = -0.0
    states.follow(optimizer.state[weight], weight)
    master = states.entries.master_of(optimizer.state[weight])
    after = master.codes
    changed = (before.view(torch.uint8) != after.view(torch.uint8)).view(-1, before.itemsize).any(1).nonzero()
    assert changed.view(-1).tolist() == [130, 400]
    if scales is not None:
        assert torch.equal(scales, optimizer.state[weight]["master_scales"])
    assert after.view(-1)[400].signbit()
    if "master_scales" not in optimizer.state[weight]:
        assert after.view(-1)[130] == 0.5


@each_dtype
@each_format
def test_weights_that_say_nothing_new_leave_every_byte(fp8: dict[str, Any], dtype: torch.dtype) -> None:
    """A checkpoint's weights, copied in, or moved to other memory; also in a copy that remembers nothing."""
    weight, optimizer = stepped(fp8, dtype)
    before = state_bytes(optimizer, weight)
    for edit in (load, assign):
        edit(weight, weight.detach().clone())
        optimizer._standalone.follow(optimizer.state[weight], weight)
        assert state_bytes(optimizer, weight) == before
    other_weight, other = copy.deepcopy((weight, optimizer))
    other._standalone.follow(other.state[other_weight], other_weight)
    assert state_bytes(other, other_weight) == before


def test_nothing_is_compared_unless_an_edit_is_possible() -> None:
    """Not for parameters that are views of one vector, either, which count writes together."""
    flat = torch.randn(600)
    weights = [nn.Parameter(flat[:300]), nn.Parameter(flat[300:])]
    optimizer = FP8AdamW(weights)
    with mock.patch.object(standalone, "follow", wraps=standalone.follow) as compared:
        for _ in range(3):
            give_gradients(optimizer)
            optimizer.step()
        assert not compared.called
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert compared.call_count == 2
        optimizer.step()
        assert compared.call_count == 2


def test_a_split_master_has_its_weight_for_upper_half() -> None:
    weight, optimizer = stepped({"opt_level": "O2+"}, torch.bfloat16)
    with torch.no_grad():
        weight.fill_(0.5)
    run(weight, optimizer, 1)
    assert ((weight - 0.5).abs() < 5e-3).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_edit_to_inf_or_nan_under_scales_is_refused(value: float) -> None:
    optimizer, last = optimizer_of_three()
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].mul_(2)
        last[-1, -1] = value
    before = copy.deepcopy(everything(optimizer))
    with pytest.raises(ValueError, match=r"parameter 2 \(param group 1, 'last'\): received .* inf or NaN"):
        optimizer.step()
    assert everything(optimizer) == before


def test_weights_spoiled_by_a_gradient_can_be_mended() -> None:
    """They are no edit, so a copy steps on with NaN as the original does; good weights end that."""
    weight, optimizer = stepped({})
    weight.grad = torch.full(SHAPE, torch.nan)
    optimizer.step()
    weight, optimizer = copy.deepcopy((weight, optimizer))
    run(weight, optimizer, 1)
    assert weight.isnan().all()
    load(weight, torch.ones(SHAPE))
    optimizer._standalone.follow(optimizer.state[weight], weight)
    assert optimizer.state[weight]["master_scales"].ne(255).all()


@pytest.mark.parametrize("second_begins_at", [0, 5])
@pytest.mark.parametrize("stepped_before", [True, False])
def test_parameters_that_share_memory_are_refused(second_begins_at: int, stepped_before: bool) -> None:
    """Both by name, whether the first has a gradient now or has a state that the second would edit."""
    optimizer, last = optimizer_of_three()
    first = optimizer.param_groups[0]["params"][0]
    shared = torch.randn(45, 10)
    first.data, last.data = shared[:40], shared[second_begins_at:][:40]
    if stepped_before:
        first.grad = None
    before = copy.deepcopy(everything(optimizer))
    with pytest.raises(ValueError, match=r"'first'\) and parameter 2 .*'last'\): .* share memory"):
        optimizer.step()
    assert everything(optimizer) == before


def test_columns_of_one_matrix_share_no_memory() -> None:
    wide = torch.randn(20, 6)
    weights = [nn.Parameter(wide[:, :3]), nn.Parameter(wide[:, 3:]), nn.Parameter(torch.empty(0))]
    optimizer = FP8AdamW([*weights, nn.Parameter(torch.empty(0))])
    give_gradients(optimizer)
    optimizer.step()


FLAGS = {
    "maximize": True, "amsgrad": True, "differentiable": True, "lr": -1e-3, "eps": 0.0, "weight_decay": -0.1,
    "betas": (0.9, 1.0),
}  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), FLAGS.items())
def test_a_hyperparameter_changed_later_is_refused_at_the_next_step(flag: str, value: Any) -> None:
    optimizer, _ = optimizer_of_three()
    optimizer.param_groups[1][flag] = value
    before = copy.deepcopy(everything(optimizer))
    with pytest.raises(ValueError, match=rf"optimizer\.params\.{flag}: received"):
        optimizer.step()
    assert everything(optimizer) == before


def test_a_learning_rate_below_0_by_its_rounding_is_taken() -> None:
    optimizer, _ = optimizer_of_three()
    optimizer.param_groups[1]["lr"] = -1e-19
    optimizer.step()
