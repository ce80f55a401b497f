"""A GPT at the shapes of FP8-LM's Table 1 and of GPT-3, made on the device and in its training dtype.

The vocabulary is of GPT-2's size, padded to 50,304, without which the parameter counts would not be those of
the names; `tiny` has 256. Positions are learned, where Table 1 (https://arxiv.org/abs/2310.18313) has rotary
ones.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from train_lm import Block, Shape


@dataclass(frozen=True)
class GPTShape(Shape):
    """`context` is the longest; `tied`: the head is the embedding, as in GPT-2 and GPT-3."""

    context: int = 2048
    vocabulary: int = 50304
    tied: bool = True


MODELS = {
    "tiny": GPTShape(layers=2, width=64, heads=2, context=64, vocabulary=256),
    "125M": GPTShape(layers=12, width=768, heads=12),
    "350M": GPTShape(layers=24, width=1024, heads=16),
    "1.3B": GPTShape(layers=24, width=2048, heads=16),
    "7B": GPTShape(layers=32, width=4096, heads=32, tied=False),
    "13B": GPTShape(layers=40, width=5120, heads=40, tied=False),
}


class GPT(nn.Module):
    """Returns the mean cross entropy of the next token, in nats. `initialise` gives it its weights."""

    def __init__(self, shape: GPTShape, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.shape, self.checkpointing = shape, checkpointing
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = None if shape.tied else nn.Linear(shape.width, shape.vocabulary, bias=False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal of 0.02, and of 0.02 / sqrt(2 layers) for what writes into the residual stream."""
        residual = 0.02 / math.sqrt(2 * self.shape.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=residual if name.endswith(("out.weight", "down.weight")) else 0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    def forward(self, text: Tensor) -> Tensor:  # [batch, context + 1] int64
        inputs, targets = text[:, :-1], text[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=text.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        head = self.tokens if self.head is None else self.head
        logits = F.linear(self.norm(x), head.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_model(shape: GPTShape, ds_config: dict[str, Any], device: torch.device, **options: bool) -> GPT:
    """On the device and in the dtype that it trains in; the host never holds it."""
    enabled = (key for key in ("bf16", "fp16") if ds_config.get(key, {}).get("enabled"))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[next(enabled, None)]
    with torch.device("meta"):
        model = GPT(shape, **options).to(dtype)
    model.to_empty(device=device).initialise()
    return model
