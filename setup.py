"""The description for package indexes: README, with links to the files of this version."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def absolute(link: re.Match[str]) -> str:
    """Put the address of the repository before a relative target; pictures are wanted as they are."""
    return f"{link[0]}{PROJECT['urls']['Source']}/{'raw' if link[1] else 'blob'}/v{PROJECT['version']}/"


setup(
    long_description=re.sub(r"(!?)\[[^\]]*\]\((?!\w+:|#)", absolute, (ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
