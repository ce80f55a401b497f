"""The README as PyPI shows it: there no link of this repository leads anywhere, so each becomes absolute.

All else is in pyproject.toml. A link leads into `Source` of [project.urls] if there is one, else to the
files of the release, whose sdist holds the page. A picture that no host serves becomes its description.
"""

import re
from pathlib import Path

from setuptools import setup

try:
    import tomllib
except ImportError:
    import tomli as tomllib  # Python 3.10

ROOT = Path(__file__).parent
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?://|mailto:|#)(?P<path>[^)\s]+)\)")


def long_description(readme: str, urls: dict[str, str], version: str) -> str:
    """The text with absolute links only."""
    source = urls.get("Source")

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link["picture"], link["text"], link["path"]
        if source:
            return f"{picture}[{text}]({source}/{'raw' if picture else 'blob'}/v{version}/{path})"
        return f"*{text}*" if picture else f"[{text}]({urls['Homepage']}{version}/#files)"

    return LINK.sub(absolute, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (release,) = re.findall(
        r'^__version__ = "(.+)"$', (ROOT / "ds_fp8" / "__init__.py").read_text(), re.MULTILINE
    )
    setup(
        long_description=long_description(
            (ROOT / "README.md").read_text(encoding="utf-8"), project["urls"], release
        ),
        long_description_content_type="text/markdown",
    )
