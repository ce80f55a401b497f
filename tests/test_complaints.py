"""What users of other FP8 trainings complained of, tried here; the list with links is in docs/o3.md.

Most are held by the tests of what they are about. Here are those that cut across.
"""

import gc
import os
from unittest.mock import patch

import torch
from engines import batches, build_gpt, ds_config
from fp8_weights import fp8_linear, random
from ranks import RankPools
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ds_fp8.ops.products import padded_tokens, scale_shape
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter

TOKENS, INPUTS, OUTPUTS = 240, 160, 272


def alive(elements: int) -> list[Tensor]:
    """Tensors of at least a weight's size, but for the parameter that shows no memory."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return [each for each in found if type(each) is not FP8Parameter and each.numel() == elements]


def test_training_keeps_one_copy_of_a_weight_and_a_byte_of_an_input() -> None:
    """No BF16 copy, no transposed codes, not even between forward and backward (pytorch/ao#1102, TE#1261)."""
    layer, saved = fp8_linear(INPUTS, OUTPUTS), []
    x = random(TOKENS, INPUTS).requires_grad_()
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda packed: packed):
        y = layer(x)
    scales = 4 * torch.Size(scale_shape(INPUTS, padded_tokens(TOKENS))).numel()
    assert sum(saved) == TOKENS * INPUTS + scales
    codes = layer.weight.matrix.codes
    assert [each.data_ptr() for each in alive(codes.numel())] == [codes.data_ptr()]
    y.sum().backward()
    gradient = layer.weight.grad
    assert {each.data_ptr() for each in alive(codes.numel())} == {codes.data_ptr(), gradient.data_ptr()}


def micro_steps() -> tuple[list[float], list[int]]:
    """Losses of the same batch three times, and how often codes were written after each."""
    config = ds_config({"opt_level": "O3", "weights": {"min_elements": 256}}, micro_steps=3)
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        engine = build_gpt(config)
    matrices = [each.matrix for each in engine.module.parameters() if isinstance(each, FP8Parameter)]
    batch, losses, written = next(batches(engine)), [], []
    before = sum(each.generation for each in matrices)
    for _ in range(3):
        loss = engine(batch)
        engine.backward(loss)
        losses.append(loss.item())
        written.append((sum(each.generation for each in matrices) - before) // len(matrices))
        engine.step()
    written.append((sum(each.generation for each in matrices) - before) // len(matrices))
    engine.destroy()
    return losses, written


def test_micro_steps_multiply_the_same_codes(ranks: RankPools) -> None:
    """Nobody has to say which micro-step is the first (NVIDIA/TransformerEngine#2852)."""
    losses, written = ranks.run(1, micro_steps)[0]
    assert losses == [losses[0]] * 3
    assert written == [0, 0, 0, 1]
