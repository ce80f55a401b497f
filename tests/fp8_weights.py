"""FP8 weights for tests: a matrix in buffers of its own, models of which every product is FP8."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ds_fp8.ops import products
from ds_fp8.ops.products import CastGradient, CastInput, Operand
from ds_fp8.zero_fp8.products.choice import kind_of
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.products.kernels import REFERENCE
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.ways import DecodedProducts, FP8Products, Way

NOTHING = float("nan")


def as_cublas_reads(operand: Operand | None) -> Operand | None:
    """The scales of rows transposed, those of tiles followed by unwritten padding."""
    if operand is None:
        return None
    scales, (rows, inner) = operand.scales, operand.codes.shape
    if len(scales) == rows:
        turned = torch.empty(scales.shape[1], rows)
        return Operand(operand.codes, turned.copy_(scales.t()).t())
    padded = torch.full(products.scale_shape(rows, inner), NOTHING)
    real = products.tiles(inner)
    padded[:, :real] = scales[:, :real]
    return Operand(operand.codes, padded)


def _cast_input(x: Tensor, *, wgrad: bool) -> CastInput:
    cast = products.cast_input(x, wgrad=wgrad)
    forward = as_cublas_reads(cast.forward)
    assert forward is not None
    return CastInput(forward, as_cublas_reads(cast.wgrad))


def _cast_gradient(dy: Tensor, **wanted: bool) -> CastGradient:
    cast = products.cast_gradient(dy, **wanted)
    return CastGradient(as_cublas_reads(cast.dgrad), as_cublas_reads(cast.wgrad), cast.bias)


def _multiply(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """Strict about what a kernel would read wrongly."""
    rows, inner = left.codes.shape
    groups = products.scale_shape(*right.codes.shape)[1]
    assert (left.scales.shape, left.scales.stride()) == ((rows, products.tiles(inner)), (1, rows))
    assert right.scales.shape == (products.tiles(len(right.codes)), groups)
    assert right.scales.is_contiguous()
    assert left.codes.is_contiguous()
    assert right.codes.is_contiguous()
    assert bias is None or bias.is_contiguous()
    return products.multiply(left, right, bias)


EMULATED = FP8Products("emulated", REFERENCE)
DECODED = DecodedProducts()
LAID_OUT = FP8Products(
    "laid out",
    replace(
        REFERENCE,
        name="laid out",
        cast_input=_cast_input,
        cast_gradient=_cast_gradient,
        multiply=_multiply,
    ),
)
WAYS = (EMULATED, DECODED, LAID_OUT)


def hold(values: Tensor, name: str = "weight") -> Matrix:
    """A matrix of these values."""
    rows, columns = values.shape
    matrix = Matrix(
        name,
        torch.empty(rows, columns, dtype=torch.float8_e4m3fn),
        torch.zeros(products.tiles(rows), products.tiles(columns), dtype=torch.uint8),
    )
    matrix.store(values)
    return matrix


def fp8_linear(
    inputs: int = 160, outputs: int = 96, *, way: Way = EMULATED, bias: bool = True, seed: int = 0
) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    take_over(layer.weight, way)
    return layer


def take_over(parameter: nn.Parameter, way: Way, name: str = "weight") -> Matrix:
    matrix = hold(parameter.data, name)
    FP8Parameter.take_over(parameter, matrix, way)
    return matrix


def make_fp8(model: nn.Module, way: Way = EMULATED) -> dict[str, Matrix]:
    """Every Linear and Conv1D but the head, of whatever size."""
    return {
        name: take_over(module.weight, way, f"{name}.weight")
        for name, module in model.named_modules()
        if kind_of(module) is not None and not name.endswith("lm_head") and "lora" not in name
    }


def fp8_parameters(model: nn.Module) -> Iterator[FP8Parameter]:
    return (each for each in model.parameters() if isinstance(each, FP8Parameter))


def twin(layer: nn.Linear) -> nn.Linear:
    """A plain layer with the values that the codes have."""
    assert isinstance(layer.weight, FP8Parameter)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.bfloat16)
    plain.weight.data = layer.weight.matrix.values()
    if layer.bias is not None:
        plain.bias.data = layer.bias.data.clone()
    return plain


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)
