"""The recipes that come with the package: YAML configurations for the ``glai`` command."""

from importlib.resources import files
from pathlib import Path

from glai_lightning.checks import UserValueError

_RECIPES = files("glai_lightning.recipes")


def list_recipes() -> dict[str, str]:
    """Return the description of every shipped recipe, by name.

    Example:
        >>> "supervised" in list_recipes()
        True
    """
    names = sorted(file.name for file in _RECIPES.iterdir() if file.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): _first_comment(_read(name)) for name in names}


def copy_recipe(name: str, folder: Path, *, overwrite: bool = False) -> Path:
    """Copy a shipped recipe.

    Args:
        name: its name, one of ``list_recipes()``.
        folder: where to; made if it is not there.
        overwrite: whether a file of that name may be replaced.

    Returns:
        The copy.

    Raises:
        ValueError: if there is no such recipe, ``folder`` is a file, or the copy would replace a file.
    """
    names = list_recipes()
    if name not in names:
        raise UserValueError(f"Expected the recipe to be one of {', '.join(map(repr, names))}, but got {name!r}.")
    if folder.exists() and not folder.is_dir():
        raise UserValueError(f"Expected `--to` to be a folder, but got the file '{folder}'.")
    copy = folder / f"{name}.yaml"
    if copy.exists() and not overwrite:
        raise UserValueError(f"Expected '{copy}' not to exist, but it does: give `--overwrite` to replace it.")
    folder.mkdir(parents=True, exist_ok=True)
    copy.write_text(_read(copy.name), encoding="utf-8")
    return copy


def _read(file_name: str) -> str:
    return (_RECIPES / file_name).read_text(encoding="utf-8")


def _first_comment(text: str) -> str:
    return next((line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")), "")
