"""What a checkpoint says of itself: one JSON file, written when every other file of the tag is there.

It holds the formats, where each parameter's blocks lie, the counters that a resumed run goes on from, and
size and SHA-256 of every file of the tag, DeepSpeed's too; its last key is a checksum of itself. So a tag
without a manifest was never finished, and a file that was damaged, cut, lost or swapped is found before it is
opened. Checksums catch accidents, not attackers: whoever can change a file can change its checksum.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

NAME = "ds_fp8_manifest.json"
FORMAT_VERSION: Literal[1] = 1
BUFFER = 1 << 20  # bytes read at a time
SEAL = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
OPTIMIZER_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt\Z")
MODEL_FILE = "mp_rank_00_model_states.pt"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class File(_Part):
    size: int
    sha256: str


class Recipe(_Part):
    """Formats of the states."""

    block_size: int
    master: str
    exp_avg: str
    exp_avg_sq: str
    seed: int
    scaling: str = "block"  # what has a scale; of "tensor" exp_avg_sq holds v itself


class Parameter(_Part):
    """A trained parameter, and who saved which of its blocks."""

    shape: list[int]
    dtype: str
    group: int  # param group of the optimizer
    blocks: list[tuple[int, int, int]]  # rank, first block, the one after its last


class Manifest(_Part):
    """A whole tag. Further keys are read over."""

    format_version: Literal[1]
    ds_fp8_version: str
    deepspeed_version: str
    zero_stage: int
    world_size: int
    global_steps: int
    recipe: Recipe
    steps: int
    clamp_squares: list[float | Literal["off"] | None]  # a param group; null: at its fixed point
    loss_scaler: dict[str, int | float]
    autoscale: dict[str, float] = {}  # mu of each parameter, where gradients are added in FP8
    scheduler: bool  # whether the model file holds a scheduler's state
    fp32_master: bool  # whether the optimizer files hold the view of zero_to_fp32.py
    parameters: dict[str, Parameter]
    module: dict[str, list[int] | None]  # shapes of the model file's other tensors; null: no tensor
    frozen: list[str] | None  # parameters that DeepSpeed saved as frozen
    files: dict[str, File]

    @property
    def optimizer_files(self) -> dict[int, str]:
        """Names of the optimizer files by the rank that wrote them."""
        found = {name: OPTIMIZER_FILE.search(name) for name in self.files}
        return {int(match[1]): name for name, match in found.items() if match}


def render(manifest: Manifest) -> str:
    """The file's text: JSON whose last key is the checksum of what stands before it."""
    body = manifest.model_dump_json(indent=1)
    return f'{body[:-2]},\n "sha256": "{_digest(body)}"\n}}\n'


def parse(text: str, path: Path) -> Manifest:
    """Raises ValueError for a text that `render` did not write."""
    seal = SEAL.search(text)
    if seal is None or _digest(text[: seal.start()] + "\n}") != seal[1]:
        raise ValueError(f"{path}: its checksum is not that of its text: damaged or cut short")
    version = re.search(r'"format_version": *(\d+)', text)
    if version is None or int(version[1]) != FORMAT_VERSION:
        received = version and version[1]
        raise ValueError(f"{path}: format_version: received {received}, allowed: {FORMAT_VERSION}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read(folder: Path) -> Manifest | None:
    """The manifest of a tag's folder, None where there is none. Raises ValueError for a damaged one."""
    path = folder / NAME
    try:
        return parse(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8: damaged") from None


def files_of(folder: Path) -> list[str]:
    """Names of the files that a manifest is to list: all but its own beginning."""
    return sorted(each.name for each in folder.iterdir() if not each.name.startswith(NAME))


def listed(folder: Path) -> set[str]:
    """Names of the files of a tag, as far as its manifest can be read; its own among them."""
    try:
        facts = read(folder)
    except ValueError:
        facts = None
    return {NAME, *(facts.files if facts is not None else ())}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as of a write, gets this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def seal(folder: Path, names: Iterable[str]) -> dict[str, File]:
    """Bring files to the disk, and what a manifest says of them."""
    sealed = {}
    for name in names:
        with naming(folder / name), open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        sealed[name] = File(size=(folder / name).stat().st_size, sha256=_digest_of(folder / name))
    return sealed


def verify(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Refuse, by a ValueError, files that are not those that were written; none is opened but as bytes."""
    for name in names:
        path, expected = folder / name, manifest.files.get(name)
        if expected is None:
            raise ValueError(f"{path}: not listed in {NAME}")
        if not path.is_file():
            raise ValueError(f"{path}: missing, but listed in {NAME}")
        if path.stat().st_size != expected.size:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, {expected.size} were written")
        if _digest_of(path) != expected.sha256:
            raise ValueError(f"{path}: its SHA-256 is not that in {NAME}: damaged, or of another checkpoint")


def share(names: Iterable[str], rank: int, world_size: int, *, first: bool) -> Sequence[str]:
    """The files whose checksums a rank computes: those that it wrote, as far as that is known.

    first: whether it is the first rank of those that share a folder; it takes the others'.
    """
    owners = {name: OPTIMIZER_FILE.search(name) for name in sorted(names)}
    return [
        name
        for name, match in owners.items()
        if (int(match[1]) % world_size == rank if match is not None else first)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BUFFER):
            digest.update(block)
    return digest.hexdigest()


def describe_difference(saved: Recipe, wanted: Recipe) -> list[str]:
    """What differs between two recipes, "key saved -> wanted" each."""
    theirs, ours = saved.model_dump(), wanted.model_dump()
    return [f"{key} {theirs[key]} -> {ours[key]}" for key in ours if theirs[key] != ours[key]]
