"""Labelled texts in a CSV file, for backbones that read strings."""

import csv
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from glai_lightning.checks import UserTypeError, UserValueError, listed
from glai_lightning.datamodules.arrays import existing_file
from glai_lightning.datamodules.base import Splits
from glai_lightning.datamodules.cached import CachingDataModule


class TextRows(Dataset[tuple[list[str], Tensor]]):
    """Batches ``(texts, labels)``: a list of strings, as the text backbones take it, and labels (batch,), int64.

    Example:
        >>> TextRows(["good", "bad", "fine"], torch.tensor([1, 0, 1]))[torch.tensor([2, 1])]
        (['fine', 'bad'], tensor([1, 0]))
    """

    def __init__(self, texts: list[str], labels: Tensor) -> None:
        self.texts = texts
        self.labels = labels

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor | list[int]) -> tuple[list[str], Tensor]:
        index = torch.as_tensor(rows)
        return [self.texts[row] for row in index.tolist()], self.labels.index_select(0, index)


class TextsDataModule(CachingDataModule):
    r"""Batches ``(texts, labels)`` out of a CSV file with a header: a list of strings, and labels (batch,), int64.

    Labels may be any strings; they are numbered in sorted order, and ``classes`` lists them. All texts are held in
    memory. Training, validation and test rows are split by the seed.

    Args:
        path: the file, in UTF-8.
        text_column: name of the column of the texts.
        label_column: name of the column of their labels.
        batch_size: texts in a batch, in each process.
        val_fraction: part of the rows to validate on, in (0, 1), rounded to whole rows.
        test_fraction: part of the rows to test on, in [0, 1 - ``val_fraction``), 0 for no test.
        seed: of the splits and of the order, at least 0.
        cache: folder for the embeddings of the module's frozen backbone, which then sees each text once, whatever the
            number of epochs and fits, see ``docs/one_pass.md``; ``None`` for none.

    Raises:
        TypeError: If ``batch_size`` or ``seed`` is no int.
        ValueError: If there is no such file, or an argument is out of its range; from :meth:`setup`, if the file cannot
            be read as CSV, lacks a column or rows, a text or label is empty, or there are fewer than two classes.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "films.csv")
        ...     written = path.write_text("text,label\n" + "a good film,pro\na bad one,contra\n" * 5)
        ...     data = TextsDataModule(path, batch_size=2)
        ...     data.setup()
        >>> data.classes
        ['contra', 'pro']
    """

    def __init__(
        self,
        path: str | PathLike[str],
        text_column: str = "text",
        label_column: str = "label",
        batch_size: int = 64,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        seed: int = 0,
        cache: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            cache=cache, batch_size=batch_size, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed
        )
        self.path = existing_file(path)
        for name, column in (("text_column", text_column), ("label_column", label_column)):
            if not isinstance(column, str):
                raise UserTypeError(f"Expected `{name}` to be the name of a column, but got {column!r}.")
        self.text_column = text_column
        self.label_column = label_column

    def _read(self) -> Splits:
        texts, names = read_columns(self.path, self.text_column, self.label_column)
        classes = sorted(set(names))
        if len(classes) < 2:
            raise UserValueError(
                f"Expected at least two classes in the column {self.label_column!r} of '{self.path}', but got "
                f"{listed(map(repr, classes))}."
            )
        number = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([number[name] for name in names])
        sources = {
            split: TextRows([texts[row] for row in rows.tolist()], labels[rows])
            for split, rows in self._split(len(texts)).items()
        }
        return Splits(sources, num_classes=len(classes), classes=classes)


def read_columns(path: Path, *columns: str) -> tuple[list[str], ...]:
    """Read columns of a CSV file with a header, in UTF-8, each with an entry in every row.

    Args:
        path: the file.
        *columns: their names in the header.

    Returns:
        The entries of each column, without white space around them.

    Raises:
        ValueError: If the file cannot be read as CSV, lacks a column or rows, or an entry is empty or blank.
    """
    try:
        # With a byte order mark or without one.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserValueError(f"Expected `path` to be a CSV file in UTF-8, but got '{path}': {error}.") from error
    for column in columns:
        if column not in header:
            raise UserValueError(
                f"Expected '{path}' to have a column {column!r}, but got "
                f"{listed(map(repr, header)) or 'an empty file'}."
            )
    if not rows:
        raise UserValueError(f"Expected rows after the header of '{path}', but got none.")
    entries = {column: [(row[column] or "").strip() for row in rows] for column in columns}
    for column in columns:
        if "" in entries[column]:
            raise UserValueError(
                f"Expected an entry in the column {column!r} of every row of '{path}', but got an empty one in row "
                f"{entries[column].index('') + 1} after the header."
            )
    return tuple(entries[column] for column in columns)
