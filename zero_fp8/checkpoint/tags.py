"""Folders of tags, and the file `latest`: at any moment one of them holds a whole checkpoint.

A tag is written into a folder beside its own, `<tag>.saving`, the manifest last. Then it takes the tag's
place: the old folder is moved into `<tag>.replaced`, the new one renamed, `latest` replaced, and only then
the old one deleted. A crash between the two renames leaves the new folder whole under its first name, where
`find` looks for it.

Whatever is removed is known to be ours. `<tag>.saving` holds a manifest or the beginning of one, and
`<tag>.replaced` nothing but the folder that was moved there; a folder of that name that holds anything else
is somebody's tag, and the save is refused. What users have put into a tag's folder moves on into its
successor.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from ds_fp8.zero_fp8.checkpoint import manifest
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest, errors_named

SAVING = ".saving"
REPLACED = ".replaced"
NEW = ".new"
OLD = "ds_fp8_replaced"  # the old folder, in `<tag>.replaced`
LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
POINTERS = (LATEST, LATEST_UNIVERSAL)
# Names beside the tags that have another meaning, DeepSpeed's scripts among them.
RESERVED = (
    *(name + end for name in (*POINTERS, manifest.NAME) for end in ("", NEW)),
    "zero_to_fp32.py",
    "zero_to_torch.py",
)
ENDINGS = ("_model_states.pt", "_optim_states.pt")  # how the names of a tag's files end
LONGEST = 255  # bytes of a name in a file system
SHOWN = 5  # names in a message


# Names


def objection(name: str) -> str | None:
    """Which names are allowed, if this one could be confused with other tags or `latest`; else None."""
    if not name or name in (".", "..") or "/" in name or os.sep in name:
        return "the name of a folder in the save folder, not a path"
    if name != name.strip() or not name.isprintable():
        return "a name without spaces at its ends, line breaks and control characters"
    if name in RESERVED:
        return f"any name but {', '.join(RESERVED)}"
    if name.endswith((SAVING, REPLACED)):
        return f"a name that does not end in {SAVING} or {REPLACED}, where tags are on their way"
    if len(name.encode()) + len(REPLACED) > LONGEST:
        return f"a name of at most {LONGEST - len(REPLACED)} bytes"
    return None


def contents(folder: Path) -> str:
    """The contents of a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"holds {', '.join(names[:SHOWN])}{more}" if names else "is empty"


# Saving


def clear_leftovers(folder: Path, tag: str, *, latest: bool) -> Path:
    """Before a tag is written: finish or clear what a crash has left of it; the folder to write into.

    Raises ValueError, before anything is changed, if the save would remove or hide what is not its own.
    """
    if allowed := objection(tag):
        raise ValueError(f"tag: received {tag[:200]!r}, allowed: {allowed}")
    saving, target, replaced = _folders(folder, tag)
    _check_target(target)
    _check_leftovers(folder, tag)
    if latest and (folder / LATEST).is_dir():
        raise ValueError(f"{folder / LATEST}: a folder, expected a file with the name of a tag, or none")
    folder.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        _finish(saving, target, replaced)
    _drop(replaced, target)
    return begin(saving)


def _check_target(target: Path) -> None:
    if target.is_symlink():
        raise ValueError(f"{target}: a link, expected a folder or nothing under the name of a tag")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: a file, expected a folder or nothing under the name of a tag")


def _check_leftovers(folder: Path, tag: str) -> None:
    """Refuse, by a ValueError, a folder on the way of a save that no save of the tag has left."""
    saving, _, replaced = _folders(folder, tag)
    for leftover, ours in ((saving, is_saving(saving)), (replaced, _is_replaced(replaced))):
        if os.path.lexists(leftover) and (not ours or leftover.name == _pointed(folder)):
            raise ValueError(
                f"{leftover}: not what a save of {tag} has left: move it away, or save under another tag"
            )


def publish(folder: Path, tag: str, written: Manifest, *, latest: bool) -> None:
    """Finish the tag that was written to its saving folder."""
    saving, target, replaced = _folders(folder, tag)
    write(saving / manifest.NAME, manifest.render(written))
    moved = target.exists()
    if moved:
        replaced.mkdir(exist_ok=True)
        os.rename(target, replaced / OLD)
    try:
        os.rename(saving, target)
    except OSError:
        if moved:
            os.rename(replaced / OLD, target)
        raise
    _sync(folder)
    try:
        if latest:
            point(folder / LATEST, tag)
    finally:
        _drop(replaced, target)


def give_up(folder: Path, tag: str) -> None:
    """After a save that failed: clear what it has written, as far as that can be done."""
    saving, target, replaced = _folders(folder, tag)
    if target.exists() or not (saving / manifest.NAME).exists():
        _clear(saving)
    with suppress(OSError):
        if not target.exists():
            _finish(saving, target, replaced)
        if _is_replaced(replaced):
            _drop(replaced, target)


def _finish(saving: Path, target: Path, replaced: Path) -> None:
    """A tag that is not in its place takes it: the new one if it is whole, else the old one."""
    for folder, whole in ((saving, (saving / manifest.NAME).exists()), (replaced / OLD, True)):
        if whole and folder.is_dir():
            os.rename(folder, target)
            return


def _folders(folder: Path, tag: str) -> tuple[Path, Path, Path]:
    return folder / (tag + SAVING), folder / tag, folder / (tag + REPLACED)


def begin(saving: Path) -> Path:
    """An empty folder that is known as ours by the beginning of a manifest."""
    _clear(saving)
    saving.mkdir(parents=True)
    beginning(saving).touch()
    return saving


def _clear(saving: Path) -> None:
    """Remove such a folder; what it is known by goes last."""
    others = [path for path in _members(saving) if not path.name.startswith(manifest.NAME)]
    for path in others:
        with suppress(OSError):
            path.unlink()
    shutil.rmtree(saving, ignore_errors=True)


def _members(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def beginning(saving: Path) -> Path:
    """The temporary file that becomes the manifest."""
    return saving / (manifest.NAME + NEW)


def is_saving(saving: Path) -> bool:
    """Whether a folder was made by `begin`, or only just."""
    return saving.is_dir() and (
        beginning(saving).exists() or (saving / manifest.NAME).exists() or not any(saving.iterdir())
    )


def _is_replaced(replaced: Path) -> bool:
    return replaced.is_dir() and {path.name for path in replaced.iterdir()} <= {OLD}


def _drop(replaced: Path, target: Path) -> None:
    """Delete a tag whose successor has taken its place; what is not the checkpoint's moves there."""
    old = replaced / OLD
    if old.is_dir() and not old.is_symlink():
        listed = manifest.listed(old)
        # By their names, if no manifest lists the files of the tag.
        endings = (manifest.NAME + NEW, *(ENDINGS if listed == {manifest.NAME} else ()))
        for path in old.iterdir():
            theirs = path.name not in listed and not path.name.endswith(endings)
            if theirs and not os.path.lexists(target / path.name):
                os.rename(path, target / path.name)
    shutil.rmtree(replaced, ignore_errors=True)


def _pointed(folder: Path) -> str:
    """The tag in `latest`, or ""."""
    path = folder / LATEST
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


# Loading


def find(folder: Path, tag: str | None, latest: str = LATEST) -> str | None:
    """The name of the folder that holds a tag, by default that which `latest` names; None without it.

    Raises ValueError for a `latest` that names no tag, and if no folder holds the tag.
    """
    origin = ""
    if tag is None:
        path = folder / latest
        if not os.path.lexists(path):
            return None
        tag, origin = _read(path), f" (named by {path})"
    if (folder / tag).is_dir():
        if not any((folder / tag).iterdir()):
            raise ValueError(f"{folder / tag}: an empty folder{origin}, expected the files of a checkpoint")
        return tag
    if (folder / (tag + SAVING) / manifest.NAME).exists():
        return tag + SAVING
    kind = "a file, not a folder" if (folder / tag).exists() else "no such folder"
    raise ValueError(f"{folder / tag}: {kind}{origin}; {_tags_in(folder)}")


def _read(path: Path) -> str:
    """The tag in `latest`."""
    if not path.is_file():
        raise ValueError(f"{path}: {_kind(path)}, expected a file with the name of a tag")
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    if not tag:
        raise ValueError(f"{path}: empty, expected the name of a tag; {_tags_in(path.parent)}")
    if not tag.isprintable() or len(tag.encode()) > LONGEST:
        raise ValueError(
            f"{path}: received {tag[:200]!r}, expected the name of a tag; {_tags_in(path.parent)}"
        )
    return tag


def _kind(path: Path) -> str:
    if path.is_dir():
        return f"a folder that {contents(path)}"
    return "a link that leads nowhere" if path.is_symlink() else "no file"


def _tags_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor is there {folder}"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _looks_whole(path))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"there are {', '.join(names[:SHOWN])}{more}" if names else f"{folder} {contents(folder)}"


def _looks_whole(folder: Path) -> bool:
    return any(path.name == manifest.NAME or path.name.endswith(ENDINGS) for path in folder.iterdir())


# Files


def point(latest: Path, tag: str) -> None:
    """Let `latest` or `latest_universal` name a tag."""
    try:
        write(latest, tag)
    except OSError:
        with suppress(OSError):
            latest.with_name(latest.name + NEW).unlink()
        raise


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, and bring it to the disk."""
    new = path.with_name(path.name + NEW)
    with errors_named(path), open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
