"""The C++ kernels, compiled on first use and kept.

One shared library holds every instruction set; which runs is decided when it is loaded, so that a cache on
a shared file system serves unlike machines. It lies under the digest of its sources and flags: what changes
is built anew, and two versions do not meet. Plain pointers go in: no header of torch is compiled, and a cold
build takes seconds.

The processes of a node all come here at once. The first to lock builds and says so, the others wait and find
its result. The operating system frees the lock of a process that was killed.

A library that is cut short or whose bits have changed (a full disk, a power failure, a copied cache) would
kill the process that loads it. So a digest lies beside it, and each is on the disk before it has its name;
they are compared before every load, and what does not agree is built anew, under the lock. The new library is
another file under the same name: a process that has loaded the old one keeps it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import ninja
from filelock import FileLock, Timeout
from ninja.ninja_syntax import Writer

logger = logging.getLogger("ds_fp8")

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"  # roundings in the order that is written
)
X86 = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mf16c",
    "avx2": "-mavx2 -mf16c",
}
NO_COMPILER = f"no C++ compiler on the PATH ({', '.join(COMPILERS)}) and CXX names none; install g++, say"
PATIENCE = 300.0  # seconds to wait for another process's build


class BuildError(RuntimeError):
    """The kernels cannot be built, and why."""


def instruction_sets() -> dict[str, str]:
    """Flags of each instruction set that is compiled here, the best first."""
    x86 = X86 if platform.machine() in ("x86_64", "AMD64") else {}
    return {**x86, "portable": ""}


def compiler() -> str | None:
    """The command of the C++ compiler: CXX, with its arguments if it has any, or the first on the PATH.

    Raises BuildError if CXX names a program that does not exist: another one was not asked for.
    """
    wanted = os.environ.get("CXX")
    if not wanted:
        paths = (shutil.which(name) for name in COMPILERS)
        return next((shlex.quote(path) for path in paths if path), None)
    if program := shutil.which(wanted):
        return shlex.quote(program)
    try:
        name, *arguments = shlex.split(wanted) or [wanted]
    except ValueError:  # a quote without its other
        name, arguments = wanted, []
    if program := shutil.which(name):
        return shlex.join([program, *arguments])
    raise BuildError(
        f"CXX: received {wanted!r}, and there is no such program; allowed: a C++ compiler's path, or its "
        f"name on the PATH, with arguments or without; or nothing, for the first of {', '.join(COMPILERS)}"
    )


def obstacle() -> str | None:
    """Why the library cannot be built; None if it can. Builds nothing: a report should not take seconds."""
    if is_whole(library_path()):
        return None
    try:
        _needed_compiler()
    except BuildError as error:
        return str(error)
    return None


def library() -> Path:
    """The shared library, built if it is not there yet or is damaged.

    Raises BuildError if there is no compiler, the build fails, or another process holds the lock for
    longer than PATIENCE.
    """
    target = library_path()
    if is_whole(target):
        return target
    cxx = _needed_compiler()
    _locked(target, lambda: _build(cxx, target))
    return target


def _needed_compiler() -> str:
    cxx = compiler()
    if cxx is None:
        damaged = library_path().exists()
        raise BuildError(f"{library_path()} is damaged, and {NO_COMPILER}" if damaged else NO_COMPILER)
    return cxx


def library_path() -> Path:
    """Where the library of these sources and flags lies, built or not."""
    digest = hashlib.sha256(repr((FLAGS, _link_flags(), instruction_sets())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return extensions() / "ds_fp8_cpu" / digest.hexdigest()[:16] / "kernels.so"


def extensions() -> Path:
    """Where what is compiled on first use lies."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root).absolute()


def _link_flags() -> str:
    """Empty if the process has an OpenMP runtime already, torch's: two would fight over cores."""
    return "" if hasattr(ctypes.CDLL(None), "GOMP_parallel") else "-fopenmp"


def _locked(target: Path, build: Callable[[], None]) -> None:
    """Build, or wait for the process that does."""
    lock = target.with_suffix(".lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=PATIENCE):
            if not is_whole(target):
                build()
    except Timeout:
        raise BuildError(
            f"another process has held the lock {lock} for {PATIENCE:.0f} s; if none is building, delete it"
        ) from None
    except OSError as error:
        raise BuildError(f"cannot build in {target.parent}: {error}") from error


def is_whole(library: Path) -> bool:
    """Whether the library is there and its bytes are those that were built."""
    try:
        return digest_path(library).read_text() == digest_of(library)
    except (OSError, UnicodeDecodeError):
        return False


def digest_path(library: Path) -> Path:
    """Where the digest of a library lies."""
    return library.with_suffix(".sha256")


def digest_of(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _build(cxx: str, target: Path) -> None:
    """Build, and say so: the first run on a machine waits for it.

    As a warning, which is seen on whichever rank it is that builds, and where no log was set up.
    """
    why = "the existing ones are damaged" if target.exists() else "on the first run only"
    logger.warning("building the C++ kernels of ds_fp8, %s, in %s", why, target.parent)
    began = time.monotonic()
    _compile(cxx, target)
    logger.warning("built the C++ kernels of ds_fp8 in %.0f s", time.monotonic() - began)


def _compile(cxx: str, target: Path) -> None:
    """Compile every instruction set and link; the library appears whole or not at all."""
    for left in target.parent.glob("*.o"):  # of a build that was cut off, which ninja may take for whole
        left.unlink()
    temporary = target.with_suffix(".new.so")
    script = target.with_name("build.ninja")
    with script.open("w") as file:
        _write_script(Writer(file), cxx, temporary.name)  # type: ignore[arg-type]  # says str, takes a file
    tool = shutil.which("ninja") or str(Path(ninja.BIN_DIR) / "ninja")
    done = subprocess.run(
        [tool, "-C", str(target.parent)], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        log = target.with_name("build.log")
        log.write_text(done.stdout + done.stderr)
        reason = next((line for line in done.stdout.splitlines() if "error" in line), done.stdout[-300:])
        raise BuildError(f"the build failed: {reason.strip()} (all of it in {log})")
    write_digest(temporary, target)
    _sync(temporary)
    temporary.replace(target)
    _sync(target.parent)


def write_digest(built: Path, library: Path) -> None:
    """Say which bytes the library has, or will have once what is built has its name."""
    _keep(digest_of(built).encode(), digest_path(library))


def _keep(content: bytes, path: Path) -> None:
    """Write a file whole: it is on the disk before it has its name."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_script(script: Writer, cxx: str, output: str) -> None:
    script.rule("compile", f"{cxx} {FLAGS} $isa -c $in -o $out")
    script.rule("link", f"{cxx} -shared $in {_link_flags()} -o $out")
    script.build(["dispatch.o"], "compile", [str(SOURCES / "dispatch.cpp")])
    for name, flags in instruction_sets().items():
        isa = {"isa": f"-DISA={name} {flags}"}
        script.build([f"{name}.o"], "compile", [str(SOURCES / "kernels.cpp")], variables=isa)
    script.build([output], "link", ["dispatch.o", *(f"{name}.o" for name in instruction_sets())])
