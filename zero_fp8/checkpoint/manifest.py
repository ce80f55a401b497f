"""The manifest of a checkpoint: one JSON file, written after every other file of the tag.

It holds the formats, which file holds which blocks of each parameter, the counters from which a resumed
run continues, and size and SHA-256 of every file of the tag, DeepSpeed's too; its last key is a checksum of
itself. So a tag without a manifest was never finished, and a file that was damaged, cut, lost or swapped is
found before it is opened. Checksums catch accidents, not attackers, who can change a checksum
with its file.

**Places.** A place is the set of files of one model-parallel rank, in the order of these ranks; without
model parallelism there is one. Files have the names under which DeepSpeed wrote them; no name is made from a
rank, and no rank is read from a name.
Version 1 named ranks instead of files; `parse` turns it into the same object.

**Slices.** Under ZeRO 3 every rank writes a model file, whose module has buffers and empty parameters.
Trained weights follow from the optimizer files; of frozen ones the manifest says which file holds what.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ds_fp8.zero_fp8.placement.ranks import turn_of

NAME = "ds_fp8_manifest.json"
FORMAT_VERSION: Literal[2] = 2
BUFFER = 1 << 20  # bytes read at a time
SEAL = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')


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
    draws: str = "independent"  # of stochastic rounding, from step to step
    scaling: str = "block"  # what has a scale; of "tensor" exp_avg_sq holds v itself


class Parameter(_Part):
    """A trained parameter, and which file holds which of its blocks."""

    shape: list[int]
    dtype: str
    group: int  # param group of the optimizer
    codes_of: str | None = None  # class of the module that multiplies its E4M3 codes, which masters decide
    blocks: list[tuple[int, int, int]]  # index of an optimizer file, first block, the one after its last


class Sliced(_Part):
    """A frozen parameter in slices, and which file holds which of its elements."""

    shape: list[int]
    slices: list[tuple[int, int, int]]  # index of a model file, first element, the one after its last


class Place(_Part):
    """The files of one model-parallel rank, and what they hold."""

    model_file: str
    model_files: list[str] | None = None  # under ZeRO 3, in the order of the ranks that wrote them
    optimizer_files: list[str]  # in the order of the ranks that wrote them
    parameters: dict[str, Parameter]
    module: dict[str, list[int] | None]  # shapes of the module's other tensors; null: no tensor
    frozen: list[str] | None  # parameters that DeepSpeed saved as frozen
    sliced: dict[str, Sliced] = {}  # of those, under ZeRO 3
    # Tensors of which places have parts: the dimension along which these follow each other; null: not known.
    cuts: dict[str, int | None] = {}

    @model_validator(mode="after")
    def _check_files(self) -> "Place":
        for name, parameter in self.parameters.items():
            _check_indices(f"blocks of {name}", parameter.blocks, "optimizer", len(self.optimizer_files))
        for name, sliced in self.sliced.items():
            _check_indices(f"slices of {name}", sliced.slices, "model", len(self.model_files or ()))
        return self

    @property
    def has_whole_weights(self) -> bool:
        """Whether the model file has them, as of ZeRO 1 and 2."""
        return self.model_files is None


def _check_indices(what: str, parts: Iterable[tuple[int, int, int]], kind: str, count: int) -> None:
    for index, _, _ in parts:
        if not 0 <= index < count:
            details = {"what": what, "kind": kind, "index": index, "count": count}
            text = "{what}: received {kind} file {index}, expected one of {count}"
            raise PydanticCustomError("unlisted_file", text, details)


class Manifest(_Part):
    """The manifest of a whole tag. Unknown keys are ignored."""

    format_version: Literal[2]
    ds_fp8_version: str
    deepspeed_version: str
    zero_stage: int
    world_size: int
    global_steps: int
    recipe: Recipe
    steps: int
    clamp_squares: list[float | Literal["off"] | None]  # one per param group; null: at its fixed point
    loss_scaler: dict[str, int | float]
    autoscale: dict[str, float] = {}  # mu of each parameter, where gradients are added in FP8
    scheduler: bool  # whether the model file holds a scheduler's state
    fp32_master: bool  # whether the optimizer files hold the view of zero_to_fp32.py
    weights: Literal["codes", "masters"] = "codes"  # what model files hold of parameters with codes
    places: Annotated[list[Place], Field(min_length=1)]
    files: dict[str, File]  # on storage of a node, those of the node

    @property
    def of_ranks(self) -> list[list[str]]:
        """The files of which every rank has written one, in the order of the ranks, place after place."""
        states = [name for place in self.places for name in place.optimizer_files]
        return [states, [name for place in self.places for name in place.model_files or ()]]

    @property
    def coded(self) -> set[str]:
        """Parameters of which model files hold no more than codes say."""
        every = [item for place in self.places for item in place.parameters.items()]
        encoded = {name for name, each in every if each.codes_of}
        return encoded if self.weights == "codes" else set()


class Version1(_Part):
    """A manifest of version 1: blocks name the rank that wrote them, as DeepSpeed's file names do."""

    model_config = ConfigDict(extra="allow")

    world_size: int
    parameters: dict[str, Parameter]  # their blocks: rank, first block, the one after its last
    module: dict[str, list[int] | None]
    frozen: list[str] | None
    files: dict[str, File]

    def converted(self) -> Manifest:
        place = Place(
            model_file="mp_rank_00_model_states.pt",
            optimizer_files=self._optimizer_files(),
            parameters=self.parameters,
            module=self.module,
            frozen=self.frozen,
        )
        unchanged = self.model_dump(exclude={"parameters", "module", "frozen"})
        return Manifest.model_validate({**unchanged, "format_version": FORMAT_VERSION, "places": [place]})

    def _optimizer_files(self) -> list[str]:
        """Optimizer files of all ranks; on node-local storage `files` lists only the node's."""
        ending = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        pattern = re.compile(ending.format(r"\d+") + r"\Z")
        prefix = next((pattern.sub("", name) for name in self.files if pattern.search(name)), "")
        return [prefix + ending.format(rank) for rank in range(self.world_size)]


def render(manifest: Manifest) -> str:
    """The file's text: JSON whose last key is the checksum of what stands before it."""
    body = manifest.model_dump_json(indent=1)
    return f'{body[:-2]},\n "sha256": "{_digest(body)}"\n}}\n'


def parse(text: str, path: Path) -> Manifest:
    """Raises ValueError for a text that `render` did not write, in this version or the first."""
    seal = SEAL.search(text)
    if seal is None or _digest(text[: seal.start()] + "\n}") != seal[1]:
        raise ValueError(f"{path}: its checksum is not that of its text: damaged or cut short")
    version = re.search(r'"format_version": *(\d+)', text)
    received = version and int(version[1])
    try:
        if received == 1:
            return Version1.model_validate_json(text).converted()
        if received == FORMAT_VERSION:
            return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = [".".join(map(str, first["loc"])), first["msg"]]
        raise ValueError(": ".join([str(path), *filter(None, where)])) from None
    raise ValueError(f"{path}: format_version: received {received}, allowed: 1, {FORMAT_VERSION}")


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
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(NAME))


def listed(folder: Path) -> set[str]:
    """Names of the files of a tag, as far as its manifest can be read; its own among them."""
    try:
        manifest = read(folder)
    except ValueError:
        manifest = None
    return {NAME, *(manifest.files if manifest is not None else ())}


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """An OSError that names no file, as of a write, gets this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def seal(folder: Path, names: Iterable[str]) -> dict[str, File]:
    """Bring files to the disk, and return what a manifest says of them."""
    sealed = {}
    for name in names:
        with errors_named(folder / name), open(folder / name, "rb") as file:
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
            raise ValueError(
                f"{path}: SHA-256 does not match {NAME}; the file is damaged or belongs to another checkpoint"
            )


def share(
    names: Iterable[str], of_ranks: Iterable[Sequence[str]], rank: int, world_size: int, *, first: bool
) -> list[str]:
    """The files whose checksums a rank computes: of as many ranks as there are files, each its own.

    of_ranks: as in `Manifest`. first: whether the rank is the first of those that share a folder, which takes
    all other files.
    """
    owners = {name: turn_of(index, world_size) for files in of_ranks for index, name in enumerate(files)}
    return [name for name in sorted(names) if (owners[name] == rank if name in owners else first)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BUFFER):
            digest.update(block)
    return digest.hexdigest()


def describe_difference(saved: Recipe, wanted: Recipe) -> list[str]:
    """The differences between two recipes, each as "key saved -> wanted"."""
    before, after = saved.model_dump(), wanted.model_dump()
    return [f"{key} {before[key]} -> {after[key]}" for key in after if before[key] != after[key]]
