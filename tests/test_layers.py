"""Imports go down only, and DeepSpeed's private names come through one door.

Read from the source by `ast`, so that an import inside a function counts like any other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"ds_fp8": ROOT / "ds_fp8", "ds_fp8.ops": ROOT / "ops", "ds_fp8.zero_fp8": ROOT / "zero_fp8"}
PACKAGES = {"ds_fp8", "ds_fp8.ops", "ds_fp8.zero_fp8", "ds_fp8.configs"}  # leaves: they import nothing

LAYERS = (  # a module imports from the lines below its own only
    ("ds_fp8.cli", "ds_fp8.__main__", "ds_fp8.hf"),
    ("ds_fp8.cli_checkpoints", "ds_fp8.cli_configs", "ds_fp8.cli_estimate", "ds_fp8.cli_report"),
    ("ds_fp8.estimators",),
    ("ds_fp8.terminal",),
    ("ds_fp8.plans", "ds_fp8.pretrained"),
    ("ds_fp8.registration",),
    ("ds_fp8.saving",),
    ("ds_fp8.engine", "ds_fp8.fitting"),
    ("ds_fp8.arguments", "ds_fp8.backward", "ds_fp8.model_file"),
    ("ds_fp8.status",),
    ("ds_fp8.estimates",),
    ("ds_fp8.memory",),
    ("ds_fp8.zero_fp8.handler",),
    ("ds_fp8.zero_fp8.export", "ds_fp8.zero_fp8.stock", "ds_fp8.zero_fp8.universal"),
    ("ds_fp8.zero_fp8.foreign",),
    ("ds_fp8.zero_fp8.native",),
    ("ds_fp8.zero_fp8.convert",),
    (
        "ds_fp8.zero_fp8.access",
        "ds_fp8.zero_fp8.binding",
        "ds_fp8.zero_fp8.checkpoint",
        "ds_fp8.zero_fp8.client",
        "ds_fp8.zero_fp8.gradients",
        "ds_fp8.zero_fp8.layout",
        "ds_fp8.zero_fp8.norm",
        "ds_fp8.zero_fp8.trained",
    ),
    ("ds_fp8.zero_fp8.weights",),
    ("ds_fp8.zero_fp8.wire",),
    ("ds_fp8.zero_fp8.exchange", "ds_fp8.zero_fp8.shard"),
    ("ds_fp8.zero_fp8.health",),
    ("ds_fp8.zero_fp8.autoscale",),
    ("ds_fp8.zero_fp8.agreement", "ds_fp8.zero_fp8.comm", "ds_fp8.zero_fp8.optimizer"),
    ("ds_fp8.zero_fp8.alone",),
    ("ds_fp8.zero_fp8.edits",),
    (
        "ds_fp8.zero_fp8.backwards",
        "ds_fp8.zero_fp8.guards",
        "ds_fp8.zero_fp8.partition",
        "ds_fp8.zero_fp8.reading",
        "ds_fp8.zero_fp8.recipe",
        "ds_fp8.zero_fp8.roster",
        "ds_fp8.zero_fp8.tags",
        "ds_fp8.zero_fp8.writing",
    ),
    ("ds_fp8.zero_fp8.manifest",),
    ("ds_fp8.ops.builder",),
    ("ds_fp8.ops.backend",),
    ("ds_fp8.ops.tensors_triton", "ds_fp8.ops.vectors_triton"),
    ("ds_fp8.ops.cpu", "ds_fp8.ops.adam_triton", "ds_fp8.ops.reduction_triton", "ds_fp8.ops.blocks_triton"),
    (
        "ds_fp8.ops.masters_triton",
        "ds_fp8.ops.moments_triton",
        "ds_fp8.ops.ring",
        "ds_fp8.ops.roots_triton",
        "ds_fp8.ops.tensors",
    ),
    ("ds_fp8.ops.rounding_triton", "ds_fp8.ops.guards"),
    ("ds_fp8.ops.tiles_triton", "ds_fp8.ops.adam", "ds_fp8.ops.reduction"),
    ("ds_fp8.ops.masters", "ds_fp8.ops.exact"),
    ("ds_fp8.ops.rounding", "ds_fp8.ops.blocks"),
    ("ds_fp8.ops.health",),
    ("ds_fp8.ops.formats", "ds_fp8.ops.build"),
    ("ds_fp8.ds_config",),
    ("ds_fp8.rules",),
    ("ds_fp8.config", "ds_fp8.compat"),
    ("ds_fp8.builds", "ds_fp8.refusals"),
)
HEIGHT = {module: -depth for depth, layer in enumerate(LAYERS) for module in layer}

PUBLIC = (
    "deepspeed.comm",
    "deepspeed.ops.adam",
    "deepspeed.ops.op_builder.builder",
    "deepspeed.initialize",
    "deepspeed.accelerator",
)
OWN_ROOTS = ("ops", "zero_fp8", "configs")  # folders here, but somebody else's names when installed


def names_used(source: str) -> Iterator[str]:
    """Dotted names that the source imports, and those that it reaches through `import deepspeed`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith(("deepspeed.", "ds_fp8.")) and "(" not in dotted:
                yield dotted


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def module_of(name: str) -> str | None:
    """The module of ours that a dotted name comes from; None for what no module here explains."""
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    found = next((each for each in prefixes if each in HEIGHT or each in PACKAGES), None)
    is_itself_or_version = name in PACKAGES or name == "ds_fp8.__version__"
    return None if found in PACKAGES and not is_itself_or_version else found


def complaint_about_deepspeed(importer: str, name: str) -> str | None:
    if within(importer, "ds_fp8.ops") and importer != "ds_fp8.ops.builder":
        return "ops knows no DeepSpeed"
    public = name == "deepspeed" or any(within(name, each) for each in PUBLIC)
    return None if public or importer == "ds_fp8.compat" else "a private name of DeepSpeed"


def complaint_about_ours(importer: str, name: str) -> str | None:
    module = module_of(name)
    if module is None:
        return "neither a module nor __version__"
    if within(importer, "ds_fp8.ops") and not within(module, "ds_fp8.ops"):
        return "ops imports from ops only"
    down = module in PACKAGES or (importer in HEIGHT and HEIGHT[module] < HEIGHT[importer])
    return None if down else "not a layer below"


def complaint(importer: str, name: str) -> str | None:
    """What is wrong with `importer` using `name`, if anything."""
    if name.startswith("."):
        return "a relative import"
    if name.split(".", maxsplit=1)[0] in OWN_ROOTS:
        return "a bare name that is another package when installed"
    if within(name, "deepspeed"):
        return complaint_about_deepspeed(importer, name)
    return complaint_about_ours(importer, name) if within(name, "ds_fp8") else None


def violations(importer: str, source: str) -> list[str]:
    found = {name: complaint(importer, name) for name in names_used(source)}
    return [f"{importer} uses {name}: {why}" for name, why in found.items() if why]


def modules() -> dict[str, Path]:
    """Every module of the package but the package itself, which loads its names on demand."""
    paths = {f"{home}.{path.stem}": path for home, folder in HOMES.items() for path in folder.glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "ds_fp8.__init__"}


MODULES = modules()


def test_every_module_has_a_layer() -> None:
    missing = set(MODULES) - set(HEIGHT) - PACKAGES
    assert not missing, f"give these a line in LAYERS: {missing}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name: str) -> None:
    assert violations(name, MODULES[name].read_text()) == []


def test_nothing_imports_a_bare_ops_or_zero_fp8() -> None:
    """Nor do tests, examples and benchmarks, where the folders would be found by accident."""
    sources = [
        path for folder in ("tests", "examples", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    assert len(sources) > 2
    for path in sources:
        bare = [name for name in names_used(path.read_text()) if name.split(".", maxsplit=1)[0] in OWN_ROOTS]
        assert not bare, f"{path}: {bare}"


def test_the_package_itself_imports_ours_only_on_demand() -> None:
    tree = ast.parse((ROOT / "ds_fp8" / "__init__.py").read_text())
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name for node in imported for name in names_used(ast.unparse(node))}
    assert not [name for name in names if within(name, "ds_fp8") or within(name, "deepspeed")]


@pytest.mark.parametrize(
    ("importer", "source", "why"),
    [
        ("ds_fp8.ops.adam", "from ds_fp8.zero_fp8.partition import Piece", "ops imports from ops only"),
        ("ds_fp8.ops.blocks", "from ds_fp8.config import parse", "ops imports from ops only"),
        ("ds_fp8.ops.blocks", "from ds_fp8.ops import adam", "not a layer below"),
        ("ds_fp8.ops.formats", "import ds_fp8.ops.blocks", "not a layer below"),
        ("ds_fp8.ops.rounding", "from ds_fp8.ops.blocks import encode", "not a layer below"),
        ("ds_fp8.ops.adam", "from deepspeed import comm as dist", "ops knows no DeepSpeed"),
        ("ds_fp8.ops.adam", "def f():\n    import deepspeed", "ops knows no DeepSpeed"),
        ("ds_fp8.zero_fp8.partition", "from ds_fp8.zero_fp8 import comm", "not a layer below"),
        ("ds_fp8.zero_fp8.comm", "from ds_fp8.zero_fp8.shard import Shard", "not a layer below"),
        ("ds_fp8.zero_fp8.comm", "def f():\n    from ds_fp8 import engine", "not a layer below"),
        ("ds_fp8.zero_fp8.handler", "from ds_fp8 import register", "neither a module nor __version__"),
        ("ds_fp8.zero_fp8.handler", "import ds_fp8\nds_fp8.register()", "neither a module nor __version__"),
        ("ds_fp8.config", "from ds_fp8.ops.formats import BY_NAME", "not a layer below"),
        ("ds_fp8.zero_fp8", "from ds_fp8.zero_fp8 import handler", "not a layer below"),
        ("ds_fp8.engine", "from deepspeed.runtime.engine import DeepSpeedEngine", "private name"),
        ("ds_fp8.engine", "from deepspeed import runtime", "private name"),
        ("ds_fp8.engine", "import deepspeed.utils.timer", "private name"),
        ("ds_fp8.engine", "import deepspeed\nx = deepspeed.runtime.engine", "private name"),
        ("ds_fp8.engine", "from ops.adam import adam_step", "another package"),
        ("ds_fp8.engine", "import zero_fp8", "another package"),
        ("ds_fp8.engine", "from . import memory", "relative"),
        ("ds_fp8.engine", "from .zero_fp8 import handler", "relative"),
    ],
)
def test_a_planted_import_is_caught(importer: str, source: str, why: str) -> None:
    found = violations(importer, source)
    assert found, f"{source!r} went unnoticed"
    assert why in found[0]


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("ds_fp8.engine", "import ds_fp8\nfrom ds_fp8 import memory\nx = ds_fp8.__version__"),
        ("ds_fp8.zero_fp8.handler", "from ds_fp8 import __version__"),
        ("ds_fp8.zero_fp8.comm", "from deepspeed import comm as dist\nimport deepspeed"),
        ("ds_fp8.compat", "from deepspeed.runtime.engine import DeepSpeedEngine"),
        ("ds_fp8.ops.adam", "import torch\nfrom ds_fp8.ops import blocks"),
        ("ds_fp8.engine", "self.ds_fp8.enabled"),
    ],
)
def test_what_is_allowed_is_not_caught(importer: str, source: str) -> None:
    assert violations(importer, source) == []
