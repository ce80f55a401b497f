"""Random training programs, run by an engine and by plain PyTorch beside each other, on a rank.

A program is a list of (operation, number). Both sides do the same; at each optimizer step the engine's
gradients must be PyTorch's, averaged over the ranks, within what BF16 on the wire rounds.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from engines import build, ds_config, zero3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_fp8.zero_fp8.comm.agreement import gather_objects
from ds_fp8.zero_fp8.placement.parameters import shape_of

WIRE = 0.02  # of the gradient's norm
Program = list[tuple[str, int]]


class Net(nn.Module):
    """Two heads over a body, a branch for one rank, and a layer that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(24, 5), nn.Linear(24, 3)])
        self.branch = nn.Linear(24, 5)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor, *, branch: bool = False, recompute: str = "") -> tuple[Tensor, Tensor]:
        x = x + self.frozen(x)
        reentrant = recompute == "reentrant"
        h = checkpoint(self.body, x, use_reentrant=reentrant) if recompute else self.body(x)
        first = self.heads[0](h)
        return first + self.branch(h) if branch else first, self.heads[1](h)


class Side:
    """An engine, or a module trained as PyTorch would."""

    def __init__(self, module: nn.Module, micro_steps: int, engine: Any = None) -> None:
        self.module, self.micro_steps, self.engine = module, micro_steps, engine
        self.forward: Callable[..., tuple[Tensor, Tensor]] = engine or module

    def backward(self, loss: Tensor, **options: Any) -> None:
        if self.engine:
            self.engine.backward(loss, **options)
        else:
            (loss / self.micro_steps).backward(**options)

    def loss_backward(self, loss: Tensor, **options: Any) -> None:
        if self.engine:
            loss.backward(**options)
        else:
            (loss / self.micro_steps).backward(**options)

    def parameter(self, number: int) -> nn.Parameter:
        trained = [each for name, each in self.module.named_parameters() if not name.startswith("frozen")]
        return trained[number % len(trained)]


def data(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
    return torch.randn(4, 6, generator=generator)


def loss_of(outputs: tuple[Tensor, Tensor], which: int = 2) -> Tensor:
    losses = [each.sin().square().mean() for each in outputs]
    return losses[which] if which < 2 else losses[0] + 0.5 * losses[1]


Result = Tensor | None


def plain(side: Side, number: int) -> Result:
    side.backward(loss_of(side.forward(data(number)), number % 3))
    return None


def torch_style(side: Side, number: int) -> Result:
    side.loss_backward(loss_of(side.forward(data(number)), number % 3))
    return None


def with_a_penalty(side: Side, number: int) -> Result:
    """A term of the loss that does not go through the engine's output."""
    loss = loss_of(side.forward(data(number))) + 0.1 * side.module.heads[0].weight.square().sum()
    (side.backward if number % 2 else side.loss_backward)(loss)
    return None


def two_losses(side: Side, number: int) -> Result:
    outputs = side.forward(data(number))
    way = side.backward if number % 2 else side.loss_backward
    way(loss_of(outputs, 0), retain_graph=True)
    way(loss_of(outputs, 1))
    return None


def two_forwards_then_two_backwards(side: Side, number: int) -> Result:
    losses = [loss_of(side.forward(data(number + each))) for each in (0, 1)]
    for loss in losses[:: 1 if number % 2 else -1]:
        (side.backward if number % 3 else side.loss_backward)(loss)
    return None


def several_forwards(side: Side, number: int) -> Result:
    loss = torch.stack([loss_of(side.forward(data(number + each))) for each in range(3)]).mean()
    (side.backward if number % 2 else side.loss_backward)(loss)
    return None


def outputs_backward(side: Side, number: int) -> Result:
    """A backward from an output that is no scalar."""
    output = side.forward(data(number))[1]
    seed = torch.ones_like(output) * 0.1
    side.loss_backward(output, gradient=seed)
    return None


def one_rank_uses_a_branch(side: Side, number: int) -> Result:
    branch = dist.get_rank() == number % 2
    (side.backward if number % 3 else side.loss_backward)(loss_of(side.forward(data(number), branch=branch)))
    return None


def recomputed(side: Side, number: int) -> Result:
    kind = ("reentrant", "not reentrant")[number % 2]
    x = data(number).requires_grad_()
    (side.backward if number % 3 else side.loss_backward)(loss_of(side.forward(x, recompute=kind)))
    return x.grad if not number % 3 and not side.engine else None


def gradient_of_inputs(side: Side, number: int) -> Result:
    """Saliency, on one rank or on both."""
    if number % 3 and dist.get_rank():
        return None
    x = data(number).requires_grad_()
    return torch.autograd.grad(loss_of(side.forward(x)), x)[0]


def gradient_of_weights(side: Side, number: int) -> Result:
    outputs = side.forward(data(number))
    wanted = (outputs[0], side.module.heads[0].weight, side.module.body[0].bias)[number % 3]
    if not wanted.requires_grad:
        return None
    found = torch.autograd.grad(loss_of(outputs), wanted, retain_graph=number % 2 == 0)
    if number % 2 == 0:
        side.backward(loss_of(outputs))
    return found[0]


def gradient_penalty(side: Side, number: int) -> Result:
    x = data(number).requires_grad_()
    outputs = side.forward(x)
    (slope,) = torch.autograd.grad(outputs[0].sum(), x, create_graph=True)
    (side.backward if number % 2 else side.loss_backward)(loss_of(outputs) + slope.square().mean())
    return None


def backward_to_some(side: Side, number: int) -> Result:
    weight = side.module.heads[0].weight
    if weight.requires_grad:
        side.loss_backward(loss_of(side.forward(data(number))), inputs=[weight])
    return None


def no_grad_forward(side: Side, number: int) -> Result:
    with torch.no_grad():
        return side.forward(data(number))[0].clone()


def evaluation(side: Side, number: int) -> Result:
    side.module.eval()
    with torch.no_grad():
        found = side.forward(data(number))[1].clone()
    side.module.train()
    return found


def forward_only(side: Side, number: int) -> Result:
    side.forward(data(number))
    return None


def zero_grad(side: Side, number: int) -> Result:
    if not side.engine:
        side.module.zero_grad()
    elif number % 2:
        side.engine.zero_grad()
    else:
        side.engine.optimizer.zero_grad()
        side.module.zero_grad()
    return None


def rebind(side: Side, number: int) -> Result:
    """Weights replaced by new memory, with the same values."""
    if number % 3 == 0:
        weights = nn.utils.parameters_to_vector(side.module.parameters())
        nn.utils.vector_to_parameters(weights.detach().clone(), side.module.parameters())
    elif number % 3 == 1:
        side.module.double().float()
    else:
        parameter = side.parameter(number)
        parameter.data = parameter.data * 1.1
    return None


def hook(side: Side, number: int) -> Result:
    parameter = side.parameter(number)
    if not parameter.requires_grad:
        return None
    if number % 2:
        parameter.register_hook(lambda gradient: gradient * 0.5)
    else:
        shape = shape_of(parameter)
        mask = (torch.arange(shape.numel()) % 3 > 0).view(shape)

        def prune(each: Tensor) -> None:
            each.grad.mul_(mask)

        parameter.register_post_accumulate_grad_hook(prune)
    return None


def freeze(side: Side, number: int) -> Result:
    parameter = side.parameter(number)
    parameter.requires_grad_(not parameter.requires_grad)
    return None


OPERATIONS = {
    each.__name__: each
    for each in (
        plain,
        torch_style,
        with_a_penalty,
        two_losses,
        two_forwards_then_two_backwards,
        several_forwards,
        outputs_backward,
        one_rank_uses_a_branch,
        recomputed,
        gradient_of_inputs,
        gradient_of_weights,
        gradient_penalty,
        backward_to_some,
        no_grad_forward,
        evaluation,
        forward_only,
        zero_grad,
        rebind,
        hook,
        freeze,
    )
}
NAMES = [*OPERATIONS, "step", "save", "load", "read"]
# Not under ZeRO 3: forwards of one rank, weights used or replaced between forwards.
OF_WHOLE_WEIGHTS = {"one_rank_uses_a_branch", "gradient_of_inputs", "with_a_penalty", "rebind"}
WITH_SLICES = [name for name in NAMES if name not in OF_WHOLE_WEIGHTS]


def run(program: Program, stage: int, micro_steps: int, overlap: bool, folder: str) -> str:
    """What went otherwise than in PyTorch, the same on every rank; "refused: ..." for a named refusal."""
    torch.manual_seed(7)
    fp8 = {"opt_level": "O1", "gradients": {"dtype": "bf16"}}
    config = ds_config(
        fp8, stage=stage, micro_steps=micro_steps, clipping=0.0, bf16=False, bucket=300, weight_decay=0.0
    )
    config["zero_optimization"]["overlap_comm"] = overlap
    if stage == 3:
        config["zero_optimization"].update(zero3(persistence=30, prefetch=500, reuse=0))
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    module = Net()
    reference = Side(copy.deepcopy(module), micro_steps)
    engine = build(config, module)
    ours = Side(engine.module, micro_steps, engine)
    try:
        found = ""
        for place, (name, number) in enumerate(program):
            complaint = _do(name, number, ours, reference, folder)
            complaints = gather_objects(complaint, dist.get_world_group())
            found = next((f"{place} {name}: {each}" for each in complaints if each), "")
            if found:
                break
        return found
    except RuntimeError as error:
        if "step() without a gradient" in str(error):
            return f"refused: {error}"
        raise
    finally:
        engine.destroy()


def _do(name: str, number: int, ours: Side, reference: Side, folder: str) -> str:
    if name == "hook" and reference.parameter(number).grad is not None:
        return ""  # PyTorch's hook would see what earlier backwards have left, ours under ZeRO 2 would not
    if name in OPERATIONS:
        results = [OPERATIONS[name](side, number) for side in (ours, reference)]
        if any(each is None for each in results) or torch.allclose(*results, rtol=1e-4, atol=1e-6):
            return ""
        return f"another result: {results[0].flatten()[:3]} and {results[1].flatten()[:3]}"
    if name == "step":
        return _step(ours, reference)
    if name == "read" and _has_gradient(reference):
        return _compare(ours, reference)
    if name == "save":
        ours.engine.save_checkpoint(folder, tag="kept")
    if name == "load" and Path(folder, "kept").exists():
        ours.engine.load_checkpoint(folder, tag="kept")
        _follow(ours, reference)  # masters decide about weights that were replaced
    return ""


def _has_gradient(reference: Side) -> bool:
    mine = any(each.grad is not None for each in reference.module.parameters())
    return any(gather_objects(mine, dist.get_world_group()))


def _averages(reference: Side) -> dict[str, Tensor]:
    found = {}
    for name, parameter in reference.module.named_parameters():
        mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(mean)
        found[name] = mean / dist.get_world_size()
    return found


def _compare(ours: Side, reference: Side) -> str:
    """Each whole gradient."""
    expected = _averages(reference)
    size = max(float(each.norm()) for each in expected.values())
    for name, parameter in ours.module.named_parameters():
        if not name.startswith("frozen"):
            gradient = _whole_gradient(parameter)
            off = float((gradient - expected[name]).norm())
            if off > WIRE * float(expected[name].norm()) + 1e-4 * size:
                return f"gradient of {name} off by {off}: {gradient.norm()} for {expected[name].norm()}"
    return ""


def _whole_gradient(parameter: Any) -> Tensor:
    """DeepSpeed's safe_get_full_grad prefers a local .grad."""
    sliced = hasattr(parameter, "ds_id")
    access = parameter._z3_optimizer.get_fp32_grad_for_param if sliced else parameter.get_full_hp_grad
    gradient: Tensor = access(parameter) if sliced else access()
    return gradient


def _step(ours: Side, reference: Side) -> str:
    """The norm that the step took, which reading does not change."""
    if not ours.engine.is_gradient_accumulation_boundary():
        ours.engine.step()
        return ""
    if not _has_gradient(reference):
        return ""
    expected = sum(float(each.square().sum()) for each in _averages(reference).values()) ** 0.5
    before = _weights(ours)
    ours.engine.step()
    norm = float(ours.engine.get_global_grad_norm())
    if abs(norm - expected) > WIRE * expected + 1e-7:
        return f"norm {norm} for {expected}"
    if expected > 1e-6 and all(map(torch.equal, before, _weights(ours))):
        return "no weight moved"
    _follow(ours, reference)
    return ""


def _follow(ours: Side, reference: Side) -> None:
    """The weights of the engine, and no gradients."""
    for mine, theirs in zip(_weights(ours), reference.module.parameters(), strict=True):
        theirs.data.copy_(mine)
    reference.module.zero_grad()


def _weights(ours: Side) -> list[Tensor]:
    with deepspeed.zero.GatheredParameters(list(ours.module.parameters())):
        return [each.detach().clone() for each in ours.module.parameters()]
