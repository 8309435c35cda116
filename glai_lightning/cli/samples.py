"""Labelled samples in a file or folder, as inputs and targets of the statistics of a module."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glai_lightning.checks import UserValueError
from glai_lightning.datamodules import UnlabelledDataModule
from glai_lightning.datamodules.arrays import as_tensor, read_archive
from glai_lightning.datamodules.tables import read_table, target_values
from glai_lightning.datamodules.texts import read_columns
from glai_lightning.fitting.table_columns import TableColumns, require_columns, table_of
from glai_lightning.modules.supervised import SupervisedModule

#: Samples whose features are computed at once.
_ROWS = 512
_TABLES = (".csv", ".parquet")


def is_samples(data: str) -> bool:
    """Tell whether a path names samples, and not statistics."""
    return Path(data).is_dir() or Path(data).suffix in (".npz", *_TABLES)


def labelled_batches(
    data: str, module: SupervisedModule, classes: Sequence[Any] | None, column: str
) -> Iterator[tuple[Any, Any]]:
    """Yield batches (inputs as they come, targets) of labelled samples.

    Args:
        data: an ``.npz`` file with rows `x` and targets `y`; a CSV or parquet file with the columns that the module was
            fitted to, texts in a column `text`, or numbers; or a folder with a folder of images for each class.
        module: what the inputs are for.
        classes: labels of the classes that are known.
        column: name of the column of the targets.

    Raises:
        ValueError: if there is no such file, it cannot be read, or it holds other inputs than the module takes.
    """
    inputs, targets = _read(data, module, column)
    if module.task == "classification" and targets.dtype.kind == "f" and (targets == targets.round()).all():
        targets = targets.astype(np.int64)
    # Names, or numbers that are the names of classes.
    numbered = classes is not None and all(isinstance(label, str) and label.isdecimal() for label in classes)
    named = targets.dtype.kind in "US" or (targets.dtype.kind in "iu" and numbered)
    start = 0
    for batch in inputs:
        part = targets[start : start + len(batch)]
        yield batch, part.astype(str).tolist() if named else as_tensor("y", part)
        start += len(part)


def _read(data: str, module: SupervisedModule, column: str) -> tuple[Iterable[Any], np.ndarray]:
    path = Path(data)
    if not path.exists():
        raise UserValueError(f"Expected samples in an existing file or folder, but got '{data}'.")
    if path.is_dir():
        images = UnlabelledDataModule(path, batch_size=_ROWS)
        images.setup()
        parts = [Path(str(name)).parts for name in images.names]
        alone = next((name for name, (first, *rest) in zip(images.names, parts, strict=True) if not rest), None)
        if alone is not None:
            raise UserValueError(f"Expected a folder of images for each class in '{data}', but got '{alone}' in none.")
        return images.predict_dataloader(), np.array([first for first, *_ in parts])
    if path.suffix in _TABLES and hasattr(module.backbone, "tokenize"):
        texts, names = read_columns(path, "text", column)
        return _portions(texts), np.array(names)
    rows, targets = _read_table(path, module, column) if path.suffix in _TABLES else _read_arrays(data)
    width = None if module.backbone is not None or module.standardise is None else module.standardise.scale.numel()
    if width is not None and rows[:1].size not in (0, width):
        raise UserValueError(f"Expected rows of {width} numbers in '{data}', but got {rows[:1].size}.")
    return (as_tensor("x", part) for part in _portions(rows)), targets


def _read_table(path: Path, module: SupervisedModule, column: str) -> tuple[np.ndarray, np.ndarray]:
    frame, source = read_table(path), f"'{path}'"
    require_columns(frame, [column], source)
    columns = table_of(module)
    if columns is None:
        numbers = [name for name in frame.columns if name != column]
        columns = TableColumns(numbers, [], fills=[0.0] * len(numbers))
    return columns.encode(frame, source).numpy(), target_values(frame, [column], source)


def _read_arrays(data: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = read_archive(data, required=(), optional=("x", "y", "x_train", "y_train"))
    pair = ("x", "y") if "x" in arrays else ("x_train", "y_train")
    missing = [key for key in pair if key not in arrays]
    if missing or len(arrays[pair[0]]) != len(arrays[pair[1]]):
        raise UserValueError(
            f"Expected '{data}' to hold as many targets `y` as rows `x` (or `y_train` and `x_train`), but got "
            f"{'no `' + missing[0] + '`' if missing else 'other numbers of them'}."
        )
    return arrays[pair[0]], arrays[pair[1]]


def _portions(samples: Any) -> Iterator[Any]:
    return (samples[start : start + _ROWS] for start in range(0, len(samples), _ROWS))
