"""AdamWs of other libraries on a CPU, each made to do the work of our sweep.

A peer with FP32 parameters also writes the BF16 weights, with `copy_` into an existing tensor. Each takes the
BF16 gradient if it accepts one for its parameters, else the same in FP32.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class PeerError(RuntimeError):
    """A peer that cannot be timed here, with the reason."""


@dataclass(frozen=True)
class Peer:
    """Recipe for an optimizer of one parameter."""

    name: str
    make: Callable[..., Any]  # called with the parameter, and with hyperparameters as keywords
    parameters: torch.dtype
    gradient: torch.dtype
    compiles: bool = False  # whether it compiles C++ for minutes on first use
    rounds: int | None = None  # fewer rounds for a slow peer


class PeerStep:
    """A peer's steps on one parameter."""

    def __init__(self, peer: Peer, start: Tensor, gradients: dict[torch.dtype, Tensor]) -> None:
        """start: [n] BF16 weights; gradients: [n], the same by dtype. Raises PeerError."""
        self._peer = peer
        self._parameter = torch.nn.Parameter(start.to(peer.parameters, copy=True))
        self.weights = self._parameter.detach()
        self.fp32 = peer.parameters is torch.float32
        if self.fp32:
            self.weights = torch.zeros_like(start)
            self._parameter.grad_dtype = peer.gradient
        self._parameter.grad = gradients[peer.gradient]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._optimizer = peer.make(self._parameter, **HYPERPARAMETERS)
                self.run()
        except ImportError as error:
            raise PeerError(f"not installed: {first_line(error)}") from error
        except Exception as error:  # any failure of a peer is reported
            raise PeerError(f"does not run: {type(error).__name__}: {first_line(error)}") from error

    def run(self) -> None:
        self._optimizer.step()
        if self.fp32:
            self.weights.copy_(self._parameter.detach())

    @property
    def held(self) -> int:
        """Bytes of states, and of the FP32 parameter that is their master."""
        states = sum(nbytes(each) for each in self._optimizer.state[self._parameter].values())
        return states + (self._parameter.nbytes if self.fp32 else 0)

    @property
    def moved(self) -> int:
        """Least bytes that a step reads and writes, without temporaries."""
        gradient = self._parameter.grad
        assert gradient is not None
        weights = 6 * len(self.weights) if self.fp32 else 2 * self._parameter.nbytes
        return 2 * self.held + gradient.nbytes + weights


def nbytes(value: Any) -> int:
    """Return the bytes of a tensor, or of the tensors inside a tensor subclass; counters are left out."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:150]


def torch_fused(parameter: Tensor, **hyperparameters: Any) -> Any:
    return torch.optim.AdamW([parameter], fused=True, **hyperparameters)


def cpu_adam(parameter: Tensor, **hyperparameters: Any) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam([parameter], adamw_mode=True, **hyperparameters)


def torchao_fp8(parameter: Tensor, **hyperparameters: Any) -> Any:
    from torchao.optim import AdamWFp8

    return AdamWFp8([parameter], **hyperparameters)


def torchao_8bit(parameter: Tensor, **hyperparameters: Any) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit([parameter], **hyperparameters)


def bitsandbytes_8bit(parameter: Tensor, **hyperparameters: Any) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([parameter], **hyperparameters)


FP32, BF16 = torch.float32, torch.bfloat16
PEERS = (
    Peer("torch AdamW fused, fp32", torch_fused, FP32, FP32),
    Peer("torch AdamW fused, bf16", torch_fused, BF16, BF16),
    Peer("DeepSpeedCPUAdam, fp32", cpu_adam, FP32, FP32, compiles=True),
    Peer("DeepSpeedCPUAdam, bf16", cpu_adam, BF16, BF16, compiles=True),
    Peer("torchao AdamWFp8, fp32", torchao_fp8, FP32, BF16, compiles=True),
    Peer("bitsandbytes AdamW8bit, fp32", bitsandbytes_8bit, FP32, BF16, rounds=5),
)
