"""Inputs without labels, to predict for: rows, texts or images."""

import csv
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer
from glai_lightning.datamodules.arrays import as_tensor, check_finite, read_archive
from glai_lightning.datamodules.base import QuietDataModule, expect_callable
from glai_lightning.datamodules.images import ToTensor, read_image
from glai_lightning.datamodules.tables import read_table
from glai_lightning.fitting.table_columns import table_of

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TABLES = (".csv", ".parquet")


class UnlabelledDataModule(QuietDataModule):
    r"""Batches of inputs without labels for ``Trainer.predict``, from one file or folder.

    An ``.npz`` file holds rows as ``x``. A CSV file holds rows of numbers, with a header or without one, or a column of
    texts. For a module that was fitted on a ``TableDataModule``, a CSV or parquet file holds the columns of that table.
    Of a folder all images are read, those of its subfolders too, in the order of their names. Rows are flattened for a
    module without a backbone, and standardised by the statistics that the module keeps of its fit. A batch of rows or
    images is a tensor; a batch of texts is a list with the list of texts in it.

    Args:
        path: the file or folder.
        transform: from a PIL image to one, or to a tensor, of the size that the backbone takes.
        text_column: name of the column of the texts.
        batch_size: inputs in a batch.

    Attributes:
        names: the name of each input: its row, from 0, or the path of its image below ``path``.

    Raises:
        TypeError: if ``path`` is not a path, or ``batch_size`` not an integer.
        ValueError: if there is no such file, or an argument is out of its range; from ``setup``, if it cannot be read,
            or holds no inputs.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "rows.csv")
        ...     written = path.write_text("width,height\n1,2\n3,4\n5,6\n")
        ...     data = UnlabelledDataModule(path, batch_size=2)
        ...     data.setup("predict")
        >>> next(iter(data.predict_dataloader())), data.names
        (tensor([[1., 2.],
                [3., 4.]]), [0, 1, 2])
    """

    def __init__(
        self,
        path: str | PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        text_column: str = "text",
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        expect_integer("batch_size", batch_size, least=1)
        if not isinstance(path, str | PathLike):
            raise UserTypeError(f"Expected `path` to be a path, but got {path!r}.")
        expect_callable("transform", transform)
        self.path = Path(path)
        if not str(path) or "\0" in str(path) or not self.path.exists():
            raise UserValueError(f"Expected `path` to be an existing file or folder, but got '{path}'.")
        self.transform = transform
        self.text_column = text_column
        self.batch_size = batch_size
        self.names: list[int] | list[str] = []
        self._inputs: Any = None

    @property
    def num_features(self) -> int | None:
        """Numbers in a row; ``None`` for texts and images."""
        return self._inputs[0].numel() if isinstance(self._inputs, Tensor) else None

    def setup(self, stage: str | None = None) -> None:
        """Read the inputs; for a module, rows of a table are read later, when its checkpoint is loaded."""
        super().setup(stage)
        if self._inputs is None and not self._waits:
            self._set(self._read())

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the inputs, in their order."""
        if self._waits:
            # Only by now the module knows which columns it was fitted to.
            table = table_of(self._module)
            self._set(self._read() if table is None else table.encode(read_table(self.path), f"'{self.path}'"))
        return DataLoader(_Batches(self._batch, len(self._inputs), self.batch_size), batch_size=None)

    @property
    def _waits(self) -> bool:
        return self._module is not None and self.path.suffix in _TABLES

    def _set(self, inputs: Any) -> None:
        if len(inputs) == 0:
            raise UserValueError(f"Expected inputs in '{self.path}', but got none.")
        self._inputs = inputs
        self.names = list(map(str, inputs)) if self.path.is_dir() else list(range(len(inputs)))

    @property
    def _module(self) -> Any:
        return None if self.trainer is None else self.trainer.lightning_module

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Flatten and standardise the rows of a module without a backbone."""
        module = self._module
        if not isinstance(batch, Tensor) or module is None or getattr(module, "backbone", None) is not None:
            return batch
        standardise, rows = getattr(module, "standardise", None), batch.flatten(1)
        if standardise is None:
            return rows.float()
        if rows.shape[1] != len(standardise.scale):
            raise UserValueError(
                f"Expected rows of the {len(standardise.scale)} numbers that the head takes in '{self.path}', but got "
                f"{rows.shape[1]}."
            )
        return standardise(rows).float()

    def _batch(self, rows: slice) -> Any:
        inputs = self._inputs[rows]
        if not self.path.is_dir():
            # A list alone would pass for inputs and targets.
            return inputs if isinstance(inputs, Tensor) else [inputs]
        images = list(map(ToTensor(self.transform), (read_image(self.path / name) for name in inputs)))
        for name, image in zip(inputs, images, strict=True):
            if image.shape != images[0].shape:
                raise UserValueError(
                    f"Expected images of one size, or a `transform` to one, but got {tuple(images[0].shape)} for "
                    f"'{inputs[0]}' and {tuple(image.shape)} for '{name}'."
                )
        return torch.stack(images)

    def _read(self) -> Any:
        if self.path.is_dir():
            found = (file for file in self.path.rglob("*") if file.suffix.lower() in _IMAGES)
            return sorted(file.relative_to(self.path) for file in found)
        if self.path.suffix in _TABLES:
            return self._read_csv()
        inputs = as_tensor("x", read_archive(self.path, required=("x",))["x"])
        check_finite("x", inputs)
        return inputs

    def _read_csv(self) -> Any:
        if self.path.suffix != ".csv":
            raise UserValueError(f"Expected a checkpoint of a fit on a `TableDataModule` for '{self.path}'.")
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                lines = [line for line in csv.reader(file, strict=True) if line]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserValueError(f"Expected a CSV file in UTF-8, but got '{self.path}': {error}.") from error
        header = lines[0] if lines else []
        if self.text_column in header:
            return [line[header.index(self.text_column)] for line in lines[1:]]
        first = 0 if all(map(_is_number, header)) else 1
        for number, line in enumerate(lines[first:]):
            if len(line) != len(header) or not all(map(_is_number, line)):
                raise UserValueError(
                    f"Expected '{self.path}' to hold {len(header)} numbers in each row, or a column "
                    f"{self.text_column!r} of texts, but got {line!r} in row {number}."
                )
        return torch.tensor([list(map(float, line)) for line in lines[first:]])


class _Batches(Dataset[Any]):
    def __init__(self, batch: Callable[[slice], Any], num_inputs: int, batch_size: int) -> None:
        self.batch, self.num_inputs, self.batch_size = batch, num_inputs, batch_size

    def __len__(self) -> int:
        return -(-self.num_inputs // self.batch_size)

    def __getitem__(self, number: int) -> Any:
        if number >= len(self):
            raise IndexError
        return self.batch(slice(number * self.batch_size, (number + 1) * self.batch_size))


def _is_number(text: str) -> bool:
    try:
        return torch.isfinite(torch.tensor(float(text))).item() is True
    except ValueError:
        return False
