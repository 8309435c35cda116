"""Arrays as data modules take them: read from an ``.npz`` file or a folder, checked, and standardised."""

import lzma
import os
import re
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

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
# Blocks of 512 KiB in float64: statistics are exact for every input dtype without a float64 copy of the data.
_ELEMENTS_PER_BLOCK = 2**16


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


class Shards(list[np.ndarray]):
    """The parts of one array, one after the other, each memory-mapped from a file of its own."""


def read_folder(
    path: str | PathLike[str], *, required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Shards]:
    """Map arrays from a folder that holds ``KEY.npy``, or ``KEY-00000.npy``, ``KEY-00001.npy``, ... for each key.

    Args:
        path: the folder.
        required: keys that it must hold.
        optional: keys that are read where it holds them. Others are left unread.

    Returns:
        The arrays by key. Nothing is read before it is used, and nothing is unpickled.

    Raises:
        ValueError: If there is no such folder, it lacks a required key, a file is damaged or holds Python objects, or
            the shards of an array do not fit each other.
    """
    path = existing_folder("path", path)
    files: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.npy")):
        files.setdefault(re.sub(r"-\d+$", "", file.stem), []).append(file)
    require_keys(files, required, f"'{path}'")
    return {key: _read_shards(files[key]) for key in (*required, *optional) if key in files}


def existing_file(path: str | PathLike[str]) -> Path:
    """Return ``path``, raising ``ValueError`` unless there is a file, and ``TypeError`` unless it is a path."""
    return _existing("path", path, "file", Path.is_file)


def existing_folder(name: str, path: str | PathLike[str]) -> Path:
    """Return an argument, raising ``ValueError`` unless it is a folder, and ``TypeError`` unless it is a path."""
    return _existing(name, path, "folder", Path.is_dir)


def _existing(name: str, path: str | PathLike[str], what: str, is_there: Callable[[Path], bool]) -> Path:
    if not isinstance(path, str | PathLike):
        raise UserTypeError(f"Expected `{name}` to be a path, but got {path!r}.")
    path = Path(path)
    if "\0" in str(path) or not is_there(path):
        raise UserValueError(f"Expected `{name}` to be an existing {what}, but got {str(path)!r}.")
    return path


def require_keys(present: Iterable[str], required: Iterable[str], holder: str) -> None:
    """Raise ``ValueError`` with the keys that ``holder`` has, if it lacks some of those required."""
    present = list(present)
    missing = [key for key in required if key not in present]
    if missing:
        raise UserValueError(
            f"Expected {holder} to hold {_quoted(required)}, but it lacks {_quoted(missing)}:"
            f" it holds {_quoted(present) or 'nothing'}."
        )


def check_arrays(arrays: Any, required: Iterable[str] = ()) -> dict[str, Any]:
    """Return the arrays that an argument holds, raising ``TypeError`` unless it is a mapping with the keys required."""
    if not isinstance(arrays, Mapping):
        raise UserTypeError(f"Expected `arrays` to be a mapping of arrays by key, but got {type(arrays).__name__}.")
    require_keys(arrays, required, "`arrays`")
    return dict(arrays)


def as_tensor(key: str, array: Tensor | np.ndarray | Shards) -> Tensor:
    """Return an array of real numbers as a tensor on the CPU that shares its memory where it can.

    Raises:
        TypeError: If it is no tensor or array, or does not hold real numbers.
    """
    if isinstance(array, Shards):
        array = array[0] if len(array) == 1 else np.concatenate(array)
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "biuf":
            raise UserTypeError(f"Expected `{key}` to hold real numbers, but got dtype {array.dtype}.")
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        # torch takes native byte order only, and warns of arrays that it may not write to.
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))
    if not isinstance(array, Tensor):
        raise UserTypeError(
            f"Expected `{key}` to be a torch.Tensor or a numpy.ndarray, but got {type(array).__name__}."
        )
    if array.layout != torch.strided or array.is_quantized or array.is_meta or array.is_nested:
        raise UserTypeError(f"Expected `{key}` to be a dense tensor that holds its numbers, but got another kind.")
    if array.is_complex():
        raise UserTypeError(f"Expected `{key}` to hold real numbers, but got dtype {array.dtype}.")
    return array.detach().cpu()


def check_finite(key: str, values: Tensor) -> None:
    """Raise ``ValueError`` with their number, if there are values that are not finite."""
    if not values.is_floating_point():
        return
    nans = infinities = 0
    for block in torch.split(values.flatten(), _ELEMENTS_PER_BLOCK):
        if not block.isfinite().all():
            nans, infinities = nans + int(block.isnan().sum()), infinities + int(block.isinf().sum())
    if nans or infinities:
        raise UserValueError(
            f"Expected `{key}` to hold finite numbers, but got {nans} NaN and {infinities} infinite among "
            f"{values.numel()}."
        )


def selectable(values: Tensor) -> Tensor:
    """Return values in a dtype that torch can select rows of and subtract from."""
    if values.dtype == torch.bool:
        return values.view(torch.uint8)
    return values.double() if values.dtype in (torch.uint16, torch.uint32, torch.uint64) else values


class Rows:
    """Rows (N, D) that lie in one tensor, or in the tensors of several shards one after the other.

    Example:
        >>> rows = Rows([torch.zeros(2, 3), torch.ones(4, 3)])
        >>> rows.shape, rows.select(torch.tensor([5, 0]))
        ((6, 3), tensor([[1., 1., 1.],
                [0., 0., 0.]]))
    """

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = parts
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        self.shape = (int(self.starts[-1]), parts[0].shape[1])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, index: Tensor) -> Tensor:
        """Return a copy of the rows of an index (B,), int64, as (B, D)."""
        if len(self.parts) == 1:
            # A quarter of the time that tensor[rows] takes.
            return self.parts[0].index_select(0, index)
        part_of_row = torch.bucketize(index, self.starts[1:], right=True)
        order = torch.argsort(part_of_row)
        within = (index - self.starts[part_of_row])[order]
        counts = torch.bincount(part_of_row, minlength=len(self.parts)).tolist()
        by_part = [
            part.index_select(0, rows)
            for part, rows in zip(self.parts, torch.split(within, counts), strict=True)
            if len(rows)
        ]
        return torch.empty(len(index), self.shape[1], dtype=self.dtype).index_copy_(0, order, torch.cat(by_part))

    def blocks(self, index: Tensor) -> Iterator[Tensor]:
        """Yield the rows of an index in float64, so many at a time that a block is small; its memory is used again."""
        buffer = torch.empty(max(1, _ELEMENTS_PER_BLOCK // self.shape[1]), self.shape[1], dtype=torch.float64)
        for chunk in torch.split(index, len(buffer)):
            yield buffer[: len(chunk)].copy_(self.select(chunk))


@dataclass(frozen=True)
class Standardisation:
    """The map x -> (x - mean) / scale, a column at a time.

    Args:
        mean: training mean of each column, shape (D,), float64.
        scale: training standard deviation of each column (biased, as in scikit-learn), shape (D,), float64;
            1 where the column is constant in training, so that it becomes 0 instead of NaN.

    Example:
        >>> standardise = Standardisation.fit(torch.tensor([[0.0, 7.0], [2.0, 7.0]]))
        >>> standardise(torch.tensor([[0.0, 7.0], [4.0, 8.0]]))
        tensor([[-1.,  0.],
                [ 3.,  1.]])
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, inputs: Tensor | Rows, index: Tensor | None = None) -> "Standardisation":
        """Measure the columns of training rows: those of ``index`` among inputs (N, D), of any real dtype."""
        rows = Rows([inputs]) if isinstance(inputs, Tensor) else inputs
        index = torch.arange(len(rows)) if index is None else index
        total, squares = torch.zeros(2, rows.shape[1], dtype=torch.float64)
        for block in rows.blocks(index):
            total += block.sum(0)
        mean = total / len(index)
        first = rows.select(index[:1]).double()
        constant = torch.ones(rows.shape[1], dtype=torch.bool)
        for block in rows.blocks(index):
            # The mean of equal numbers may be off by a rounding error, which must not pass for a deviation.
            constant &= (block == first).all(0)
            squares += block.sub_(mean).square_().sum(0)
        variance = squares / len(index)
        return cls(mean, variance.sqrt().masked_fill(constant | (variance == 0), 1.0))

    @classmethod
    def identity(cls, num_features: int) -> "Standardisation":
        """Return the map that changes nothing."""
        return cls(torch.zeros(num_features, dtype=torch.float64), torch.ones(num_features, dtype=torch.float64))

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return not self.mean.any() and bool((self.scale == 1).all())

    def __call__(self, inputs: Tensor | Rows, out: Tensor | None = None) -> Tensor:
        """Standardise rows (N, D) of any real dtype into a new tensor (N, D), float32, or into ``out``."""
        parts = [inputs] if isinstance(inputs, Tensor) else inputs.parts
        outputs = torch.empty(inputs.shape, dtype=torch.float32) if out is None else out
        blocks = (block for part in parts for block in torch.split(part, max(1, _ELEMENTS_PER_BLOCK // part.shape[1])))
        start = 0
        for block in blocks:
            outputs[start : start + len(block)] = (block - self.mean).div_(self.scale)
            start += len(block)
        return outputs


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _open(path: Path) -> np.lib.npyio.NpzFile:
    try:
        return cast(np.lib.npyio.NpzFile, np.load(path, allow_pickle=False))
    except (*_DAMAGED, ValueError) as error:
        raise UserValueError(f"Expected `path` to be an .npz archive, but '{path}' is damaged: {error}.") from None


def _check_size(archive: np.lib.npyio.NpzFile, keys: Iterable[str], path: Path) -> None:
    """Refuse an archive that says it is larger than memory; a member is never read beyond the size that it says."""
    assert archive.zip is not None
    members = [(member.filename.removesuffix(".npy"), member.file_size) for member in archive.zip.infolist()]
    names = [name for name, _ in members]
    for key in keys:
        # numpy reads `x` itself where there is `x` beside `x.npy`, and the last of two members of one name.
        if names.count(key) > 1:
            raise UserValueError(f"Expected '{path}' to hold one `{key}`, but it holds {names.count(key)}.")
    size, memory = sum(size for name, size in members if name in keys), _memory()
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
    except (ValueError, TypeError) as error:
        # numpy has no narrower type for a pickled array, nor for a header that it cannot parse.
        raise UserValueError(
            f"Expected `{key}` in '{path}' to be an array of numbers, but it cannot be read as one: {error}"
        ) from None
    if not isinstance(array, np.ndarray):
        raise UserValueError(f"Expected `{key}` in '{path}' to be an array, but it is some other file in the archive.")
    return array


def _read_shards(files: list[Path]) -> Shards:
    shards = Shards()
    for file in files:
        try:
            # Copy on write: torch takes no array that it may not write to, and the file stays as it is.
            shard = np.load(file, mmap_mode="c", allow_pickle=False)
        except (*_DAMAGED, ValueError, TypeError) as error:
            raise UserValueError(f"Expected '{file}' to be an array of numbers, but it is damaged: {error}.") from None
        if not isinstance(shard, np.ndarray) or shard.ndim == 0:
            raise UserValueError(f"Expected '{file}' to be an array of rows, but it holds something else.")
        first = shards[0] if shards else shard
        same_dtype = shard.dtype == first.dtype or shard.dtype.kind == first.dtype.kind == "U"
        if shard.shape[1:] != first.shape[1:] or not same_dtype:
            raise UserValueError(
                f"Expected '{file}' to fit '{files[0].name}', rows {first.shape[1:]} of {first.dtype}, but got "
                f"{shard.shape[1:]} of {shard.dtype}."
            )
        shards.append(shard)
    return shards
