"""Random command lines: whatever is typed, a command ends or says why not, and never with a traceback."""

import contextlib
import json
import random
from pathlib import Path

import pytest
from engines import ds_config

from ds_fp8.cli import main
from ds_fp8.cli.configs import shipped

COMMANDS = {  # options of each that want a value, and those that want none; names before them
    "report": (["--config", "--gpus", "--micro-steps"], ["--json"], 0),
    "estimate": (
        ["--params", "--memory", "--model", "--gpus", "--micro-steps", "--stage", "--opt-level", "--config"],
        ["--paper", "--json"],
        0,
    ),
    "configs": ([], ["--json"], 1),
    "inspect": (["--tag"], ["--no-verify", "--json"], 1),
    "export": (["--tag", "--format", "--dtype", "--max-shard-size"], ["--unpickle", "--json"], 2),
    "to-universal": (["--tag"], ["--unpickle", "--json"], 2),
}
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "1.5",
    "1e9",
    "nan",
    "inf",
    "1" * 30,
    "9" * 5000,
    "7G",
    "80",
    "0x10",
    "\u0663",
]
WORDS = ["", "-", "auto", "O2", "O2+", "bf16", "torch", "5GB", "latest", "[red]", "x" * 300, "zero2_o2"]
PATHS = ["..", "/dev/null", "~", "no/such.json", "\x00", "a\nb", "\ud800", "\udcff"]
PLACES = ["FOLDER", "GOOD", "LIST", "BINARY", "MODEL", "ODD"]
VALUES = (*NUMBERS, *WORDS, *PATHS, *PLACES)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    files = {
        "GOOD": json.dumps(ds_config({})).encode(),
        "LIST": b"[1, 2]",
        "BINARY": bytes(range(256)),
        "MODEL": b'{"model_type": "gpt2", "n_embd": -4, "n_layer": 1.5}',
        "ODD": b'{"fp8": {"enabled": true, "stats": []}, "zero_optimization": 5, "bf16": "auto"}',
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    return {name: str(tmp_path / f"{name}.json") for name in files} | {"FOLDER": str(tmp_path)}


def typed(chance: random.Random, places: dict[str, str]) -> list[str]:
    """A command line that may be right; now and then with something too much."""
    command = chance.choice([*COMMANDS])
    with_value, flags, names = COMMANDS[command]
    options = [[each, chance.choice(VALUES)] for each in with_value if chance.random() < 0.4]
    options += [[each] for each in flags if chance.random() < 0.3]
    options += [[chance.choice(VALUES)]] * (names + (chance.random() < 0.05))
    chance.shuffle(options)
    return [command, *(places.get(each, each) for option in options for each in option)]


@pytest.mark.parametrize("seed", range(2))
def test_no_command_line_ends_in_a_traceback(
    seed: int,
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ds_fp8.estimate.runs.MOST_GPUS", 64)  # for the time it takes
    chance = random.Random(seed)
    for _ in range(200):
        arguments = typed(chance, places)
        try:
            with contextlib.suppress(SystemExit):
                main(arguments)
        except BaseException as error:
            pytest.fail(f"{arguments}: {type(error).__name__}: {error}")
        assert len(capsys.readouterr().err) < 3000, arguments
    assert sorted(shipped())  # the package itself is as it was
