"""`launches.cpp`, compiled with torch's headers on first use and kept: a minute, once on a machine.

It lies under the digest of its source, torch and the compiler's flags. The processes of a node come here at
once: the first to lock builds, the others find its result.
"""

import functools
import hashlib
import logging
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.utils import cpp_extension

from ds_fp8.ops.cpu.build import extensions, is_whole, write_digest

logger = logging.getLogger("ds_fp8")

SOURCE = Path(__file__).resolve().with_name("launches.cpp")
FLAGS = ("-O2", "-std=c++20")
PATIENCE = 600.0  # seconds to wait for another process's build


@functools.cache
def load() -> str | None:
    """Load the library, which makes `torch.ops.ds_fp8_launches`; why there is none, or None."""
    folder = folder_of()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "build.lock", timeout=PATIENCE):
            (folder / "lock").unlink(missing_ok=True)  # torch's own, of a build that was killed
            _build(folder)
    except Timeout:
        return f"another process has held the lock {folder / 'build.lock'} for {PATIENCE:.0f} s"
    except (OSError, RuntimeError) as error:
        return f"{SOURCE.name} cannot be compiled in {folder}: {str(error).splitlines()[0]}"
    return None


def folder_of() -> Path:
    """Where the library of this source and this torch lies, built or not."""
    digest = hashlib.sha256(repr((FLAGS, torch.__version__, SOURCE.read_bytes())).encode()).hexdigest()
    return extensions() / "ds_fp8_launches" / digest[:16]


def _build(folder: Path) -> None:
    """Load, and build before if it is not there whole; say so as a warning, seen without a log set up."""
    library, began = folder / "ds_fp8_launches.so", time.monotonic()
    if is_whole(library):
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        return
    library.unlink(missing_ok=True)  # of a build that was cut off, which ninja would take for whole
    logger.warning("building the C++ launches of ds_fp8, on the first run only, in %s", folder)
    cpp_extension.load(
        "ds_fp8_launches",
        [str(SOURCE)],
        extra_cflags=[*FLAGS],
        build_directory=str(folder),
        is_python_module=False,
        with_cuda=False,
    )
    write_digest(library, library)
    logger.warning("built the C++ launches of ds_fp8 in %.0f s", time.monotonic() - began)
