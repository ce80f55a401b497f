"""`python -m ds_fp8`: an unchanged script must not notice that it was not run by Python itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_fp8.__main__ import COMMANDS, check_module, split
from ds_fp8.__main__ import main as program
from ds_fp8.cli import build_parser

PROBE = """
import json, os, sys
seen = {"argv": sys.argv, "path": os.path.realpath(sys.path[0] or os.getcwd()), "name": __name__}
seen["file"] = __file__
seen["main"] = sys.modules["__main__"].__dict__ is globals()
seen["package"] = __spec__.name if __spec__ else None
seen["neighbour"] = __import__("neighbour").ANSWER
registration = sys.modules.get("ds_fp8.seam.registration")
json.dump(seen | {"seam": bool(registration and registration._patches)}, open(OUT, "w"))
"""


class TestSplit:
    @pytest.mark.parametrize(
        ("arguments", "target", "is_module", "rest"),
        [
            (["train.py"], "train.py", False, []),
            (["train.py", "--lr", "1"], "train.py", False, ["--lr", "1"]),
            (["train.py", "-m", "x"], "train.py", False, ["-m", "x"]),
            (["-m", "pkg.train"], "pkg.train", True, []),
            (["-m", "pkg.train", "--lr", "1"], "pkg.train", True, ["--lr", "1"]),
            (["--local_rank=3", "train.py", "--lr"], "train.py", False, ["--local_rank=3", "--lr"]),
            (["--local-rank=0", "train.py"], "train.py", False, ["--local-rank=0"]),
            (["--local_rank=1", "-m", "pkg.train", "a"], "pkg.train", True, ["--local_rank=1", "a"]),
            (["train.py", "--local_rank=1"], "train.py", False, ["--local_rank=1"]),
        ],
    )
    def test_finds_the_script(
        self, arguments: list[str], target: str, is_module: bool, rest: list[str]
    ) -> None:
        assert split(arguments) == (target, is_module, rest)

    @pytest.mark.parametrize(
        ("arguments", "received"),
        [
            ([], "'no arguments'"),
            (["-m"], "'-m'"),
            (["--halp"], "'--halp'"),
            (["--foo", "train.py"], "'--foo train.py'"),
            (["--local_rank=0"], "'--local_rank=0'"),
            (["--local_rank=0", "-x", "train.py"], "'--local_rank=0 -x train.py'"),
            (["-m", "--lr"], "'-m --lr'"),
        ],
    )
    def test_refuses_the_rest(
        self, arguments: list[str], received: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            split(arguments)
        assert stopped.value.code == 2
        printed = capsys.readouterr().err
        assert f"received {received}" in printed
        assert "usage: python -m ds_fp8 (SCRIPT | -m MODULE)" in printed


def python(*arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A script, a module in a package, and a script behind a link; each imports its neighbour."""
    probe = PROBE.replace("OUT", repr(str(tmp_path / "seen.json")))
    for folder in ("scripts", "package"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "probe.py").write_text(probe)
    (tmp_path / "package" / "__init__.py").touch()
    for neighbour in ("neighbour.py", "scripts/neighbour.py"):
        (tmp_path / neighbour).write_text("ANSWER = 42")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "linked.py").symlink_to(tmp_path / "scripts" / "probe.py")
    return tmp_path


def seen(project: Path, *arguments: str, **environment: str) -> dict[str, object]:
    result = python(*arguments, cwd=project, **environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, object] = json.loads((project / "seen.json").read_text())
    return found


class TestRun:
    @pytest.mark.parametrize(
        "command", [("scripts/probe.py",), ("-m", "package.probe"), ("links/linked.py",)], ids=" ".join
    )
    def test_as_python_itself_would(self, project: Path, command: tuple[str, ...]) -> None:
        """Which makes `__file__` absolute: scripts look for their data beside it after a change of folder."""
        plain = seen(project, *command, "--lr", "1", "-m")
        ours = seen(project, "-m", "ds_fp8", *command, "--lr", "1", "-m")
        assert plain["name"] == "__main__"
        assert (plain["main"], plain["neighbour"], plain["seam"]) == (True, 42, False)
        if command[0] != "-m":
            plain["argv"][0] = str(project / plain["argv"][0])
        if command[0] == "-m":
            plain["file"] = ours["file"]
        assert ours == {**plain, "seam": True}

    def test_launcher_arguments_come_first(self, project: Path) -> None:
        ours = seen(project, "-m", "ds_fp8", "--local_rank=0", "scripts/probe.py", "--lr", "1")
        assert ours["argv"] == [str(project / "scripts/probe.py"), "--local_rank=0", "--lr", "1"]

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
    def test_safe_path_keeps_pythonpath(self, project: Path) -> None:
        """With PYTHONSAFEPATH the first entry is not the script's folder but the user's own."""
        library = project / "library"
        library.mkdir()
        (project / "scripts" / "neighbour.py").rename(library / "neighbour.py")
        environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(library)}
        plain = seen(project, "scripts/probe.py", **environment)
        ours = seen(project, "-m", "ds_fp8", "scripts/probe.py", **environment)
        assert ours["path"] == plain["path"] == str(library)

    def test_status_and_output_are_the_scripts(self, project: Path) -> None:
        (project / "fails.py").write_text("import sys; print('out'); sys.exit(7)")
        result = python("-m", "ds_fp8", "fails.py", cwd=project)
        assert (result.returncode, result.stdout.splitlines()[-1]) == (7, "out")
        assert "after a DeepSpeed engine was built" not in result.stderr

    @pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--local_rank=0", "--help"]])
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            split(arguments)
        assert stopped.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        for part in (
            "usage: python -m ds_fp8 (SCRIPT | -m MODULE)",
            "deepspeed --module ds_fp8",
            "ds_fp8 --help",
        ):
            assert part in out

    def test_commands_in_the_help_are_those_of_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        for command in COMMANDS:
            with pytest.raises(SystemExit) as stopped:
                build_parser().parse_args([command, "--help"])
            assert stopped.value.code == 0
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--help"])
        told = capsys.readouterr().out.rsplit("COMMAND", 1)[1]
        assert re.findall(r"^    (\S+)", told, re.MULTILINE) == [*COMMANDS]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["no_such.py"], "no_such.py: no such script"),
            (["report"], "report: no such script; the command is `ds_fp8 report`"),
            (["scripts"], "__main__.py: no such script"),
            (["x" * 4000], "... (4,000 characters): no such script"),
        ],
    )
    def test_a_script_that_is_not_there(
        self,
        project: Path,
        arguments: list[str],
        words: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(project)
        monkeypatch.setattr("sys.argv", ["ds_fp8", *arguments])
        with pytest.raises(SystemExit) as stopped:
            program()
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err

    @pytest.mark.parametrize(
        "name", ["no_such", "no_such.sub", "package", "package.no_such", ".probe", "a..b"]
    )
    def test_a_module_that_is_not_there(
        self, project: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(project)
        with pytest.raises(SystemExit):
            check_module(name)
        assert f"{name}: no such module" in capsys.readouterr().err

    def test_what_a_package_raises_is_raised(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (project / "broken").mkdir()
        (project / "broken" / "__init__.py").write_text("import no_such_neighbour")
        monkeypatch.syspath_prepend(project)
        with pytest.raises(ModuleNotFoundError, match="no_such_neighbour"):
            check_module("broken.train")

    def test_a_wrong_command_line_is_refused_at_once(self, project: Path) -> None:
        """Before torch and deepspeed are imported."""
        result = python("-X", "importtime", "-m", "ds_fp8", "--foo", cwd=project)
        assert result.returncode == 2
        assert "received '--foo'" in result.stderr
        imported = {line.rsplit("|", maxsplit=1)[-1].strip() for line in result.stderr.splitlines()}
        assert "runpy" in imported
        assert not imported & {"torch", "deepspeed"}
