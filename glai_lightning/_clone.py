"""Finds, in a clone, the parts of the package that lie beside its folder.

Python looks into the current folder first. In a clone it finds ``glai_lightning/`` there, installed or not, but neither
``glai_lightning/callbacks`` nor what else the installation puts into it from the folders beside.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
_BESIDE = ("callbacks", "datamodules", "recipes")


class _FinderBeside:
    """The last of all finders, asked for what the others have not found."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, part = name.partition(".")
        if package != "glai_lightning" or part not in _BESIDE:
            return None
        folder = _PACKAGE.parent / part
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def find_parts_beside() -> None:
    """Let the parts beside the package's folder be imported, where they do not lie in it."""
    if not (_PACKAGE / _BESIDE[0]).is_dir():
        sys.meta_path.append(_FinderBeside)
