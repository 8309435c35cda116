"""Arrays out of an ``.npz`` file, with an error that says what is wrong with it."""

import zipfile
import zlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import numpy as np


def read_archive(
    path: str | PathLike[str], *, required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Read arrays from an ``.npz`` file; nothing in the file is ever unpickled.

    Args:
        path: the file.
        required: keys that it must hold.
        optional: keys that are read where it holds them. Others are left unread.

    Returns:
        The arrays by key, with the dtypes and shapes of the file.

    Raises:
        ValueError: If the file is missing, is not an ``.npz`` archive, is damaged, lacks a required key, or
            holds Python objects under one of the keys.
    """
    path = existing_file(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Expected `path` to be an .npz archive, but '{path}' is not one, or is cut short.")
    with np.load(path, allow_pickle=False) as archive:
        require_keys(archive.files, required, f"'{path}'")
        wanted = [*required, *(key for key in optional if key in archive.files)]
        return {key: _read_array(archive, key, path) for key in wanted}


def existing_file(path: str | PathLike[str]) -> Path:
    """Return ``path``, raising ``ValueError`` unless there is a file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Expected `path` to be an existing file, but got '{path}'.")
    return path


def require_keys(present: Iterable[str], required: Iterable[str], holder: str) -> None:
    """Raise ``ValueError`` with the keys that ``holder`` has, if it lacks some of those required."""
    present = list(present)
    missing = [key for key in required if key not in present]
    if missing:
        raise ValueError(
            f"Expected {holder} to hold {_listed(required)}, but it lacks {_listed(missing)}:"
            f" it holds {_listed(present) or 'nothing'}."
        )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _read_array(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    try:
        array = archive[key]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"Expected `{key}` in '{path}' to be readable, but it is damaged: {error}.") from None
    except ValueError as error:
        # numpy has no narrower type for a pickled array, nor for a header that it cannot parse.
        raise ValueError(
            f"Expected `{key}` in '{path}' to be an array of numbers, but it cannot be read as one: {error}"
        ) from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"Expected `{key}` in '{path}' to be an array, but it is some other file in the archive.")
    return array
