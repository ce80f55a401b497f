"""Long argument lists go by name: kernels are launched by keyword, and a sweep is one argument.

A pointer in another's place is no error to a kernel. The syntax trees of ops are read, so that no kernel need
run; the second half plants a violation of each rule.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ds_fp8

OPS = Path(ds_fp8.__file__).parents[1] / "ops"
SOURCES = {path.relative_to(OPS).as_posix(): path.read_text() for path in sorted(OPS.rglob("*.py"))}
KERNELS = "".join(source for name, source in SOURCES.items() if name.startswith("triton/"))
LAUNCH = "launch"  # of the module LAUNCHING: a kernel, programs and warps, then the kernel's own arguments
OF_LAUNCH = 3
LAUNCHING = "triton/launching.py"  # gives a compiled kernel its arguments in the order of the parameters
LONG, FIRST = 8, 3  # parameters of a device function, and how many of that many are clear by their place
STEPS = ("adam_step", "step_tensors")


def is_device_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def parameters_of(source: str) -> dict[str, int]:
    """How many parameters each device function has."""
    functions = (node for node in ast.walk(ast.parse(source)) if is_device_function(node))
    return {node.name: len(node.args.args) for node in functions if isinstance(node, ast.FunctionDef)}


def calls(source: str) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def launches_by_place(source: str) -> list[str]:
    """Launches with an argument of the kernel by its place."""
    found = []
    for call, name in calls(source):
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        if name.split(".")[-1] == LAUNCH and (starred or len(call.args) > OF_LAUNCH):
            found.append(ast.unparse(call))
        if isinstance(call.func, ast.Subscript) and call.args:  # kernel[grid](...)
            found.append(ast.unparse(call))
    return found


def long_calls_by_place(source: str, parameters: dict[str, int]) -> list[str]:
    """Calls of device functions with many parameters, more than the first of them by place."""
    return [
        ast.unparse(call)
        for call, name in calls(source)
        if parameters.get(name, 0) >= LONG and len(call.args) > FIRST
    ]


def signatures_of_a_sweep(source: str) -> list[str]:
    """Functions that make a step, but are given anything else than a sweep."""
    return [
        ast.unparse(node.args)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name in STEPS
        if ast.unparse(node.args) != "sweep: Sweep"
    ]


@pytest.mark.parametrize("name", [each for each in SOURCES if each != LAUNCHING])
def test_kernels_are_launched_by_keyword(name: str) -> None:
    assert launches_by_place(SOURCES[name]) == []


@pytest.mark.parametrize("name", SOURCES)
def test_long_lists_are_forwarded_by_keyword(name: str) -> None:
    assert long_calls_by_place(SOURCES[name], parameters_of(KERNELS)) == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_sweep_is_one_argument(name: str) -> None:
    assert signatures_of_a_sweep(SOURCES[name]) == []


def test_the_rules_have_something_to_rule() -> None:
    names = [name for _, name in calls(KERNELS)]
    assert names.count(LAUNCH) >= 6
    assert {"quantize_tile", "store_blocks", "store_masters"} <= {
        name for name, count in parameters_of(KERNELS).items() if count >= LONG
    } & {*names}
    steps = [name for name, source in SOURCES.items() if any(f"def {step}(" in source for step in STEPS)]
    assert steps == ["adam.py", "cpu/kernels.py", "per_tensor.py", "triton/adam.py", "triton/per_tensor.py"]


@pytest.mark.parametrize(
    "call",
    [
        "launch(adam_kernel, programs, WARPS, control, gradient_codes=codes)",
        "launching.launch(adam_kernel, programs, WARPS, *tensors)",
        "launch(*everything)",
        "adam_kernel[(programs,)](control)",
        "adam_kernel[(programs,)](*operands, ROWS=rows)",
    ],
)
def test_a_launch_by_place_is_seen(call: str) -> None:
    """In the code of a module as it stands, too."""
    assert launches_by_place(f"def step():\n    {call}") == [ast.unparse(ast.parse(call))]
    kernel = "        control=sweep.control,\n"
    planted = SOURCES["triton/adam.py"].replace(kernel, "        sweep.control,\n")
    assert planted != SOURCES["triton/adam.py"]
    assert len(launches_by_place(planted)) == 1


def test_a_long_call_by_place_is_seen() -> None:
    call = "store_blocks(x, size, codes, scales, rows, offset, inside, FORMAT=F, HARDWARE=H, UNIT=0)"
    assert long_calls_by_place(call, parameters_of(KERNELS)) == [call]
    assert long_calls_by_place("load_codes(codes, offset, inside, F, H)", parameters_of(KERNELS)) == []


def test_another_signature_of_a_sweep_is_seen() -> None:
    assert signatures_of_a_sweep("def adam_step(state: AdamState, gradient: Blocks) -> None: ...")
    assert not signatures_of_a_sweep("def adam_step(sweep: Sweep) -> None: ...")
