"""The decoded values of an FP8 weight: a BF16 tensor that is a temporary copy.

Writes into it would be lost, so it refuses them, and so do views of it. Everything computed from it is a
plain tensor, and so are pickles and copies.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ds_fp8.zero_fp8.products.answers import PLAIN, WRITING, Function
from ds_fp8.zero_fp8.products.matrix import Matrix


class DecodedValues(Tensor):
    """Values that refuse writes."""

    matrix: Matrix | None = None  # the matrix that these are the values of, or a view of them
    generation: int | None = None  # of the matrix, if these are all its values and no view

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not all(issubclass(each, cls) or each in _ORDINARY for each in types):
            return NotImplemented  # an FP8 weight among the arguments decodes itself first
        kwargs = {} if kwargs is None else kwargs
        if torch.compiler.is_dynamo_compiling():  # a graph cannot hold a tensor that may refuse
            return _call_outside(func, args, kwargs)
        if func is Tensor.copy_ and isinstance(args[0], cls) and args[0]._writer:
            args[0]._writer(args[1])
            return args[0]
        refuse_writes(func, args, kwargs, cls)
        given = [each for each in flat((args, tuple(kwargs.values()))) if isinstance(each, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [_version(each) for each in given]
            result = func(*args, **kwargs)
            if versions != [_version(each) for each in given]:  # a function of any name has written
                raise refusal(given[0].matrix, func)
            return tree_map_only(Tensor, lambda out: _view(out, given[0]), result)

    @property
    def _writer(self) -> Callable[[Tensor], None] | None:
        """Function that copies into all values of a weight, as DeepSpeed loads it through `.data`."""
        return None if self.matrix is None or self.generation is None else self.matrix.writer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = memo[id(self)] = self.clone()
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


_ORDINARY = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call_outside(func: Function, args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def read_only(values: Tensor, matrix: Matrix, *, whole: bool = False) -> Tensor:
    """Return the same object, which refuses writes from now on; it keeps its place in the graph."""
    values.__class__ = DecodedValues
    assert isinstance(values, DecodedValues)
    values.matrix = matrix
    values.generation = matrix.generation if whole else None
    return values


def refuse_writes(func: Function, args: Any, kwargs: dict[str, Any], kind: type) -> None:
    """Raise if the function writes to an argument of that kind."""
    for each in () if func in PLAIN else flat(written(func, args, kwargs)):
        if isinstance(each, kind):
            raise refusal(getattr(each, "matrix", None), func)


def refusal(matrix: Matrix | None, func: Function) -> RuntimeError:
    name = "an FP8 parameter" if matrix is None else matrix.name
    return RuntimeError(
        f"{name}: {name_of(func)} would write to an FP8 weight, which has no BF16 copy. Allowed: "
        "deepspeed.utils.safe_set_full_fp32_param, or a new tensor by `parameter.data = ...`, as PEFT's "
        "merge with safe_merge=True does"
    )


def written(func: Function, args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments that a function writes to, judging by its name, without those it only reads."""
    name = name_of(func)
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in WRITING:
        yield from [*args, *kwargs.values()][:1]  # torch.nn.init gives its tensor as a keyword
    if kwargs.get("out") is not None:
        yield kwargs["out"]


def name_of(func: Function) -> str:
    """Return the name, such as `add_`, also for the op torch.ops.aten.add_.Tensor."""
    return str(getattr(func, "__name__", func)).split(".", maxsplit=1)[0]


def flat(values: Any) -> Iterator[Any]:
    """Yield the items of nested lists and tuples."""
    for each in values:
        if isinstance(each, list | tuple):
            yield from flat(each)
        else:
            yield each


def called_by_state_dict(depth: int) -> bool:
    """Whether the frame `depth` above the caller collects a state dict, whose tensors are plain."""
    return sys._getframe(depth + 1).f_code.co_name == "_save_to_state_dict"


def _view(out: Tensor, whose: DecodedValues) -> Tensor:
    """Make a result read-only if it has the memory of read-only values."""
    if isinstance(out, DecodedValues) or out.layout is not torch.strided or not _same_memory(out, whose):
        return out
    return out if whose.matrix is None else read_only(out, whose.matrix)


def _same_memory(left: Tensor, right: Tensor) -> bool:
    return bool(left.untyped_storage()._cdata == right.untyped_storage()._cdata)


def _version(values: Tensor) -> int:
    return 0 if values.is_inference() else values._version
