"""The C++ kernels, compiled on first use and kept.

One shared library holds every instruction set; which runs is decided when it is loaded, so that a cache on
a shared file system serves unlike machines. It lies under the digest of its sources and flags: what changes
is built anew, and two versions do not meet. Plain pointers go in: no header of torch is compiled, and a cold
build takes seconds.

The processes of a node all come here at once. The first to lock builds, the others wait and find its result.
The operating system frees the lock of a process that was killed.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ninja
from filelock import FileLock, Timeout
from ninja.ninja_syntax import Writer

SOURCES = Path(__file__).resolve().parent / "csrc"
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
    """The C++ compiler: CXX, or the first on the PATH."""
    found = (shutil.which(each) for each in (os.environ.get("CXX"), *COMPILERS) if each)
    return next((each for each in found if each), None)


def obstacle() -> str | None:
    """Why the library cannot be had; None where it can. Does not build: a report should not take seconds."""
    return None if library_path().exists() or compiler() else NO_COMPILER


def library() -> Path:
    """The shared library, built if it is not there yet.

    Raises BuildError where there is no compiler, the build fails, or another process holds the lock for
    longer than PATIENCE.
    """
    target = library_path()
    if target.exists():
        return target
    cxx = compiler()
    if cxx is None:
        raise BuildError(NO_COMPILER)
    _locked(target, lambda: _build(cxx, target))
    return target


def library_path() -> Path:
    """Where the library of these sources and flags lies, built or not."""
    digest = hashlib.sha256(repr((FLAGS, _link_flags(), instruction_sets())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root).absolute() / "ds_fp8_cpu" / digest.hexdigest()[:16] / "kernels.so"


def _link_flags() -> str:
    """Nothing where the process, through torch, has an OpenMP runtime already: two would fight over cores."""
    return "" if hasattr(ctypes.CDLL(None), "GOMP_parallel") else "-fopenmp"


def _locked(target: Path, build: Callable[[], None]) -> None:
    """Build, or wait for whoever does."""
    lock = target.with_suffix(".lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=PATIENCE):
            if not target.exists():
                build()
    except Timeout:
        raise BuildError(
            f"another process has held the lock {lock} for {PATIENCE:.0f} s; if none is building, delete it"
        ) from None
    except OSError as error:
        raise BuildError(f"cannot build in {target.parent}: {error}") from error


def _build(cxx: str, target: Path) -> None:
    """Compile every instruction set and link; the library appears whole or not at all."""
    fresh = target.with_suffix(".new.so")
    script = target.with_name("build.ninja")
    with script.open("w") as file:
        _write_script(Writer(file), cxx, fresh.name)  # type: ignore[arg-type]  # says str, takes a file
    tool = shutil.which("ninja") or str(Path(ninja.BIN_DIR) / "ninja")
    done = subprocess.run(
        [tool, "-C", str(target.parent)], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        log = target.with_name("build.log")
        log.write_text(done.stdout + done.stderr)
        reason = next((line for line in done.stdout.splitlines() if "error" in line), done.stdout[-300:])
        raise BuildError(f"the build failed: {reason.strip()} (all of it in {log})")
    fresh.replace(target)


def _write_script(script: Writer, cxx: str, output: str) -> None:
    quoted = shlex.quote(cxx)
    script.rule("compile", f"{quoted} {FLAGS} $isa -c $in -o $out")
    script.rule("link", f"{quoted} -shared $in {_link_flags()} -o $out")
    script.build(["dispatch.o"], "compile", [str(SOURCES / "dispatch.cpp")])
    for name, flags in instruction_sets().items():
        isa = {"isa": f"-DISA={name} {flags}"}
        script.build([f"{name}.o"], "compile", [str(SOURCES / "kernels.cpp")], variables=isa)
    script.build([output], "link", ["dispatch.o", *(f"{name}.o" for name in instruction_sets())])
