"""docs/recipes.md: each config fits the GPUs of its title. A frozen base in `ds_fp8 estimate`."""

import json
import re
from pathlib import Path

import pytest
from test_cli import output
from test_cli_estimate import estimated

from ds_fp8.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
RECIPES = re.findall(
    r"^## ([^\n]*?\b(\d+)B on (\w+) (\d+) GB GPUs?)\n.*?```json\n(.*?)```.*?```console\n\$ ds_fp8 (.*?)```",
    PAGE,
    re.MULTILINE | re.DOTALL,
)


NUMBERS = {"one": "1", "two": "2", "four": "4", "eight": "8"}
SMALL_BASE = "LoRA of 70B on eight 80 GB GPUs"  # stock fits, too


@pytest.mark.parametrize("recipe", RECIPES, ids=[each[0] for each in RECIPES])
def test_a_recipe_fits_its_gpu(
    recipe: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for activations. The page shows what is printed, for the GPUs and the model of its title."""
    title, billions, gpus, gigabytes, config, block = recipe
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(config)
    command, *lines = block.splitlines()
    words = command.split()
    assert [line.rstrip() for line in output(capsys, *words).splitlines()] == lines
    assert words[words.index("--gpus") + 1] == NUMBERS[gpus]
    assert words[words.index("--params") + 1] == f"{billions}G"
    (found,) = json.loads(output(capsys, *words, "--json"))["models"]
    stock, *_, ours = (each["total"] for each in found["bytes"])
    assert ours < 0.85 * int(gigabytes) * 10**9
    assert stock > int(gigabytes) * 10**9 or title == SMALL_BASE


def test_there_are_recipes() -> None:
    assert len(RECIPES) == PAGE.count("```console") >= 8


class TestTrainable:
    """`--trainable`: the rest of `--params` is frozen."""

    def test_only_what_trains_has_states(self, capsys: pytest.CaptureFixture[str]) -> None:
        lora = estimated(capsys, "--params", "7G", "--trainable", "50M", "--opt-level", "O2+")["models"][0]
        alone = estimated(capsys, "--params", "50M", "--opt-level", "O2+")["models"][0]
        assert lora["frozen"] == 7 * 10**9 - 50 * 10**6
        for ours, small in zip(lora["bytes"], alone["bytes"], strict=True):
            assert ours["states"] == small["states"]
            assert ours["gradients"] == small["gradients"]
            assert ours["weights"] == small["weights"] + 2 * lora["frozen"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ("--params", "1G", "--trainable", "2G"),
                "--trainable: received 2000000000, allowed: at most --params",
            ),
            (("--memory", "80", "--trainable", "2G"), "--trainable: not allowed without --params"),
            (("--fits", "--offload"), "--offload: not allowed with --fits"),
        ],
    )
    def test_refusals(self, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["estimate", *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
