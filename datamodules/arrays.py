"""Arrays out of an ``.npz`` file, with an error that says what is wrong with it."""

import lzma
import os
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np

from glai_lightning.checks import UserTypeError, UserValueError

#: What a damaged, encrypted or oddly packed archive raises.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    SyntaxError,
    tokenize.TokenError,
    UnicodeError,
)


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
        ValueError: If the file is missing, is not an ``.npz`` archive, is damaged, lacks a required key, holds
            Python objects under one of the keys, or unpacks to more than this machine's memory.
    """
    path = existing_file(path)
    if not zipfile.is_zipfile(path):
        raise UserValueError(f"Expected `path` to be an .npz archive, but '{path}' is not one, or is cut short.")
    with _open(path) as archive:
        require_keys(archive.files, required, f"'{path}'")
        wanted = [*required, *(key for key in optional if key in archive.files)]
        _check_size(archive, wanted, path)
        return {key: _read_array(archive, key, path) for key in wanted}


def existing_file(path: str | PathLike[str]) -> Path:
    """Return ``path``, raising ``ValueError`` unless there is a file, and ``TypeError`` unless it is a path."""
    if not isinstance(path, str | PathLike):
        raise UserTypeError(f"Expected `path` to be a path, but got {path!r}.")
    path = Path(path)
    if "\0" in str(path) or not path.is_file():
        raise UserValueError(f"Expected `path` to be an existing file, but got '{path}'.")
    return path


def require_keys(present: Iterable[str], required: Iterable[str], holder: str) -> None:
    """Raise ``ValueError`` with the keys that ``holder`` has, if it lacks some of those required."""
    present = list(present)
    missing = [key for key in required if key not in present]
    if missing:
        raise UserValueError(
            f"Expected {holder} to hold {_listed(required)}, but it lacks {_listed(missing)}:"
            f" it holds {_listed(present) or 'nothing'}."
        )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _open(path: Path) -> np.lib.npyio.NpzFile:
    try:
        return cast(np.lib.npyio.NpzFile, np.load(path, allow_pickle=False))
    except (*_DAMAGED, ValueError) as error:
        raise UserValueError(f"Expected `path` to be an .npz archive, but '{path}' is damaged: {error}.") from None


def _check_size(archive: np.lib.npyio.NpzFile, keys: Iterable[str], path: Path) -> None:
    """Refuse an archive that says it is larger than memory; a member is never read beyond the size that it says."""
    assert archive.zip is not None
    sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.zip.infolist()}
    size, memory = sum(sizes.get(key, 0) for key in keys), _memory()
    if size > memory:
        raise UserValueError(
            f"Expected '{path}' to fit into memory, {memory:,} bytes, but its arrays say that they take {size:,}."
        )


def _memory() -> int:
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_array(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    try:
        array = archive[key]
    except MemoryError:
        raise UserValueError(
            f"Expected `{key}` in '{path}' to fit into memory, but its header names a shape that does not."
        ) from None
    except _DAMAGED as error:
        raise UserValueError(f"Expected `{key}` in '{path}' to be readable, but it is damaged: {error}.") from None
    except ValueError as error:
        # numpy has no narrower type for a pickled array, nor for a header that it cannot parse.
        raise UserValueError(
            f"Expected `{key}` in '{path}' to be an array of numbers, but it cannot be read as one: {error}"
        ) from None
    if not isinstance(array, np.ndarray):
        raise UserValueError(f"Expected `{key}` in '{path}' to be an array, but it is some other file in the archive.")
    return array
