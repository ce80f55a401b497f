"""The user's own parameter, whose values are FP8 codes.

The object stays, with its name, hooks, gradient, shape, dtype and device; only its class changes. Its memory
is a single NaN, so that C++ code that bypasses Python reads NaN and not a plausible value.

products   `F.linear` and `torch.addmm` (Hugging Face's Conv1D) multiply codes.
readers    get decoded BF16 values, and pass their gradient straight to the parameter.
writers    are refused, since an optimizer's masters decide; `parameter.data = ...` makes it plain again.
pointers   are refused: there is no BF16 memory.
copies     by deepcopy, pickle or state_dict are plain.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ds_fp8.zero_fp8.products import answers
from ds_fp8.zero_fp8.products.answers import Function
from ds_fp8.zero_fp8.products.linear import multiply_input
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.products.values import (
    DecodedValues,
    called_by_state_dict,
    flat,
    name_of,
    read_only,
    refuse_writes,
)
from ds_fp8.zero_fp8.products.ways import Way

logger = logging.getLogger("ds_fp8")

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_LINEAR, _ADDMM = torch._C._nn.linear, torch.addmm  # also if a profiler or DeepSpeed has replaced them


class Decoded(torch.autograd.Function):
    """Values of a parameter for functions other than products; the gradient goes to the parameter as is."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, matrix: Matrix) -> Tensor:
        return matrix.values()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FP8Parameter(nn.Parameter):
    """A parameter that reads FP8 codes; made from a parameter by `take_over`, never constructed."""

    matrix: Matrix
    way: Way

    @staticmethod
    def take_over(parameter: nn.Parameter, matrix: Matrix, way: Way) -> None:
        """Make a parameter read its values from `matrix`, and free its own.

        Raises:
            ValueError: it is no plain BF16 parameter of the matrix's shape and device.
        """
        _check(parameter, matrix)
        nothing = torch.full((), float("nan"), dtype=parameter.dtype, device=parameter.device)
        FP8Parameter.put_on(parameter, nothing.expand(parameter.shape), matrix, way)

    @staticmethod
    def put_on(parameter: nn.Parameter, nothing: Tensor, matrix: Matrix, way: Way) -> None:
        """As `take_over`, without checks. nothing: the tensor that C++ reads, a NaN of the matrix's shape."""
        parameter.data = nothing
        parameter.__class__ = FP8Parameter
        assert isinstance(parameter, FP8Parameter)
        parameter.matrix, parameter.way = matrix, way

    @staticmethod
    def take_off(parameter: nn.Parameter, values: Tensor) -> None:
        """Turn the parameter into a plain one with these values."""
        assert isinstance(parameter, FP8Parameter)
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        del parameter.matrix, parameter.way
        parameter.data = values

    @staticmethod
    def give_back(parameter: nn.Parameter) -> None:
        """Turn the parameter into a plain one with the values of its codes."""
        assert isinstance(parameter, FP8Parameter)
        FP8Parameter.take_off(parameter, parameter.matrix.values())

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        # By identity and first: Dynamo traces this code and cannot look into a table.
        if func is _LINEAR or func is functional.linear:
            return linear(*args, **kwargs)
        if func is _ADDMM or func is torch.addmm:
            return _addmm(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return _answer_traced(func, args, kwargs)
        if func in answers.PLAIN or answers.compiler_asks():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _answer(func, args, kwargs, called_by_state_dict(1))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copy = memo[id(self)] = _plain_copy(self)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain_copy(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FP8Parameter({self.matrix.name}, {list(self.shape)}, {self.way.name})"

    def set_(self, *_: Any) -> Any:
        """Refuse: torch calls no override here."""
        raise _no_memory(self, Tensor.set_)


def _check(parameter: nn.Parameter, matrix: Matrix) -> None:
    if type(parameter) is not nn.Parameter:
        raise ValueError(f"{matrix.name}: received a {type(parameter).__name__}, allowed: nn.Parameter")
    received = parameter.dtype, list(parameter.shape), parameter.device
    allowed = torch.bfloat16, list(matrix.codes.shape), matrix.codes.device
    if received != allowed:
        raise ValueError(f"{matrix.name}: received a parameter of {received}, allowed: {allowed}")


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """Return what `F.linear` does, with an FP8 product if the weight is one; arguments have torch's names."""
    if isinstance(input, FP8Parameter) or not isinstance(weight, FP8Parameter):
        return _read(_LINEAR, (input, weight, bias), {})
    matrix, way = weight.matrix, weight.way
    return multiply_input(input, weight, bias, matrix=matrix, way=way, swapped=False)


def _addmm(input: Any, mat1: Any, mat2: Any, **kwargs: Any) -> Any:
    """Multiply for Conv1D, bias + x W; any other sum uses decoded values."""
    is_product = isinstance(mat2, FP8Parameter) and not isinstance(mat1, FP8Parameter)
    if not is_product or isinstance(input, FP8Parameter) or input.dim() != 1 or kwargs:
        return _read(_ADDMM, (input, mat1, mat2), kwargs)
    return multiply_input(mat1, mat2, input, matrix=mat2.matrix, way=mat2.way, swapped=True)


def _answer(func: Function, args: Any, kwargs: dict[str, Any], for_state_dict: bool) -> Any:
    """Call a function that is neither a product nor answered by the tensor without values."""
    asked = next(each for each in flat((args, tuple(kwargs.values()))) if isinstance(each, FP8Parameter))
    if func in answers.POINTING:
        raise _no_memory(asked, func)
    if func in answers.REPLACING:
        return _replace(asked, args[1])
    if func is Tensor.record_stream and asked is args[0]:
        return asked.matrix.record_stream(*args[1:], **kwargs)
    if func is Tensor.copy_ and asked is args[0] and asked.matrix.writer:
        return _write(asked, asked.matrix.writer, *args[1:], **kwargs)
    refuse_writes(func, args, kwargs, FP8Parameter)
    if func in answers.DETACHING:
        if for_state_dict and asked.matrix.on_state_dict:
            asked.matrix.on_state_dict()
        return _values(asked, plain=for_state_dict)
    return _answer_reader(func, asked, args, kwargs)


def _answer_reader(func: Function, asked: FP8Parameter, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a function that writes to no FP8 weight."""
    if func in answers.LAYING_OUT:
        return func(torch.empty(asked.shape, device="meta"), *args[1:], **kwargs)
    if func in answers.NODE and args[0] is args[-1]:
        return _decode(asked)
    if func in answers.CONVERTING and asked is args[0]:
        return _convert(func, asked, args[1:], kwargs)
    if name_of(func).startswith("_foreach_"):
        return _one_by_one(func, args, kwargs)
    return _read(func, args, kwargs)


def _values(parameter: FP8Parameter, *, plain: bool) -> Tensor:
    """Return the values, outside the graph."""
    matrix = parameter.matrix
    matrix.decodes += 1
    values = matrix.values()
    return values if plain else read_only(values, matrix, whole=True)


def _decode(parameter: FP8Parameter) -> Tensor:
    """Return the values, in the graph if there is one."""
    if not torch.is_grad_enabled() or not parameter.requires_grad:
        return _values(parameter, plain=False)
    parameter.matrix.decodes += 1
    values: Tensor = Decoded.apply(parameter, parameter.matrix)  # type: ignore[no-untyped-call]
    return read_only(values, parameter.matrix)


def _read(func: Function, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a function with the values of each FP8 weight."""
    if torch.compiler.is_dynamo_compiling():
        return _read_traced(func, args, kwargs)
    for each in flat((args, tuple(kwargs.values()))):
        if isinstance(each, FP8Parameter):
            _name_once(each, func)
    return func(*_decoded(args), **{name: _decoded(value) for name, value in kwargs.items()})


def _decoded(value: Any) -> Any:
    if isinstance(value, FP8Parameter):
        return _decode(value)
    if isinstance(value, list | tuple):
        return type(value)(_decoded(each) for each in value)
    return value


def _name_once(parameter: FP8Parameter, func: Function) -> None:
    """Log once that training decodes this weight at each step."""
    matrix = parameter.matrix
    if torch.is_grad_enabled() and parameter.requires_grad and not matrix.was_named:
        matrix.was_named = True
        logger.warning(
            "%s: %s reads this FP8 weight, which is decoded to BF16 for it each time; weights.exclude keeps "
            "a weight in BF16",
            matrix.name,
            name_of(func),
        )


def _one_by_one(func: Function, args: Any, kwargs: dict[str, Any]) -> Any:
    """Decode one weight at a time instead of the whole model."""
    lists = [each for each in args if isinstance(each, list | tuple)]
    found: list[Any] = []
    for index in range(len(lists[0])):
        each = [[value[index]] if isinstance(value, list | tuple) else value for value in args]
        found.extend(_read(func, each, kwargs) or ())
    return found or None


def _convert(func: Function, parameter: FP8Parameter, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Convert as `model.to(...)` does for each parameter; tested on one element."""
    with torch._C.DisableTorchFunctionSubclass():
        one = parameter.detach()[:1, :1]
        converted = func(one, *args, **kwargs)
    if converted is one:
        return parameter
    return converted if isinstance(converted, str) else _read(func, (parameter, *args), kwargs)


def _replace(parameter: FP8Parameter, new: Tensor) -> None:
    """Set `parameter.data = new`: the parameter becomes plain, unless it has these values already."""
    matrix = parameter.matrix
    same = isinstance(new, DecodedValues) and new.matrix is matrix and new.generation == matrix.generation
    if new is not parameter and not same:
        FP8Parameter.take_off(parameter, new)


def _write(
    parameter: FP8Parameter, writer: Callable[[Tensor], None], values: Tensor, *_: Any, **__: Any
) -> Tensor:
    """Write as `load_state_dict` does, while the owner of the matrix allows it."""
    writer(values.expand(parameter.shape))
    return parameter


def _plain_copy(parameter: FP8Parameter) -> nn.Parameter:
    return nn.Parameter(_values(parameter, plain=True), parameter.requires_grad)


def _no_memory(parameter: FP8Parameter, func: Function) -> RuntimeError:
    return RuntimeError(
        f"{parameter.matrix.name}: {name_of(func)} asks for the memory of an FP8 weight, which has no BF16 "
        "values in memory. Allowed: weights.exclude with its name, which keeps it in BF16"
    )


def _answer_traced(func: Function, args: Any, kwargs: dict[str, Any]) -> Any:
    """As `_answer`, for Dynamo; functions other than readers leave the graph."""
    if func.__name__ in answers.LEAVES_GRAPH or func == _DATA:
        return _answer_outside(func, args, kwargs)
    return _read_traced(func, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _answer_outside(func: Function, args: Any, kwargs: dict[str, Any]) -> Any:
    return _answer(func, args, kwargs, False)


def _read_traced(func: Function, args: Any, kwargs: dict[str, Any]) -> Any:
    values = [_decoded_traced(each) for each in args]
    return func(*values, **{name: _decoded_traced(value) for name, value in kwargs.items()})


def _decoded_traced(value: Any) -> Any:
    if isinstance(value, FP8Parameter):
        return Decoded.apply(value, value.matrix)  # type: ignore[no-untyped-call]
    if isinstance(value, list | tuple):
        return [_decoded_traced(each) for each in value]
    return value
