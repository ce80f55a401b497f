"""Imports go down only, and DeepSpeed's private names come through one door.

Read from the source by `ast`, so that an import inside a function counts like any other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"ds_fp8": ROOT / "ds_fp8", "ds_fp8.ops": ROOT / "ops", "ds_fp8.zero_fp8": ROOT / "zero_fp8"}
# Rooms, the highest first. A module imports from rooms below its own, and within its room from the parts
# after the next "|". "." is the room's package itself.
ROOMS = (
    ("ds_fp8", "__main__ hf"),
    ("ds_fp8.cli", "__main__ | . | checkpoints configs estimate report | fits"),
    (
        "ds_fp8.seam",
        "registration | loading saving | engine load_checks | "
        "arguments backward engine_checks model_file | status",
    ),
    (
        "ds_fp8.estimate",
        "deepspeed_names | methods dry_run model_sizes engine_weights | codes | runs | fetching memory stock",
    ),
    ("ds_fp8", "builds output"),
    (
        "ds_fp8.zero_fp8.handlers",
        "stage12 stage3 | common fetching slice_access | full_tensors roster saved_states take_over | "
        "master_views",
    ),
    ("ds_fp8.zero_fp8.offload", "moves"),
    ("ds_fp8.zero_fp8", "step | wiring verdict | parts"),
    ("ds_fp8.zero_fp8.checkpoint.foreign", "stock12 stock3 universal | stock_model | stock_files"),
    ("ds_fp8.zero_fp8.checkpoint.whole", "export | fp8_layout | merged"),
    (
        "ds_fp8.zero_fp8.checkpoint",
        "convert | reader writer | contracts model_files | files | tags | manifest",
    ),
    (
        "ds_fp8.zero_fp8.optimizer",
        "client facade replacement | fp8_adamw | standalone | edits entries hyperparameters members",
    ),
    ("ds_fp8.zero_fp8.weights", "binding model_weights"),
    ("ds_fp8.zero_fp8.weights.sliced", "fetch frozen"),
    ("ds_fp8.zero_fp8.weights", "frozen"),
    ("ds_fp8.zero_fp8.weights.sliced", "codes | slices"),
    ("ds_fp8.zero_fp8.weights", "code_views tiled views | code_store | store | claims home"),
    (
        "ds_fp8.zero_fp8.products",
        "chosen | fp8_parameter choice | linear | ways values | answers shared_casts matrix | kernels",
    ),
    ("ds_fp8.zero_fp8.offload", "place"),
    (
        "ds_fp8.zero_fp8.gradients",
        "reducer fp8_sum landing | pending | packing reduced schedule | exchange autoscale backwards",
    ),
    ("ds_fp8.zero_fp8.offload", "sizes"),
    (
        "ds_fp8.zero_fp8.states",
        "shard | residence | host_sweep ring choice | arena visits | host_memory lanes",
    ),
    ("ds_fp8.zero_fp8", "health | product_health"),
    ("ds_fp8.zero_fp8.comm", "replicas | collectives | agreement | groups"),
    ("ds_fp8.zero_fp8.placement", "parameters even_slices | messages partition | ranks"),
    ("ds_fp8.zero_fp8", "plain_tensors recipe"),
    ("ds_fp8.ops", "op_builders product_backend | backend"),
    ("ds_fp8.ops.hopper", "functions | build"),
    ("ds_fp8.ops.triton.products", "runs | casts weights | scales"),
    (
        "ds_fp8.ops.triton",
        "per_tensor quantize_many | adam reduction blocks | masters moments | rounding | launching tiles",
    ),
    ("ds_fp8.ops.cpu", "weight_tiles | kernels | build structures threads"),
    (
        "ds_fp8.ops",
        "fp8_sum per_tensor cublas | guards cublas_lt | weight_runs adam reduction products | "
        "masters moments exact | rounding blocks | health | capture formats",
    ),
    ("ds_fp8.config", "ds_config | auto offload parsing | optimizer_params rules section | rule_kinds"),
    ("ds_fp8", "compat"),
    ("ds_fp8.config", "refusals"),
)


def layers() -> list[list[str]]:
    """Modules that may not import each other, the highest first."""
    return [
        [room if name == "." else f"{room}.{name}" for name in part.split()]
        for room, parts in ROOMS
        for part in parts.split("|")
    ]


HEIGHT = {module: -depth for depth, layer in enumerate(layers()) for module in layer}

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
    if within(importer, "ds_fp8.ops") and importer != "ds_fp8.ops.op_builders":
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


def dotted_name(home: str, path: Path) -> str:
    parts = path.relative_to(HOMES[home]).with_suffix("").parts
    return ".".join((home, *parts)).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    """Every module of the package but the package itself, which loads its names on demand."""
    links = {ROOT / "ds_fp8" / name for name in OWN_ROOTS}
    paths = {
        dotted_name(home, path): path
        for home, folder in HOMES.items()
        for path in folder.rglob("*.py")
        if not links & set(path.parents)
    }
    del paths["ds_fp8"]
    return paths


MODULES = modules()
# Packages are leaves: they import nothing, but for those that have a layer.
PACKAGES = {"ds_fp8", "ds_fp8.configs"} | {
    name for name, path in MODULES.items() if path.stem == "__init__" and name not in HEIGHT
}


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
        (
            "ds_fp8.ops.adam",
            "from ds_fp8.zero_fp8.placement.partition import Piece",
            "ops imports from ops only",
        ),
        ("ds_fp8.ops.blocks", "from ds_fp8.config.parsing import parse", "ops imports from ops only"),
        ("ds_fp8.ops.blocks", "from ds_fp8.ops import adam", "not a layer below"),
        ("ds_fp8.ops.formats", "import ds_fp8.ops.blocks", "not a layer below"),
        ("ds_fp8.ops.rounding", "from ds_fp8.ops.blocks import encode", "not a layer below"),
        ("ds_fp8.ops.adam", "from deepspeed import comm as dist", "ops knows no DeepSpeed"),
        ("ds_fp8.ops.adam", "def f():\n    import deepspeed", "ops knows no DeepSpeed"),
        (
            "ds_fp8.zero_fp8.placement.partition",
            "from ds_fp8.zero_fp8.comm import groups",
            "not a layer below",
        ),
        (
            "ds_fp8.zero_fp8.comm.collectives",
            "from ds_fp8.zero_fp8.states.shard import Shard",
            "not a layer below",
        ),
        (
            "ds_fp8.zero_fp8.comm.collectives",
            "def f():\n    from ds_fp8.seam import engine",
            "not a layer below",
        ),
        (
            "ds_fp8.zero_fp8.handlers.stage12",
            "from ds_fp8 import register",
            "neither a module nor __version__",
        ),
        (
            "ds_fp8.zero_fp8.handlers.stage12",
            "import ds_fp8\nds_fp8.register()",
            "neither a module nor __version__",
        ),
        ("ds_fp8.config.section", "from ds_fp8.ops.formats import BY_NAME", "not a layer below"),
        ("ds_fp8.zero_fp8", "from ds_fp8.zero_fp8.handlers import stage12", "not a layer below"),
        ("ds_fp8.seam.engine", "from deepspeed.runtime.engine import DeepSpeedEngine", "private name"),
        ("ds_fp8.seam.engine", "from deepspeed import runtime", "private name"),
        ("ds_fp8.seam.engine", "import deepspeed.utils.timer", "private name"),
        ("ds_fp8.seam.engine", "import deepspeed\nx = deepspeed.runtime.engine", "private name"),
        ("ds_fp8.seam.engine", "from ops.adam import adam_step", "another package"),
        ("ds_fp8.seam.engine", "import zero_fp8", "another package"),
        ("ds_fp8.seam.engine", "from . import memory", "relative"),
        ("ds_fp8.seam.engine", "from .zero_fp8 import handler", "relative"),
    ],
)
def test_a_planted_import_is_caught(importer: str, source: str, why: str) -> None:
    found = violations(importer, source)
    assert found, f"{source!r} went unnoticed"
    assert why in found[0]


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("ds_fp8.seam.engine", "import ds_fp8\nfrom ds_fp8.estimate import memory\nx = ds_fp8.__version__"),
        ("ds_fp8.zero_fp8.handlers.stage12", "from ds_fp8 import __version__"),
        ("ds_fp8.zero_fp8.comm.collectives", "from deepspeed import comm as dist\nimport deepspeed"),
        ("ds_fp8.compat", "from deepspeed.runtime.engine import DeepSpeedEngine"),
        ("ds_fp8.ops.adam", "import torch\nfrom ds_fp8.ops import blocks"),
        ("ds_fp8.seam.engine", "self.ds_fp8.enabled"),
    ],
)
def test_what_is_allowed_is_not_caught(importer: str, source: str) -> None:
    assert violations(importer, source) == []
