"""The C++ kernels are built once, by one process, and nothing that was killed keeps anyone waiting."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from kernel_support import needs_compiler

from ds_fp8.ops import backend
from ds_fp8.ops.backend import REFERENCE, VARIABLE, choose
from ds_fp8.ops.cpu import build, kernels

CPU = torch.device("cpu")
BUILD = "from ds_fp8.ops.cpu import build; print(build.library())"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing has been built, and nothing that this process has loaded counts."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_library", kernels._library.__wrapped__)
    monkeypatch.setattr(kernels, "kernels", kernels.kernels.__wrapped__)
    return tmp_path


@pytest.fixture
def counting_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes each call in a file."""
    real, log, wrapper = build.compiler(), cache / "calls", cache / "my c++"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec "{real}" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


def start(code: str = BUILD) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", f"import torch; {code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcome(process: "subprocess.Popen[str]") -> Path:
    told, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return Path(told.strip().splitlines()[-1])


@needs_compiler
def test_two_ranks_at_once_build_once(counting_compiler: Path) -> None:
    """From nothing, in less than 30 seconds."""
    began = time.monotonic()
    ranks = [start() for _ in range(3)]
    libraries = {outcome(each) for each in ranks}
    assert time.monotonic() - began < 30
    assert len(libraries) == 1
    calls = counting_compiler.read_text().splitlines()
    assert len(calls) == len(build.instruction_sets()) + 2  # dispatch, and the link
    assert outcome(start()) in libraries
    assert len(counting_compiler.read_text().splitlines()) == len(calls)


@needs_compiler
def test_what_a_killed_build_left_is_in_nobodys_way(counting_compiler: Path, cache: Path) -> None:
    """Killed with its compilers, while it holds the lock."""
    killed = start()
    while not counting_compiler.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    lock = next((cache / "cache").rglob("*.lock"))
    assert lock.exists()
    began = time.monotonic()
    assert outcome(start()).exists()
    assert time.monotonic() - began < 30


def test_a_lock_that_is_held_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PATIENCE", 0.2)
    monkeypatch.setenv("CXX", sys.executable)  # never run
    lock = build.library_path().with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(build.BuildError) as caught:
        build.library()
    assert str(lock) in str(caught.value)
    assert "has held the lock" in str(caught.value)


def without_compiler(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CXX", raising=False)


def test_without_a_compiler_the_reference_runs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch, cache)
    chosen = choose(CPU)
    assert chosen.name == "reference"
    assert chosen.adam_step is REFERENCE.adam_step
    assert chosen.instead == build.NO_COMPILER
    assert "g++" in build.NO_COMPILER
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(
        ValueError, match=r"DS_FP8_BACKEND: received 'cpu', which cannot run on cpu: no C\+\+"
    ):
        choose(CPU)


def test_a_build_that_fails_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cache / "broken"
    compiler.write_text("#!/bin/sh\necho 'error: no such thing as C++17'\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        build.BuildError, match=r"the build failed: error: no such thing as C\+\+17"
    ) as caught:
        build.library()
    log = Path(str(caught.value).rsplit("(all of it in ", 1)[1].rstrip(")"))
    assert "no such thing" in log.read_text()
    assert not build.library_path().exists()
    assert "the build failed" in str(choose(CPU).instead)


def test_a_cache_that_cannot_be_written_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache / "file"))
    monkeypatch.setenv("CXX", sys.executable)  # never run
    with pytest.raises(build.BuildError, match=r"cannot build in .*file"):
        build.library()


@pytest.fixture
def instant_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler whose links are copies of the library that this machine has; it notes each in a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_EXTENSIONS_DIR")
        real = build.library()
    log, wrapper = cache / "links", cache / "instant"
    wrapper.write_text(
        '#!/bin/sh\nlinks=""\nfor each; do\n  case "$last$each" in -o*) to="$each";; esac\n'
        '  [ "$each" = -shared ] && links=1\n  last="$each"; [ "$last" = -o ] || last=""\ndone\n'
        f'if [ "$links" ]; then echo "$to" >> "{log}"; cp "{real}" "$to"; else : > "$to"; fi\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


@needs_compiler
def test_what_was_built_needs_no_compiler(instant_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.library()
    without_compiler(monkeypatch, instant_compiler.parent)
    assert build.library() == built
    assert choose(CPU).name == "cpu"


def cut_short(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def flip_a_bit(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 3] ^= 1
    library.write_bytes(content)


def empty(library: Path) -> None:
    library.write_bytes(b"")


def lose_the_digest(library: Path) -> None:
    build.digest_path(library).unlink()


def spoil_the_digest(library: Path) -> None:
    build.digest_path(library).write_bytes(b"\xff\x00")


DAMAGES = (cut_short, flip_a_bit, empty, lose_the_digest, spoil_the_digest)


@needs_compiler
def test_a_damaged_library_is_built_anew(instant_compiler: Path) -> None:
    """Whatever happened to it; a process that would load it is not killed."""
    load = "from ds_fp8.ops.cpu import build, kernels; kernels.load(); print(build.library_path())"
    library = build.library()
    assert build.is_whole(library)
    for damage in DAMAGES:
        damage(library)
        assert not build.is_whole(library), damage.__name__
    assert outcome(start(load)) == library
    for number, damage in enumerate(DAMAGES, start=2):
        inode = library.stat().st_ino
        damage(library)
        assert build.library() == library
        assert build.is_whole(library)
        assert library.stat().st_ino != inode, "whoever has loaded the old library must keep it"
        assert len(instant_compiler.read_text().splitlines()) == number + 1, damage.__name__


@needs_compiler
def test_a_damaged_library_that_cannot_be_built_anew_is_named(
    instant_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build.library()
    cut_short(library)
    without_compiler(monkeypatch, instant_compiler.parent)
    assert str(choose(CPU).instead).startswith(f"{library} is damaged, and no C++ compiler")
    assert build.obstacle() == choose(CPU).instead


@needs_compiler
def test_a_build_is_told_once_with_its_time(instant_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(build.logger, "handlers", [handler])
    for _ in range(2):
        build.library()
    assert len(told) == 2
    assert told[0].startswith("building the C++ kernels of ds_fp8, on the first run only")
    assert re.fullmatch(r"built the C\+\+ kernels of ds_fp8 in \d+ s", told[1])


@pytest.mark.parametrize("value", ["/no/such/c++", "no-such-compiler -m64", " ", "g++ '"])
def test_a_cxx_that_does_not_exist_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Another compiler was not asked for."""
    monkeypatch.setenv("CXX", value)
    with pytest.raises(
        build.BuildError, match=rf"CXX: received {re.escape(repr(value))}, .*no such program; allowed"
    ):
        build.library()
    assert choose(CPU).name == "reference"
    assert str(choose(CPU).instead).startswith(f"CXX: received {value!r}")
    assert build.obstacle() == choose(CPU).instead


def test_a_cxx_with_arguments_is_a_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "my tool").write_text("#!/bin/sh\n")
    (cache / "my tool").chmod(0o755)
    for value, command in (
        (f"{cache}/my tool", f"'{cache}/my tool'"),
        (f"'{cache}/my tool' -m64 'a b'", f"'{cache}/my tool' -m64 'a b'"),
    ):
        monkeypatch.setenv("CXX", value)
        assert build.compiler() == command


def test_other_sources_are_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library_path()
    changed = cache / "csrc"
    shutil.copytree(build.SOURCES, changed)
    monkeypatch.setattr(build, "SOURCES", changed)
    assert build.library_path() == before
    with (changed / "adam.h").open("a") as file:
        file.write("\n")
    assert build.library_path() != before


@needs_compiler
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "avx1024")
    with pytest.raises(ValueError, match=r"DS_FP8_CPU_ISA: received 'avx1024', allowed .*portable"):
        kernels.load()


@needs_compiler
def test_tensors_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(ValueError, match=r"'cpu', which cannot run on cuda: .*host's memory"):
        choose(torch.device("cuda"))


@needs_compiler
def test_the_kernels_are_those_of_the_module() -> None:
    chosen = backend.cpu_backend()
    assert chosen.name == "cpu"
    for name in ("quantize", "dequantize", "accumulate", "plan", "adam_step"):
        assert getattr(chosen, name) is getattr(kernels, name)
