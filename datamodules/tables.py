"""Tables with named columns, numbers and categories, for heads that read numbers."""

from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice, listed
from glai_lightning.datamodules.arrays import Rows, Standardisation, existing_file
from glai_lightning.datamodules.base import SampleDataModule, Splits, expect_one
from glai_lightning.datamodules.features import FeatureRows
from glai_lightning.datamodules.targets import Targets, Task
from glai_lightning.fitting.table_columns import TableColumns, require_columns
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
        self._table: TableColumns | None = None

    @property
    def table(self) -> TableColumns:
        """The columns, and how their rows become inputs; they travel in the checkpoint of a ``HeadModule``."""
        self.setup()
        assert self._table is not None
        return self._table

    @property
    def feature_names(self) -> list[str]:
        """Names of the inputs: columns of numbers, and columns with each of their categories."""
        names = list(self.table.numbers)
        for column, known, rare in zip(self.table.categories, self.table.known, self.table.rare, strict=True):
            names += [f"{column}_{category}" for category in (*known, *(["rare"] if rare else ()))]
        return names

    def transform(self, frame: Any) -> Tensor:
        """Return the inputs (N, D), float32, of the rows of a ``pandas.DataFrame``, as a fit is given them.

        Args:
            frame: rows with the columns that are predicted from; others are left alone.

        Raises:
            ValueError: If a column is missing, or values are, and they are not imputed, or are not finite.
        """
        standardise = self.splits.standardisation
        assert standardise is not None
        return standardise(self.table.encode(frame, "`frame`"))

    def _read(self) -> Splits:
        frame: Any = self.frame if self.path is None else read_table(self.path)
        source = "`frame`" if self.path is None else f"'{self.path}'"
        require_columns(frame, [*self.target, *(self.columns or ()), *(self.categorical or ())], source)
        if len(frame) == 0:
            raise UserValueError(f"Expected {source} to hold rows, but it has none.")
        names = [name for name in frame.columns if name not in self.target] if self.columns is None else self.columns
        if not names:
            raise UserValueError(f"Expected {source} to have columns to predict from, but got {listed(self.target)}.")
        module = None if self.trainer is None else self.trainer.lightning_module
        task = getattr(module, "task", None) if self.task is None else self.task
        targets = Targets({"train": target_values(frame, self.target, source)}, task, key=self.target[0])
        rows = self._split(len(frame))
        of_split = {split: targets.of_split["train"][chosen] for split, chosen in rows.items()}
        targets.warn_of_rare_classes(of_split["train"], of_split["val"])

        is_numeric = _imported("pandas").api.types.is_numeric_dtype
        chosen_as_categories = self.categorical or ()
        numbers = [n for n in names if is_numeric(frame[n].dtype) and n not in chosen_as_categories]
        self._table = self._fit(frame, numbers, [name for name in names if name not in numbers], rows["train"], source)
        inputs = self._table.encode(frame, source)
        standardise = Standardisation.fit(inputs, rows["train"])
        standardise.mean[len(numbers) :], standardise.scale[len(numbers) :] = 0.0, 1.0
        prepared = Rows([standardise(inputs)])
        sources = {split: FeatureRows((prepared, None), of_split[split], chosen) for split, chosen in rows.items()}
        return Splits(sources, inputs.shape[1], targets.num_classes, targets.classes, standardise)

    def _fit(self, frame: Any, numbers: list[str], categories: list[str], train: Tensor, source: str) -> TableColumns:
        """Learn of the training rows what fills missing values, and which categories there are."""
        imputes = self.on_missing == "impute"
        cleaned = TableColumns(numbers, categories, imputes).cleaned(frame, source)
        impute, preprocessing = _imported("sklearn.impute"), _imported("sklearn.preprocessing")
        fills: list[float | str] = []
        known, rare = [], []
        for values in (column[train.numpy(), None] for column in cleaned):
            is_number = values.dtype != object
            missing = {"missing_values": np.nan if is_number else None, "keep_empty_features": True}
            filler = impute.SimpleImputer(strategy="median" if is_number else "most_frequent", **missing)
            filled = filler.fit_transform(values)
            fill = filler.statistics_[0]
            fills.append(float(fill) if is_number else str(fill))
            if not is_number:
                encoder = preprocessing.OneHotEncoder(
                    handle_unknown="infrequent_if_exist", max_categories=_MOST_CATEGORIES
                ).fit(filled.astype(str))
                shared = encoder.infrequent_categories_[0]
                rare.append([] if shared is None else list(map(str, shared)))
                known.append([name for name in map(str, encoder.categories_[0]) if name not in set(rare[-1])])
        return TableColumns(numbers, categories, imputes, fills, known, rare)


def target_values(frame: Any, target: list[str], source: str) -> np.ndarray:
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


def read_table(path: Path) -> Any:
    """Read a CSV or parquet file as a ``pandas.DataFrame``.

    Raises:
        ValueError: if it cannot be read.
    """
    pandas = _imported("pandas")
    is_parquet = path.suffix == ".parquet"
    if is_parquet:
        _imported("pyarrow")
    try:
        return pandas.read_parquet(path) if is_parquet else pandas.read_csv(path)
    except (ValueError, OSError) as error:
        kind = "a parquet file" if is_parquet else "a CSV file in UTF-8 with a header"
        raise UserValueError(f"Expected `path` to be {kind}, but got '{path}': {error}.") from None


def _expect_names(name: str, names: Any) -> None:
    if names is None and name != "target":
        return
    if not isinstance(names, list | tuple) or not names or not all(isinstance(each, str) for each in names):
        raise UserTypeError(f"Expected `{name}` to hold names of columns, but got {names!r}.")


def _imported(name: str) -> Any:
    """Import a module that tables need."""
    return import_optional(name, needed_for="`TableDataModule`", extra="table")
