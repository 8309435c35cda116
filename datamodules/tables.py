"""Tables with named columns, numbers and categories, for heads that read numbers."""

import warnings
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice
from glai_lightning.datamodules.arrays import Rows, existing_file, listed
from glai_lightning.datamodules.base import SampleDataModule, Splits, expect_one
from glai_lightning.datamodules.features import FeatureRows
from glai_lightning.datamodules.targets import Targets, Task
from glai_lightning.optional import import_optional

#: Categories of a column beyond which the rarest share an input.
_MOST_CATEGORIES = 256


class TableDataModule(SampleDataModule):
    r"""Batches ``(inputs, targets)`` of a table, by the names of its columns: inputs (batch, D), float32.

    Columns of numbers and bools are standardised; columns of anything else are categories, and become an input each
    (one-hot). Categories beyond the 256 most frequent of a column share an input; those that no training row has become
    zeros. Missing values are refused, or imputed: by the median of numbers, by the most frequent category. All of this
    is scikit-learn's, fitted to the training rows, and :meth:`transform` does the same to new rows.

    Targets are read as in :class:`FeaturesDataModule`; several columns of numbers are values to predict (N, C).

    Args:
        path: a CSV file with a header, or a parquet file (``.parquet``).
        frame: a ``pandas.DataFrame`` instead of ``path``. It is not changed.
        target: name of the column to predict, or names of several columns of numbers.
        columns: names of the columns to predict from; ``None`` for all others.
        categorical: names of columns of numbers to take as categories, too.
        on_missing: 'raise' an error that names columns with missing values, or 'impute' them. A missing target is
            always an error.
        batch_size: rows in a batch, in each process.
        val_fraction: part of the rows to validate on, in (0, 1), rounded to whole rows.
        test_fraction: part of the rows to test on, in [0, 1 - ``val_fraction``), 0 for no test.
        seed: of the splits and of the order, at least 0.
        task: 'classification' or 'regression'; ``None`` to tell by the targets.

    Raises:
        ModuleNotFoundError: If pandas is not installed, or pyarrow for a parquet file.
        TypeError: If an argument is of the wrong type; from :meth:`setup`, if a column holds dates or other objects.
        ValueError: If both or none of ``path`` and ``frame`` are given, an argument is out of its range, or there is no
            such file; from :meth:`setup`, if the file cannot be read, lacks a column or rows, or values are missing or
            not finite.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"size": range(20), "colour": ["red", "blue"] * 10, "kind": ["a", "b"] * 10})
        >>> data = TableDataModule(frame=frame, target="kind")
        >>> data.feature_names, data.classes
        (['size', 'colour_blue', 'colour_red'], ['a', 'b'])
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, inputs.dtype, targets.dtype
        (torch.Size([12, 3]), torch.float32, torch.int64)
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        frame: Any = None,
        target: str | list[str] = "label",
        columns: list[str] | None = None,
        categorical: list[str] | None = None,
        on_missing: Literal["raise", "impute"] = "raise",
        batch_size: int = 256,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        seed: int = 0,
        task: Task | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
        expect_one(path=path, frame=frame)
        expect_choice("on_missing", on_missing, ("raise", "impute"))
        if task is not None:
            expect_choice("task", task, ("classification", "regression"))
        self.target = [target] if isinstance(target, str) else target
        for name, names in (("target", self.target), ("columns", columns), ("categorical", categorical)):
            _expect_names(name, names)
        pandas = _imported("pandas")
        if frame is not None and not isinstance(frame, pandas.DataFrame):
            raise UserTypeError(f"Expected `frame` to be a pandas.DataFrame, but got {type(frame).__name__}.")
        self.path = None if path is None else existing_file(path)
        self.frame = frame
        self.columns = columns
        self.categorical = categorical
        self.on_missing = on_missing
        self.task = task
        self._numbers: list[str] = []
        self._categories: list[str] = []
        self._parts: list[Any] = []

    @property
    def feature_names(self) -> list[str]:
        """Names of the inputs: columns of numbers, and columns with each of their categories."""
        self.setup()
        encoded = self._parts[-1].steps[-1][1].get_feature_names_out(self._categories) if self._categories else ()
        return [*map(str, self._numbers), *map(str, encoded)]

    def transform(self, frame: Any) -> Tensor:
        """Return the inputs (N, D), float32, of the rows of a ``pandas.DataFrame``, as a fit is given them.

        Args:
            frame: rows with the columns that are predicted from; others are left alone.

        Raises:
            ValueError: If a column is missing, or values are, and they are not imputed, or are not finite.
        """
        self.setup()
        return self._transformed(self._cleaned(frame, "`frame`"))

    def _read(self) -> Splits:
        frame: Any = self.frame if self.path is None else _read_table(self.path)
        source = "`frame`" if self.path is None else f"'{self.path}'"
        _require_columns(frame, [*self.target, *(self.columns or ()), *(self.categorical or ())], source)
        if len(frame) == 0:
            raise UserValueError(f"Expected {source} to hold rows, but it has none.")
        names = [name for name in frame.columns if name not in self.target] if self.columns is None else self.columns
        if not names:
            raise UserValueError(f"Expected {source} to have columns to predict from, but got {listed(self.target)}.")
        module = None if self.trainer is None else self.trainer.lightning_module
        task = getattr(module, "task", None) if self.task is None else self.task
        targets = Targets({"train": _target_values(frame, self.target, source)}, task, key=self.target[0])
        rows = self._split(len(frame))
        of_split = {split: targets.of_split["train"][chosen] for split, chosen in rows.items()}
        targets.warn_of_rare_classes(of_split["train"], of_split["val"])

        is_numeric = _imported("pandas").api.types.is_numeric_dtype
        chosen_as_categories = self.categorical or ()
        self._numbers = [n for n in names if is_numeric(frame[n].dtype) and n not in chosen_as_categories]
        self._categories = [name for name in names if name not in self._numbers]
        cleaned = self._cleaned(frame, source)
        train = rows["train"].numpy()
        self._parts = [part.fit(values[train]) for part, values in zip(self._make_parts(), cleaned, strict=True)]
        inputs = self._transformed(cleaned)
        sources = {
            split: FeatureRows((Rows([inputs]), None), of_split[split], chosen) for split, chosen in rows.items()
        }
        return Splits(sources, inputs.shape[1], targets.num_classes, targets.classes)

    def _make_parts(self) -> list[Any]:
        """Return what makes inputs of the columns of numbers, where there are some, and of those of categories."""
        impute, pipeline, preprocessing = (
            _imported(f"sklearn.{module}") for module in ("impute", "pipeline", "preprocessing")
        )
        encode = preprocessing.OneHotEncoder(
            handle_unknown="infrequent_if_exist", max_categories=_MOST_CATEGORIES, sparse_output=False
        )
        parts = []
        if self._numbers:
            fill = impute.SimpleImputer(strategy="median", keep_empty_features=True)
            parts.append(pipeline.make_pipeline(fill, preprocessing.StandardScaler()))
        if self._categories:
            fill = impute.SimpleImputer(strategy="most_frequent", keep_empty_features=True)
            parts.append(pipeline.make_pipeline(fill, encode))
        return parts

    def _transformed(self, cleaned: list[np.ndarray]) -> Tensor:
        with warnings.catch_warnings():
            # Categories that no training row has become zeros: that is documented.
            warnings.filterwarnings("ignore", "Found unknown categories")
            inputs = [part.transform(values) for part, values in zip(self._parts, cleaned, strict=True)]
        return torch.from_numpy(np.hstack(inputs).astype(np.float32))

    def _cleaned(self, frame: Any, source: str) -> list[np.ndarray]:
        """Return the columns of numbers, where there are some, as float64, and those of categories as strings."""
        _require_columns(frame, [*self._numbers, *self._categories], source)
        absent = {name: int(frame[name].isna().sum()) for name in (*self._numbers, *self._categories)}
        lacking = [f"{name!r} ({number})" for name, number in absent.items() if number]
        if lacking and self.on_missing == "raise":
            raise UserValueError(
                f"Expected a value in every row of {source}, but got missing ones in the columns {listed(lacking)}. "
                "With `on_missing='impute'` they are imputed."
            )
        numbers = [_as_numbers(frame[name], source) for name in self._numbers]
        categories = [_as_categories(frame[name], source) for name in self._categories]
        return [np.stack(columns, axis=1) for columns in (numbers, categories) if columns]


def _as_numbers(column: Any, source: str) -> np.ndarray:
    try:
        values: np.ndarray = column.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise UserValueError(f"Expected the column {column.name!r} of {source} to hold numbers: {error}.") from None
    if np.isinf(values).any():
        raise UserValueError(f"Expected the column {column.name!r} of {source} to hold finite numbers.")
    return values


def _as_categories(column: Any, source: str) -> np.ndarray:
    if column.dtype.kind in "mMc":
        raise UserTypeError(
            f"Expected the column {column.name!r} of {source} to hold numbers or categories, but got {column.dtype}: "
            "make numbers of it, or leave it out of `columns`."
        )
    values = np.array([str(value) for value in column], dtype=object)
    values[column.isna().to_numpy()] = np.nan
    return values


def _target_values(frame: Any, target: list[str], source: str) -> np.ndarray:
    """Return the values of a target column (N,), strings or numbers, or of several columns of numbers (N, C)."""
    columns: list[np.ndarray] = []
    for name in target:
        column = frame[name]
        if column.isna().any():
            raise UserValueError(
                f"Expected a target in every row of {source}, but the column {name!r} lacks {int(column.isna().sum())}."
            )
        if _imported("pandas").api.types.is_numeric_dtype(column.dtype):
            columns.append(column.to_numpy(dtype=bool if column.dtype == bool else column.dtype.type))
        else:
            columns.append(np.array([str(value) for value in column]))
    if len(columns) == 1:
        return columns[0]
    if any(values.dtype.kind == "U" for values in columns):
        raise UserValueError(f"Expected several targets to be columns of numbers, but got {listed(target)}.")
    return np.stack([values.astype(np.float64) for values in columns], axis=1)


def _read_table(path: Path) -> Any:
    pandas = _imported("pandas")
    is_parquet = path.suffix == ".parquet"
    if is_parquet:
        _imported("pyarrow")
    try:
        return pandas.read_parquet(path) if is_parquet else pandas.read_csv(path)
    except (ValueError, OSError) as error:
        kind = "a parquet file" if is_parquet else "a CSV file in UTF-8 with a header"
        raise UserValueError(f"Expected `path` to be {kind}, but got '{path}': {error}.") from None


def _require_columns(frame: Any, names: list[str], source: str) -> None:
    columns = list(frame.columns)
    missing = [name for name in names if name not in columns]
    if missing:
        raise UserValueError(
            f"Expected {source} to have the columns {listed(map(repr, missing))}, but got "
            f"{listed(map(repr, columns)) or 'none'}."
        )
    twice = sorted({name for name in names if columns.count(name) > 1})
    if twice:
        raise UserValueError(f"Expected {source} to have each column once, but got {listed(map(repr, twice))} twice.")


def _expect_names(name: str, names: Any) -> None:
    if names is None and name != "target":
        return
    if not isinstance(names, list | tuple) or not names or not all(isinstance(each, str) for each in names):
        raise UserTypeError(f"Expected `{name}` to hold names of columns, but got {names!r}.")


def _imported(name: str) -> Any:
    """Import a module that tables need."""
    return import_optional(name, needed_for="`TableDataModule`", extra="table")
