"""Folders of tags, and the file `latest`: at any moment one of them holds a whole checkpoint.

A tag is written into a folder beside its own, `<tag>.saving`, the manifest last. Then it takes the tag's
place: the old folder is renamed away, the new one renamed, `latest` replaced, and only then the old one
deleted. A crash between the two renames leaves the new folder whole under its first name, where `find`
looks for it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_fp8.zero_fp8 import manifest
from ds_fp8.zero_fp8.manifest import Manifest

SAVING = ".saving"
REPLACED = ".replaced"
LATEST = "latest"


def settle(folder: Path, tag: str) -> None:
    """Before a tag is written: finish or clear what a crash has left of it."""
    saving, target = folder / (tag + SAVING), folder / tag
    if not target.exists() and (saving / manifest.NAME).exists():
        os.rename(saving, target)
    for leftover in (saving, folder / (tag + REPLACED)):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(folder: Path, tag: str, facts: Manifest, *, latest: bool) -> None:
    """Finish the tag that was written to its saving folder."""
    saving, target, replaced = folder / (tag + SAVING), folder / tag, folder / (tag + REPLACED)
    write(saving / manifest.NAME, manifest.render(facts))
    if target.exists():
        os.rename(target, replaced)
    os.rename(saving, target)
    _sync(target.parent)
    if latest:
        write(folder / LATEST, tag)
    shutil.rmtree(replaced, ignore_errors=True)


def find(folder: Path, tag: str | None, latest: str = LATEST) -> str | None:
    """The name of the folder that holds a tag, by default that which `latest` names; None without it.

    Raises ValueError for an empty `latest` and where no folder holds the tag.
    """
    origin = ""
    if tag is None:
        path = folder / latest
        if not path.is_file():
            return None
        origin = f" (named by {path})"
        tag = path.read_text(encoding="utf-8", errors="replace").strip()
        if not tag:
            raise ValueError(f"{path}: empty, expected the name of a tag")
    if (folder / tag).is_dir():
        return tag
    if (folder / (tag + SAVING) / manifest.NAME).exists():
        return tag + SAVING
    raise ValueError(f"{folder / tag}: no such folder{origin}")


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name of `folder` when all is written.

    Raises ValueError where `folder` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists, allowed: the name of a new folder")
    saving = folder.with_name(folder.name + SAVING)
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    yield saving
    os.rename(saving, folder)


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, and bring it to the disk."""
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
