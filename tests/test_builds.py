"""Rank 0 logs what DeepSpeed compiles, with the time, and names a lock that was left behind."""

import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ds_fp8
from ds_fp8 import builds
from ds_fp8.compat import OpBuilder


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the logger of ds_fp8 says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_fp8")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builds, "AT_ONCE", 0.02)
    monkeypatch.setattr(builds, "PATIENCE", 0.02)
    return tmp_path


def load(seconds: float) -> Any:
    def original(self: Any, verbose: bool = True) -> str:
        time.sleep(seconds)
        return f"module of {self.name}"

    return builds.jit_load(original)(SimpleNamespace(name="an_op"), False)


class TestOps:
    def test_a_build_is_told_with_its_time(self, folder: Path, log: list[str]) -> None:
        assert load(0.3) == "module of an_op"
        first, last = log
        assert first.startswith("building DeepSpeed's an_op, once on this machine")
        assert re.fullmatch(r"built DeepSpeed's an_op in \d+ s", last)

    def test_what_is_there_is_loaded_without_a_word(self, folder: Path, log: list[str]) -> None:
        (folder / "an_op").mkdir()
        (folder / "an_op" / "an_op.so").touch()
        load(0.2)
        assert log == []

    def test_what_fails_fails_as_before(self, folder: Path, log: list[str]) -> None:
        def original(self: Any) -> None:
            raise RuntimeError("no compiler")

        with pytest.raises(RuntimeError, match="no compiler"):
            builds.jit_load(original)(SimpleNamespace(name="an_op"))
        time.sleep(0.1)
        assert log == []


class TestLocks:
    @pytest.mark.parametrize(("rank", "age", "lines"), [("0", 60, 1), ("1", 60, 0), ("0", -60, 0)])
    def test_a_lock_that_was_there_before_is_named_by_one_rank_of_a_node(
        self,
        rank: str,
        age: float,
        lines: int,
        folder: Path,
        log: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("LOCAL_RANK", rank)
        lock = folder / "an_op" / "lock"
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
        load(0.2)
        named = [line for line in log if f"{lock}, the lock of a build" in line]
        assert len(named) == lines


def test_it_is_registered_and_comes_out() -> None:
    before = OpBuilder.jit_load
    ds_fp8.register()
    assert OpBuilder.jit_load is not before
    ds_fp8.unregister()
    assert OpBuilder.jit_load is before
