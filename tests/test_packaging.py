"""What ships: the links, the wheel, and that nothing of ours takes somebody else's import name."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from ranks import free_port, rank_environment

import ds_fp8

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
LITTER = (".*", "__pycache__", "build", "dist", "demo", "site", "*.egg-info", "shared")


def run(*command: str | Path, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run without the checkout on PYTHONPATH; on failure show what the command said."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def python(code: str, cwd: Path) -> str:
    """What the code prints in a fresh interpreter."""
    return run(sys.executable, "-c", code, cwd=cwd).stdout.strip()


@pytest.fixture(scope="module")
def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, the wheel made of the sdist; from a copy of the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LITTER))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "out", cwd=copy)
    return copy / "out"


@pytest.fixture(scope="module")
def wheel(release: Path) -> Path:
    (built,) = release.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
    return Parser().parsestr(archive.read(name).decode())


class TestFolders:
    def test_links_say_what_package_dir_says(self, setuptools_table: dict[str, Any]) -> None:
        homes = setuptools_table["package-dir"]
        links = {each.name: os.readlink(each) for each in (ROOT / "ds_fp8").iterdir() if each.is_symlink()}
        assert links == {name: f"../{name}" for name in ("ops", "zero_fp8", "configs")}
        for name in links:
            assert (ROOT / "ds_fp8" / name).resolve() == (ROOT / homes[f"ds_fp8.{name}"]).resolve()
        assert set(homes) == {"ds_fp8", *(f"ds_fp8.{name}" for name in links)}

    def test_packages_are_the_folders_on_disk(self, setuptools_table: dict[str, Any]) -> None:
        """The list is by hand; a folder that it lacks would be missing from the wheel only."""
        found = {"ds_fp8"}
        for home in ("ds_fp8", "ops", "zero_fp8", "configs"):
            prefix = "ds_fp8" if home == "ds_fp8" else f"ds_fp8.{home}"
            for init in (ROOT / home).rglob("__init__.py"):  # rglob does not follow the links
                found.add(".".join([prefix, *init.parent.relative_to(ROOT / home).parts]))
        assert sorted(setuptools_table["packages"]) == sorted(found)


class TestWheel:
    def test_holds_the_package_and_nothing_else(self, wheel: Path) -> None:
        names = zipfile.ZipFile(wheel).namelist()
        roots = {name.split("/", maxsplit=1)[0] for name in names}
        assert {each for each in roots if not each.endswith(".dist-info")} == {"ds_fp8"}
        assert len(roots) == 2
        assert len(names) == len(set(names))

    def test_holds_every_source_and_data_file(self, wheel: Path) -> None:
        names = set(zipfile.ZipFile(wheel).namelist())
        kinds = (".py", ".json", ".cpp", ".h", ".typed")
        for home in ("ds_fp8", "ops", "zero_fp8", "configs"):
            prefix = "ds_fp8" if home == "ds_fp8" else f"ds_fp8/{home}"
            expected = {
                f"{prefix}/{path.relative_to(ROOT / home).as_posix()}"
                for path in (ROOT / home).rglob("*")
                if path.suffix in kinds
            }
            assert expected
            assert expected <= names
        assert {"ds_fp8/py.typed", "ds_fp8/configs/zero2_o2.json"} <= names

    def test_an_index_takes_it(self, release: Path) -> None:
        """And every file has the one version."""
        files = sorted(release.iterdir())
        assert {each.name.removesuffix(".tar.gz").split("-")[1] for each in files} == {ds_fp8.__version__}
        assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=release).stdout

    def test_brings_the_command(self, wheel: Path) -> None:
        archive = zipfile.ZipFile(wheel)
        (name,) = (each for each in archive.namelist() if each.endswith("entry_points.txt"))
        assert archive.read(name).decode().split() == ["[console_scripts]", "ds_fp8", "=", "ds_fp8.cli:main"]


TARGET = re.compile(r"\]\(([^)]*)\)")


class TestMetadata:
    def test_links_of_the_readme_are_absolute(self, metadata: Message, release: Path) -> None:
        """And lead to where a file that the README names can be had; the README itself keeps its links."""
        text = str(metadata.get_payload())
        targets = TARGET.findall(text)
        relative = [each for each in TARGET.findall((ROOT / "README.md").read_text()) if "://" not in each]
        assert len(relative) > 10
        assert all(each.startswith("https://") for each in targets)
        assert f"[Quickstart]({self.urls(metadata)['Homepage']}{ds_fp8.__version__}/#files)" in text
        (sdist,) = release.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            held = {each.partition("/")[2] for each in archive.getnames()}
        assert {each.split("#")[0] for each in relative} <= held

    def test_a_public_repository_takes_the_links_and_the_pictures(self) -> None:
        spec = importlib.util.spec_from_file_location("setup_of_ds_fp8", ROOT / "setup.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        text = "![a](docs/a.png) [b](docs/b.md#c) [d](https://e.org/f) [g](#h)"
        urls = {"Homepage": "https://p.org/", "Source": "https://s.org/x"}
        assert module.long_description(text, urls, "1.2") == (
            "![a](https://s.org/x/raw/v1.2/docs/a.png) [b](https://s.org/x/blob/v1.2/docs/b.md#c) "
            "[d](https://e.org/f) [g](#h)"
        )
        del urls["Source"]
        assert module.long_description(text, urls, "1.2").startswith("*a* [b](https://p.org/1.2/#files) [d]")

    def test_project_urls(self, metadata: Message) -> None:
        urls = self.urls(metadata)
        assert urls["Homepage"].startswith("https://pypi.org/project/ds-fp8/")
        assert urls["Paper"] == "https://arxiv.org/abs/2310.18313"
        citation = (ROOT / "CITATION.cff").read_text()
        assert all(f'url: "{url}"' in citation for url in urls.values())

    def test_torch_has_no_ceiling_below_its_next_major(self, metadata: Message) -> None:
        """A newer torch is not downgraded by an install; `ds_fp8.compat` says what was tested."""
        needs = {each.name: each for each in map(Requirement, metadata.get_all("Requires-Dist"))}
        for newer in ("2.13.0", "2.14.1", "2.15.0", "2.40.0"):
            assert newer in needs["torch"].specifier
        assert "3.0" not in needs["torch"].specifier
        for name in ("triton", "transformers"):  # torch says which Triton it needs
            assert all(each.operator == ">=" for each in needs[name].specifier)

    @staticmethod
    def urls(metadata: Message) -> dict[str, str]:
        return dict(each.split(", ", maxsplit=1) for each in metadata.get_all("Project-URL", []))


class TestImport:
    def test_is_light(self, tmp_path: Path) -> None:
        code = "import sys, ds_fp8; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
        assert python(code, tmp_path) == "[]"

    def test_changes_nothing_in_deepspeed(self, tmp_path: Path) -> None:
        """Importing everything but calling nothing leaves DeepSpeed's methods alone."""
        code = (
            "from deepspeed.runtime.engine import DeepSpeedEngine as E; before = dict(vars(E));"
            "import ds_fp8; [getattr(ds_fp8, name) for name in ds_fp8.__all__];"
            "print(vars(E) == before)"
        )
        assert python(code, tmp_path).splitlines()[-1] == "True"

    def test_takes_no_other_top_level_name(self, tmp_path: Path) -> None:
        code = (
            "from importlib.util import find_spec; names = 'ds_fp8 ops zero_fp8 configs tests examples';"
            "print([name for name in names.split() if find_spec(name)])"
        )
        assert python(code, tmp_path) == "['ds_fp8']"


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel.

    Torch, deepspeed and the rest are borrowed from the running environment by a .pth line. Python reads
    .pth files in site-packages proper but not in folders that a .pth line adds, so an editable install of
    ds_fp8 there has no effect here.
    """
    home = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", home, cwd=home.parent)
    interpreter = home / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=home.parent)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = run(interpreter, "-c", where, cwd=home.parent).stdout.strip()
    borrowed = [each for each in sys.path if each.endswith("-packages")]
    (Path(own) / "borrowed.pth").write_text("\n".join(borrowed))
    return interpreter


@pytest.mark.slow
class TestInstalledWheel:
    def test_is_the_one_imported(self, clean_python: Path, tmp_path: Path) -> None:
        code = "import ds_fp8.seam.engine, ds_fp8.ops as o; print(ds_fp8.__file__, o.__file__, sep=chr(10))"
        for line in run(clean_python, "-c", code, cwd=tmp_path).stdout.splitlines()[-2:]:
            assert Path(line).is_relative_to(clean_python.parents[1])

    def test_trains_the_example(self, clean_python: Path, tmp_path: Path) -> None:
        """An unchanged script, a ds_config from the command, outside the checkout."""
        for name in ("train_lm.py", "meters.py"):
            shutil.copy(ROOT / "examples" / name, tmp_path)
        command = clean_python.with_name("ds_fp8")
        ds_config = run(command, "configs", "zero2_o2", cwd=tmp_path).stdout
        (tmp_path / "ds_config.json").write_text(ds_config)
        script = ("train_lm.py", "--deepspeed_config", "ds_config.json", "--steps", "3", "--quiet")
        environment = rank_environment(0, 1, free_port())
        result = run(clean_python, "-m", "ds_fp8", *script, cwd=tmp_path, **environment)
        (banner,) = (line for line in result.stderr.splitlines() if line.startswith("[ds_fp8] ds_fp8 "))
        assert ": ON, O2, ZeRO 2, 1 rank |" in banner
