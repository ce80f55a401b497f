"""The `ds_fp8` command."""

import json
import os
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest

import ds_fp8
from ds_fp8.cli import main
from ds_fp8.cli.configs import shipped
from ds_fp8.config.parsing import parse

NAMES = ["zero1_bf16", "zero1_o1", "zero1_o2", "zero1_o2plus"]
NAMES += [name.replace("zero1", stage) for stage in ("zero2", "zero3") for name in NAMES]
NAMES = sorted([*NAMES, "zero1_o3", "zero2_o3", "zero3_o3", "zero2_o2plus_offload", "zero3_o2plus_offload"])


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def piped(
    *arguments: str, stdout: int = subprocess.PIPE, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, whose output is no terminal."""
    return subprocess.run(
        [sys.executable, "-m", "ds_fp8.cli", *arguments],
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


class TestConfigs:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        heading, *rows = [line.split() for line in output(capsys, "configs").splitlines()]
        columns = "name stage level gradients master exp_avg exp_avg_sq weights block"
        assert heading == columns.split()
        assert [row[0] for row in rows] == NAMES
        by_name = {row[0]: row[1:] for row in rows}
        assert by_name["zero2_o2"] == ["2", "O2", "e4m3", "fp16", "int8", "fp16", "-", "128"]
        assert by_name["zero3_o2plus"] == ["3", "O2+", "e4m3", "split16", "int8", "ue4m4", "-", "128"]
        assert by_name["zero1_o1"] == ["1", "O1", "e4m3", "fp32", "fp32", "fp32", "-", "128"]
        assert by_name["zero2_o3"] == ["2", "O3", "e4m3", "fp16", "int8", "ue4m4", "e4m3", "128"]
        assert by_name["zero1_bf16"] == ["1", *"-------"]

    def test_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        listed = json.loads(output(capsys, "configs", "--json"))
        assert [each["name"] for each in listed] == NAMES
        off = dict.fromkeys(("gradients", "master", "exp_avg", "exp_avg_sq", "weights", "block_size"))
        assert listed[0] == {"name": "zero1_bf16", "zero_stage": 1, "opt_level": None, **off}
        for each in listed:
            ds_config: dict[str, Any] = json.loads(shipped()[each["name"]])
            assert each["zero_stage"] == ds_config["zero_optimization"]["stage"]
            fp8 = parse(ds_config)
            if fp8 is not None:
                assert each["opt_level"] == fp8.opt_level
                assert each["gradients"] == fp8.gradients.dtype
                assert each["exp_avg_sq"] == fp8.states.exp_avg_sq
                assert each["block_size"] == fp8.block_size

    @pytest.mark.parametrize("name", [*NAMES, "zero2_o2.json"])
    def test_one_is_printed_as_it_is(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        file = resources.files("ds_fp8.configs").joinpath(name.removesuffix(".json") + ".json")
        assert output(capsys, "configs", name) == file.read_text()

    def test_one_is_json_already(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert output(capsys, "configs", "zero1_o2", "--json") == shipped()["zero1_o2"]


class TestInAPipe:
    def test_rows_are_plain_and_whole(self) -> None:
        result = piped("configs", COLUMNS="20")
        assert (result.returncode, result.stderr) == (0, "")
        assert [len(line.split()) for line in result.stdout.splitlines()] == [9] * (1 + len(NAMES))
        assert result.stdout.isascii()
        assert "\x1b" not in result.stdout

    def test_a_reader_that_has_left_is_no_error(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            result = piped("configs", "--json", stdout=writer)
        finally:
            os.close(writer)
        assert result.stderr == ""
        assert result.returncode == 1

    def test_nothing_heavy_is_imported(self) -> None:
        code = (
            "import sys; from ds_fp8.cli import main; main(['configs', '--json']); main(['configs']);"
            "print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        assert result.stdout.splitlines()[-1] == "[]"


class TestCommandLine:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["--version"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out == f"ds_fp8 {ds_fp8.__version__}\n"

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            ([], ["COMMAND"]),
            (["config"], ["'config'", "configs"]),
            (["configs", "zero2_02"], ['"zero2_02"', *NAMES, 'did you mean "zero2_o2"?']),
            (["configs", "../configs/zero2_o2"], ['"../configs/zero2_o2"', *NAMES]),
            (["configs", ""], ['""', *NAMES]),
            (["configs", "a", "b"], ["unrecognized", "b"]),
            (["configs", "--yaml"], ["unrecognized", "--yaml"]),
            (["--verbose"], ["COMMAND"]),
        ],
    )
    def test_a_wrong_one_is_one_line_and_status_2(
        self, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("ds_fp8")
        assert err.count("\n") == 1
        for part in parts:
            assert part in err
