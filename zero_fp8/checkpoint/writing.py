"""Writing with torch.save, so that a failure says which file and why."""

from pathlib import Path
from typing import Any

import torch

from ds_fp8.zero_fp8.checkpoint.manifest import naming


def save(state: Any, path: str | Path) -> None:
    """Raises OSError as the file system gives it, else ValueError, each with the file's name.

    Through a file of Python's: torch's own writer knows neither the file nor the reason.
    """
    try:
        with naming(Path(path)), open(path, "wb") as file:
            torch.save(state, file)
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise ValueError(f"{path}: not written: {type(error).__name__}: {error}") from error
        if cause.filename is None:
            cause.filename = str(path)
        raise cause from None


def _os_error(error: BaseException | None) -> OSError | None:
    """What the file system said; torch's writer, closing the file, covers it with an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
