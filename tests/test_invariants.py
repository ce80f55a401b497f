"""What keeps the next feature from being a special case everywhere, read from the syntax trees.

- No class of gradients, states or weights is a mode of another: axes are fields that `wiring` composes.
- Stage, scaling and offload are read in `wiring` only, but for what files record and the one refusal.
- Arithmetic on a world size is in `placement` only, which knows neither devices nor process groups.
- Nobody takes states for resident: they are reached through `lend`.
- Files and folders stay small enough to see whole.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_layers import MODULES, names_used

Rule = Callable[[str, ast.AST], Iterator[str]]

COMPOSED = tuple(f"ds_fp8.zero_fp8.{room}." for room in ("gradients", "placement", "states", "weights"))
AXES = {"autoscale", "by_tensor", "offload", "scaling", "stage"}
MAY_READ_AXES = {
    "ds_fp8.zero_fp8.wiring": "composes them",
    "ds_fp8.zero_fp8.recipe": "defines them, and what they imply in bytes",
    "ds_fp8.zero_fp8.checkpoint.reader": "reads what a file records",
    "ds_fp8.zero_fp8.checkpoint.writer": "records the scaling",
    "ds_fp8.zero_fp8.handlers.saved_states": "records the stage",
    "ds_fp8.zero_fp8.optimizer.fp8_adamw": "refuses another scaling",
}
WORLD_SIZES = {"get_world_size", "gpus", "ranks", "world_size"}
MAY_COUNT_RANKS = {
    "ds_fp8.estimate.stock": "how stock DeepSpeed places its states",
    "ds_fp8.estimate.methods": "stock DeepSpeed's bytes, and the limits of an estimate",
}
SETTINGS = ("config", "recipe", "settings")
LONGEST_FILE = 300
FULLEST_FOLDER = 10


def subclasses(module: str, tree: ast.AST) -> Iterator[str]:
    """Classes of gradients, states, weights and placement that inherit from anything but a plain record."""
    if not module.startswith(COMPOSED):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases} - {"NamedTuple", "Protocol"}
            yield from (f"{node.name} is a subclass of {base}" for base in sorted(bases))


def axes(module: str, tree: ast.AST) -> Iterator[str]:
    """Reads of an axis off a recipe, settings or a config."""
    if module.startswith("ds_fp8.zero_fp8") and module not in MAY_READ_AXES:
        yield from axes_read(tree)


def axes_read(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in AXES
            and ast.unparse(node.value).endswith(SETTINGS)
        ):
            yield f"reads {ast.unparse(node)}"


def world_sizes(module: str, tree: ast.AST) -> Iterator[str]:
    """Arithmetic on a world size."""
    if not module.startswith("ds_fp8.zero_fp8.placement.") and module not in MAY_COUNT_RANKS:
        yield from computed_with_ranks(tree)


def computed_with_ranks(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and (counts_ranks(node.left) or counts_ranks(node.right)):
            yield f"computes {ast.unparse(node)}"


def counts_ranks(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return counts_ranks(node.func)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in WORLD_SIZES


def devices(module: str, tree: ast.AST) -> Iterator[str]:
    """What placement may not know."""
    if not module.startswith("ds_fp8.zero_fp8.placement."):
        return
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for name in sorted({*names_used(ast.unparse(tree)), *attributes}):
        if name.startswith(("deepspeed", "torch.distributed", "torch.device", "torch.cuda")):
            yield f"uses {name}"


def residence(module: str, tree: ast.AST) -> Iterator[str]:
    """Reads of a shard's states other than through `lend`."""
    if not module.startswith("ds_fp8.zero_fp8") or module == "ds_fp8.zero_fp8.states.shard":
        return
    for node in ast.walk(tree):
        is_state = isinstance(node, ast.Attribute) and node.attr in ("state", "_state")
        if is_state and "shard" in ast.unparse(node):
            yield f"reads {ast.unparse(node)}"


RULES: tuple[Rule, ...] = (subclasses, axes, world_sizes, devices, residence)


def violations(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return [f"{module} {what}" for rule in RULES for what in rule(module, tree)]


def test_no_module_breaks_a_rule() -> None:
    assert [each for name, path in MODULES.items() for each in violations(name, path.read_text())] == []


def test_every_exception_is_needed() -> None:
    for exceptions, finds in ((MAY_READ_AXES, axes_read), (MAY_COUNT_RANKS, computed_with_ranks)):
        for name in exceptions:
            assert list(finds(ast.parse(MODULES[name].read_text()))), f"{name} needs no exception"


@pytest.mark.parametrize(
    ("module", "source", "what"),
    [
        ("gradients.reduced", "class TensorGradient(ReducedGradient): pass", "subclass of ReducedGradient"),
        ("states.shard", "class HostShard(Shard): pass", "subclass of Shard"),
        ("weights.sliced.slices", "class Slices(FlatWeights): pass", "subclass of FlatWeights"),
        ("placement.partition", "class WholeBucket(Bucket): pass", "subclass of Bucket"),
        ("gradients.packing", "if self._recipe.by_tensor: pass", "reads self._recipe.by_tensor"),
        ("handlers.common", "x = 1 if settings.stage == 3 else 2", "reads settings.stage"),
        ("step", "def f(recipe):\n    return recipe.autoscale", "reads recipe.autoscale"),
        ("states.shard", "if config.offload: pass", "reads config.offload"),
        ("gradients.reduced", "share = numel // world_size", "computes numel // world_size"),
        ("handlers.common", "1 / (dist.get_world_size(group) * scale)", "computes dist.get_world_size"),
        ("comm.groups", "count = self.ranks // size", "computes self.ranks // size"),
        ("placement.partition", "from torch.distributed import ProcessGroup", "uses torch.distributed"),
        ("placement.partition", "import torch\nx = torch.cuda.is_available()", "uses torch.cuda"),
        ("placement.ranks", "from deepspeed import comm as dist", "uses deepspeed"),
        ("checkpoint.writer", "shard._state.master", "reads shard._state"),
        ("weights.binding", "self._shards[0].state", "reads self._shards[0].state"),
    ],
)
def test_a_planted_violation_is_caught(module: str, source: str, what: str) -> None:
    found = violations(f"ds_fp8.zero_fp8.{module}", source)
    assert found, f"{source!r} went unnoticed"
    assert what in found[0]


def test_files_are_short_and_folders_are_small() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}
    counts: dict[Path, int] = {}
    for path in MODULES.values():
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    reference = next(path for name, path in MODULES.items() if name == "ds_fp8.ops.adam").parent
    counts.pop(reference)  # one reference per operation, without which neither C++ nor Triton has a contract
    assert {folder: count for folder, count in counts.items() if count > FULLEST_FOLDER} == {}


def test_nine_functions_in_ten_have_twenty_lines_at_most() -> None:
    """Kernels aside: a kernel is one function."""
    lengths = sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and not any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
    )
    assert len(lengths) > 900
    assert lengths[len(lengths) * 9 // 10] <= 20
