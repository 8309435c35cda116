"""What a fit on a table learned of its columns, in primitives that travel in a checkpoint: rows to inputs of a head."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, listed


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table that a head reads, and how rows become inputs: numbers as they are, categories one-hot.

    Args:
        numbers: names of the columns of numbers.
        categories: names of the columns of categories.
        imputes: whether missing values are filled; otherwise they are refused.
        fills: what fills a column: medians of numbers, then the most frequent categories.
        known: for each column of categories, the categories that have an input each.
        rare: likewise, the categories that share one more input.

    Example:
        >>> import pandas
        >>> columns = TableColumns(["size"], ["colour"], False, [2.0, "red"], [["blue", "red"]], [[]])
        >>> columns.encode(pandas.DataFrame({"colour": ["red", "green"], "size": [3, 4]})).tolist()
        [[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]]
    """

    numbers: list[str]
    categories: list[str]
    imputes: bool = False
    fills: list[float | str] = field(default_factory=list)
    known: list[list[str]] = field(default_factory=list)
    rare: list[list[str]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, entries: Any) -> "TableColumns":
        """Return what ``as_dict`` returned, maybe from a file.

        Raises:
            ValueError: if it is something else.
        """
        try:
            columns = cls(**entries)
            assert len(columns.fills) == len(columns.numbers) + len(columns.categories)
            assert len(columns.known) == len(columns.rare) == len(columns.categories)
        except (TypeError, AssertionError) as error:
            raise UserValueError(f"Expected the columns of a table in the checkpoint, but got {entries!r}.") from error
        return columns

    def as_dict(self) -> dict[str, Any]:
        """Return it as primitives."""
        return asdict(self)

    def encode(self, frame: Any, source: str = "the table") -> Tensor:
        """Return the inputs (N, D), float64, of the rows of a ``pandas.DataFrame``, not standardised.

        Args:
            frame: rows with the columns that are read; others are left alone.
            source: what the rows are, for messages.

        Raises:
            TypeError: if a column of categories holds dates or other objects.
            ValueError: if a column is missing, or values are, and they are not imputed, or are not finite.
        """
        parts = [np.empty((len(frame), 0))]
        for values, fill in zip(self.cleaned(frame, source), self.fills, strict=True):
            if values.dtype != object:
                parts.append(np.where(np.isnan(values), fill, values)[:, None])
                continue
            column = len(parts) - 1 - len(self.numbers)
            known, rare = self.known[column], self.rare[column]
            place = {name: number for number, name in enumerate(known)} | dict.fromkeys(rare, len(known))
            # An unknown category is a rare one where there are such; otherwise it has no input.
            width = len(known) + bool(rare)
            places = [place.get(str(fill) if value is None else value, len(known)) for value in values]
            parts.append(np.eye(len(known) + 1)[places][:, :width])
        return torch.from_numpy(np.hstack(parts))

    def cleaned(self, frame: Any, source: str) -> list[np.ndarray]:
        """Return the columns of numbers as float64, and those of categories as strings; NaN and ``None`` are missing.

        Raises:
            TypeError: if a column of categories holds dates or other objects.
            ValueError: if a column is missing, or values are, and they are not imputed, or are not finite.
        """
        require_columns(frame, [*self.numbers, *self.categories], source)
        absent = {name: int(frame[name].isna().sum()) for name in (*self.numbers, *self.categories)}
        lacking = [f"{name!r} ({number})" for name, number in absent.items() if number]
        if lacking and not self.imputes:
            raise UserValueError(
                f"Expected a value in every row of {source}, but got missing ones in the columns {listed(lacking)}. "
                "With `on_missing='impute'` they are imputed."
            )
        numbers = [_as_numbers(frame[name], source) for name in self.numbers]
        return [*numbers, *(_as_categories(frame[name], source) for name in self.categories)]


def require_columns(frame: Any, names: Sequence[str], source: str) -> None:
    """Check that a table has columns, each of them once.

    Raises:
        ValueError: otherwise.
    """
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


def table_of(holder: Any) -> TableColumns | None:
    """Return the columns that a data module was fitted to, or that a module has kept of its fit; ``None`` if none."""
    found = getattr(holder, "table", None)
    return found if isinstance(found, TableColumns) else None


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
    # Whole numbers are read as floats where others of their column are missing.
    texts = (str(int(x)) if isinstance(x, float) and x.is_integer() else str(x) for x in column)
    values = np.array(list(texts), dtype=object)
    values[column.isna().to_numpy()] = None
    return values
