"""Log what DeepSpeed compiles on first use: minutes without output look like a hang.

DeepSpeed builds an op when it is first loaded, on a CPU already in `init_distributed`, and all ranks wait for
the one that builds. What an earlier run has left is loaded without a word, unless that takes so long that it
must be built anew. A build that was killed leaves torch's lock file behind, for which the next one waits for
as long as it lives: the file is named.
"""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Timer
from typing import Any

from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger("ds_fp8")

Method = Callable[..., Any]
AT_ONCE, ANEW = 0.5, 20.0  # seconds after which an op is being built: a new one, and one that was there
PATIENCE = 60.0  # seconds of waiting for a lock after which its process may be dead


def jit_load(original: Method) -> Method:
    """OpBuilder.jit_load: say what is being built, and how long it took."""

    @functools.wraps(original)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        start, logged = time.monotonic(), Event()
        what = f"DeepSpeed's {self.name}"

        def log_build() -> None:
            logged.set()
            logger.info("building %s, once on this machine; this may take minutes", what)

        name_lock = functools.partial(_name_lock, self.name, time.time())
        with _after(ANEW if _is_there(self.name) else AT_ONCE, log_build), _after(PATIENCE, name_lock):
            module = original(self, *arguments, **named)
        if logged.is_set():
            logger.info("built %s in %.0f s", what, time.monotonic() - start)
        return module

    return method


def _name_lock(name: str, since: float) -> None:
    """Warn of the lock file of an earlier build that was probably killed."""
    for folder in _folders(name):
        lock = folder / "lock"
        if lock.exists() and lock.stat().st_mtime < since and os.environ.get("LOCAL_RANK", "0") == "0":
            logger.warning(
                "waiting for %s, the lock of a build: if no process is building, delete that file", lock
            )


def _folders(name: str) -> list[Path]:
    """The folders in which torch builds this op or would build it."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    root, folders = (own, name) if own else (get_default_build_root(), f"{python}*/{name}")
    return list(Path(root).glob(folders))


def _is_there(name: str) -> bool:
    """Whether an earlier run has left this op."""
    return any((folder / f"{name}.so").exists() for folder in _folders(name))


@contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` once if the body takes longer than `seconds`."""
    timer = Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
