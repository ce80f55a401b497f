"""The manifest: its versions, the files of a place, and that no file's name is made from a rank."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from foreign_files import MODEL, STATES
from safetensors.torch import load_file
from test_layers import MODULES
from test_mutations import sealed

from ds_fp8.cli import main
from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.manifest import FORMAT_VERSION, Manifest

TAGS = Path(__file__).with_name("tags_v1")
KEPT = sorted(path.name for path in TAGS.iterdir())
PLACE_KEYS = ("parameters", "module", "frozen")


def first_version(name: str = "O2") -> dict[str, Any]:
    """What a tag of version 1 says, without the checksum."""
    said: dict[str, Any] = json.loads((TAGS / name / manifest.NAME).read_text())
    assert said.pop("sha256")
    return said


def second_version() -> dict[str, Any]:
    said: dict[str, Any] = json.loads(read(first_version()).model_dump_json())
    return said


def read(said: dict[str, Any]) -> Manifest:
    return manifest.parse(sealed(said), Path("tag", manifest.NAME))


@pytest.mark.parametrize("name", KEPT)
def test_version_1_becomes_one_place_with_the_files_of_its_ranks(name: str) -> None:
    said, found = first_version(name), read(first_version(name))
    assert said["format_version"] == 1
    assert found.format_version == FORMAT_VERSION == 2
    assert [place.model_file for place in found.places] == [MODEL]
    assert found.places[0].optimizer_files == [STATES.format(rank) for rank in range(said["world_size"])]
    now = json.loads(found.model_dump_json())
    said["recipe"]["draws"] = "independent"
    for key in said.keys() - {"format_version", *PLACE_KEYS}:
        assert now[key] == said[key], key
    for each in said["parameters"].values():
        each["codes_of"] = None
    for key in PLACE_KEYS:
        assert now["places"][0][key] == said[key], key
    assert manifest.parse(manifest.render(found), Path("x")) == found


def test_version_1_of_a_node_names_the_files_of_other_nodes() -> None:
    said = first_version()
    del said["files"][STATES.format(0)]
    assert read(said).places[0] == read(first_version()).places[0]


@pytest.mark.parametrize("version", [0, 3, 10, 12])
def test_another_version_is_refused(version: int) -> None:
    with pytest.raises(
        ValueError, match=f"tag/{manifest.NAME}: format_version: received {version}, allowed: 1, 2$"
    ):
        read({**second_version(), "format_version": version})


@pytest.mark.parametrize("index", [-1, 2, 7])
@pytest.mark.parametrize("version", [1, 2])
def test_blocks_in_a_file_that_is_not_listed_are_refused(version: int, index: int) -> None:
    said = first_version() if version == 1 else second_version()
    parameters = (said if version == 1 else said["places"][0])["parameters"]
    parameters["weights.0"]["blocks"][1][0] = index
    with pytest.raises(ValueError, match=f"blocks of weights.0: received optimizer file {index}, expected"):
        read(said)


def test_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match=f"tag/{manifest.NAME}: places: List should have at"):
        read({**second_version(), "places": []})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("key", ["steps", "parameters", "files", "world_size"])
def test_what_is_missing_is_named(version: int, key: str) -> None:
    said = first_version() if version == 1 else second_version()
    owner = said["places"][0] if version == 2 and key in PLACE_KEYS else said
    del owner[key]
    with pytest.raises(ValueError, match=rf"tag/{manifest.NAME}: [a-z0-9.]*{key}: Field required"):
        read(said)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("files", [1, 2, 3, 4])
def test_every_file_is_one_ranks_to_check(world_size: int, files: int) -> None:
    of_ranks = [[f"{kind} {letter}.pt" for letter in "dacb"[:files]] for kind in ("states", "model")]
    names = ["model.pt", *of_ranks[0], *of_ranks[1], "notes"]
    shares = [
        manifest.share(names, of_ranks, rank, world_size, first=rank == 0) for rank in range(world_size)
    ]
    assert sorted(name for share in shares for name in share) == sorted(names)
    for each in of_ranks:
        for index, name in enumerate(each):
            assert name in shares[index % world_size]


@pytest.mark.parametrize("name", KEPT)
def test_the_commands_read_version_1(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tag = shutil.copytree(TAGS / name, tmp_path / "tag")
    main(["inspect", str(tag)])
    assert "every size and checksum is right" in capsys.readouterr().out
    main(["export", str(tag), str(tmp_path / "out")])
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "tag")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], expected[key]) for key in expected)
    main(["to-universal", str(tag), str(tmp_path / "universal")])
    assert (tmp_path / "universal" / MODEL).read_bytes() == (tag / MODEL).read_bytes()


# Names

# DeepSpeed's names of files: where they are recognised although no manifest lists them.
ALLOWED = {
    "ds_fp8.zero_fp8.checkpoint.foreign.stock_files": [
        "OPTIMIZER_FILE",
        "RANKS_MODEL_FILE",
        "MODEL_FILE",
        "FIRST_MODEL_FILE",
    ],
    "ds_fp8.zero_fp8.checkpoint.manifest": ["Version1"],
}
OF_A_RANK = re.compile(r"(mp|pp|dp|expp)_rank|rank_?(\(|\[|\\d|\{|\*|%)")
OF_A_FILE = re.compile(r"\.(pt|bin|safetensors|json)\b|_states")


def names_from_ranks(source: str, allowed: list[str]) -> list[str]:
    """Texts of a source that are, or make, a file's name with a rank in it; some definitions may."""
    found = []
    for node in ast.parse(source).body:
        names = {getattr(node, "name", None)} | {
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)
        }
        if not names & set(allowed):
            found += [text for part in ast.walk(node) for text in texts(part)]
    return found


def texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and OF_A_RANK.search(node.value):
        yield node.value
    values = []
    if isinstance(node, ast.JoinedStr):
        values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("format", "with_name", "glob"):
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
        values = [node.right, node.left]
    text = ast.unparse(node) if values else ""
    if OF_A_FILE.search(text) and any("rank" in ast.unparse(value) for value in values):
        yield text


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_name_of_a_file_is_made_from_a_rank(module: str) -> None:
    assert names_from_ranks(MODULES[module].read_text(), ALLOWED.get(module, [])) == []


@pytest.mark.parametrize(
    "source",
    [
        'MODEL_FILE = "mp_rank_00_model_states.pt"',
        'FILE = re.compile(r"zero_pp_rank_(\\d+)_mp_rank_00_optim_states\\.pt")',
        'def f(rank):\n    return f"states_of_{rank}.pt"',
        'def f(self):\n    return "{}_optim_states.pt".format(self.rank)',
        'def f(rank):\n    return "states%d.pt" % rank',
        'def f(rank):\n    return "states" + str(rank) + ".pt"',
        'def f(folder):\n    return folder.glob("mp_rank_*")',
        'class Other:\n    name = "rank_(.*)"',
    ],
)
def test_a_planted_name_is_caught(source: str) -> None:
    assert names_from_ranks(source, ["OPTIMIZER_FILE", "Version1"]), source


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ('OPTIMIZER_FILE = "mp_rank_00"', ["OPTIMIZER_FILE"]),
        ('class Version1:\n    name = "mp_rank_00"', ["Version1"]),
        ('f"rank {rank}: {error}"', []),
        ('f"{key}.pt"', []),
    ],
)
def test_what_is_allowed_is_not_caught(source: str, allowed: list[str]) -> None:
    assert names_from_ranks(source, allowed) == []
