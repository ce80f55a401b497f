"""Files of torch.save, read and written so that a failure names the file and the reason.

**Reading.** torch.load fails in as many ways as there are broken files, and a file that loads may hold
anything. So a file comes through `load_plain` or `load_pickled`, and what is in it through `Entry`, which
says where a value lies and refuses what it should not be: a wrong file, key, type or length is a ValueError.

**Writing.** `save` writes one file; `new_folder` is a folder that appears as a whole or not at all.
"""

import copy
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fp8.zero_fp8.checkpoint import tags
from ds_fp8.zero_fp8.checkpoint.manifest import errors_named

NOT_PLAIN = "holds more than tensors and plain values, and is not unpickled"
SHOWN = 80  # characters of a value in a message


# Reading


def load_plain(path: Path, classes: Sequence[type] = ()) -> dict[str, Any]:
    """A file of tensors, plain values and some classes, mapped. Raises ValueError for any other."""
    with torch.serialization.safe_globals(list(classes)):
        return _dict(path, load_any(path))


def load_pickled(path: Path) -> dict[str, Any]:
    """A file that may hold objects, whose code it runs. Raises ValueError if it cannot be read."""
    return _dict(path, load_any(path, weights_only=False))


def _dict(path: Path, loaded: Any) -> dict[str, Any]:
    content: dict[str, Any] = Entry(path, loaded).of(dict)
    return content


def load_any(path: Path, *, weights_only: bool = True) -> Any:
    """Load a file of torch.save, mapped into memory. Raises ValueError if it cannot be read."""
    try:
        mapped = zipfile.is_zipfile(path)  # files of an old torch are not
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=weights_only)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception as error:  # what unpickling raises is up to the file
        if weights_only and isinstance(error, pickle.UnpicklingError) and path.stat().st_size:
            raise ValueError(f"{path}: {NOT_PLAIN}") from error
        why = str(error).partition("\n")[0] or "an empty file or one cut short"
        raise ValueError(
            f"{path}: not a file that torch.save wrote, or damaged: {type(error).__name__}: {why}"
        ) from error


def in_memory(value: Any) -> Any:
    """A copy of what was read, whatever holds its tensors: none is mapped, none part of a graph."""
    return copy.deepcopy(value)


@dataclass(frozen=True)
class Entry:
    """A value in a file, and where it lies."""

    path: Path
    value: Any
    where: str = ""  # keys and indices that lead to it

    def refusal(self, expected: str) -> ValueError:
        place = f"{self.path}: {self.where}" if self.where else f"{self.path}"
        return ValueError(f"{place}: received {show(self.value)}, expected {expected}")

    def of(self, *kinds: type) -> Any:
        """The value, which is of one of these types; a bool is no number."""
        if not isinstance(self.value, kinds) or (isinstance(self.value, bool) and bool not in kinds):
            raise self.refusal(" or ".join(kind.__name__ for kind in kinds))
        return self.value

    def at(self, key: Any) -> "Entry":
        """An entry of a dict or a list."""
        place = f"{self.where}.{key}" if self.where else str(key)
        holder = self.of(*((dict,) if isinstance(key, str) else (dict, list, tuple)))
        try:
            return Entry(self.path, holder[key], place)
        except (KeyError, IndexError):
            raise ValueError(f"{self.path}: {place}: missing") from None

    def __contains__(self, key: Any) -> bool:
        return key in self.of(dict)

    def each(self, count: int | None = None) -> Iterator["Entry"]:
        """The entries of a list, which has `count` of them."""
        length = len(self.of(list, tuple))
        if count is not None and length != count:
            raise ValueError(f"{self.path}: {self.where}: received {length} entries, expected {count}")
        return (self.at(index) for index in range(length))

    def number(self) -> float:
        """A finite number, or a tensor of one."""
        value = self.value
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal("a finite number")
        return value

    def count(self) -> int:
        """A whole number, 0 or more."""
        value = self.number()
        if value < 0 or value != int(value):
            raise self.refusal("a whole number, 0 or more")
        return int(value)

    def floats(self) -> Tensor:
        """A tensor of floating-point numbers."""
        if not isinstance(self.value, Tensor) or not self.value.is_floating_point():
            raise self.refusal("a tensor of floating-point numbers")
        return self.value.detach()


def show(value: Any) -> str:
    """A value in a message: a short one itself, a container by its type, a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return f"a {type(value).__name__}"


# Writing


def save(state: Any, path: str | Path) -> None:
    """Raises OSError as the file system gives it, else ValueError, each with the file's name.

    Through a file of Python's: torch's own writer knows neither the file nor the reason.
    """
    try:
        with errors_named(Path(path)), open(path, "wb") as file:
            torch.save(state, file)
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise ValueError(f"{path}: not written: {type(error).__name__}: {error}") from error
        if cause.filename is None:
            cause.filename = str(path)
        raise cause from None


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the file system, which torch's writer hides behind an error of its own on closing."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into; it is renamed to `folder` if all goes well, else removed.

    Raises ValueError if `folder` exists, or has a name that another file beside it may have.
    """
    if allowed := tags.objection(folder.name):
        raise ValueError(f"{folder}: allowed: {allowed}")
    if os.path.lexists(folder):
        raise ValueError(f"{folder}: exists, allowed: the name of a new folder")
    temporary = folder.with_name(folder.name + tags.SAVING)
    if os.path.lexists(temporary) and not tags.is_saving(temporary):
        raise ValueError(f"{temporary}: not what writing {folder.name} has left: move it away")
    tags.begin(temporary)
    try:
        yield temporary
        tags.beginning(temporary).unlink()
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
