"""Features and labels in memory, for heads on cached features and for plain tables."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from glai_lightning.checks import UserValueError
from glai_lightning.datamodules.arrays import Standardisation, as_tensor, check_finite, require_keys, selectable
from glai_lightning.datamodules.base import SampleDataModule, Splits, array_reader, expect_one
from glai_lightning.datamodules.loader import TensorRows
from glai_lightning.datamodules.splits import SPLITS, split_samples

_REQUIRED_KEYS = ("x_train", "y_train", "x_test", "y_test")
_OPTIONAL_KEYS = ("x_val", "y_val")

_Rows = tuple[Tensor, Tensor]


class FeaturesDataModule(SampleDataModule):
    """Labelled features from an ``.npz`` file or from arrays, standardised, in batches ``(inputs, targets)``.

    The keys are ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, where the data has validation rows of its
    own, ``x_val``, ``y_val``; others are left alone. Inputs of any shape are flattened, standardised by the mean
    and deviation of the training rows, and held in float32. Integer (or bool) targets are class labels (int64),
    floating-point ones are values to regress (float32), of shape (N,) or (N, C).

    All data is held in memory, and a batch is cut out of it at once, in the process itself: worker processes
    would only add copies, whatever Lightning's warning about their number says. The order of the training rows
    follows from (seed, epoch). A checkpoint holds the position, so that a fit resumed in the middle of an epoch
    gets the batches that it would have had. Under distributed strategies one process reads each row of an epoch.

    Args:
        path: the ``.npz`` file; nothing in it is unpickled.
        arrays: tensors or numpy arrays by key, instead of ``path``. They are not changed.
        batch_size: rows in a batch, in each process.
        val_fraction: part of ``x_train`` to validate on, in (0, 1), rounded to whole rows; without effect where
            the data has ``x_val``.
        seed: of the validation rows and of the order of the training rows, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type; from :meth:`setup`, if a value in ``arrays`` is.
        ValueError: If both or none of ``path`` and ``arrays`` are given, an argument is out of its range, there
            is no such file, or ``arrays`` lacks keys; from :meth:`setup`, if the file cannot be read or lacks
            keys, shapes do not fit each other, numbers are not finite, labels are out of range, or a split
            would be empty.

    Example:
        >>> import torch
        >>> inputs, labels = torch.rand(50, 4, 4), torch.arange(50) % 5
        >>> arrays = {"x_train": inputs[:40], "y_train": labels[:40]}
        >>> arrays |= {"x_test": inputs[40:], "y_test": labels[40:]}
        >>> data = FeaturesDataModule(arrays=arrays, batch_size=16)
        >>> data.num_features, data.num_classes
        (16, 5)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, inputs.dtype, targets.shape, targets.dtype
        (torch.Size([16, 16]), torch.float32, torch.Size([16]), torch.int64)
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        arrays: Mapping[str, Any] | None = None,
        batch_size: int = 256,
        val_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed)
        expect_one(path=path, arrays=arrays)
        self._read_arrays = array_reader(path, arrays, required=_REQUIRED_KEYS, optional=_OPTIONAL_KEYS)

    @property
    def num_features(self) -> int:
        """Columns of the flattened inputs, D."""
        assert self.splits.num_features is not None
        return self.splits.num_features

    def _read(self) -> Splits:
        return make_splits(self._read_arrays(), val_fraction=self.val_fraction, seed=self.seed)


def make_splits(arrays: Mapping[str, Any], *, val_fraction: float, seed: int) -> Splits:
    """Check and split labelled arrays, and standardise them by the statistics of the training rows.

    Arguments, errors and the rows of the result are those of :class:`FeaturesDataModule`.

    Example:
        >>> arrays = {"x_train": torch.rand(10, 2, 3), "y_train": torch.arange(10) % 3}
        >>> arrays |= {"x_test": torch.rand(4, 2, 3), "y_test": torch.tensor([0, 1, 2, 0])}
        >>> splits = make_splits(arrays, val_fraction=0.2, seed=0)
        >>> splits.train[0].shape, splits.val[0].shape, splits.num_classes
        (torch.Size([8, 6]), torch.Size([2, 6]), 3)
    """
    own_validation = any(key in arrays for key in _OPTIONAL_KEYS)
    require_keys(arrays, (*_REQUIRED_KEYS, *(_OPTIONAL_KEYS if own_validation else ())), "`arrays`")
    rows = {split: _checked_rows(arrays, split) for split in SPLITS if f"x_{split}" in arrays}
    for split in rows:
        _check_against_training(split, rows[split], rows["train"])
    targets = rows["train"][1]
    num_classes = None if targets.is_floating_point() else int(targets.max()) + 1

    if not own_validation:
        chosen = split_samples(len(targets), val_fraction=val_fraction, test_fraction=0, seed=seed)
        rows |= {split: (rows["train"][0][numbers], targets[numbers]) for split, numbers in chosen.items()}
    standardise = Standardisation.fit(rows["train"][0])
    sources = {split: TensorRows(standardise(inputs), targets) for split, (inputs, targets) in rows.items()}
    return Splits(sources, rows["train"][0].shape[1], num_classes, standardisation=standardise)


def _checked_rows(arrays: Mapping[str, Any], split: str) -> _Rows:
    inputs = _checked_inputs(f"x_{split}", as_tensor(f"x_{split}", arrays[f"x_{split}"]))
    targets = _checked_targets(f"y_{split}", as_tensor(f"y_{split}", arrays[f"y_{split}"]))
    if len(inputs) != len(targets):
        raise UserValueError(
            f"Expected `x_{split}` and `y_{split}` to be of the same length, but got {len(inputs)} and {len(targets)}."
        )
    return inputs, targets


def _checked_inputs(key: str, inputs: Tensor) -> Tensor:
    if inputs.ndim < 2 or inputs.numel() == 0:
        raise UserValueError(
            f"Expected `{key}` to have the shape (samples, features...), none of them 0, but got {tuple(inputs.shape)}."
        )
    check_finite(key, inputs)
    return selectable(inputs).flatten(1)


def _checked_targets(key: str, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        if targets.ndim not in (1, 2):
            raise UserValueError(
                f"Expected `{key}` to have the shape (samples,) or (samples, outputs), but got {tuple(targets.shape)}."
            )
        targets = targets.to(torch.float32, copy=True)
        check_finite(key, targets)
        return targets
    if targets.ndim != 1:
        raise UserValueError(
            f"Expected `{key}`, class labels, to have the shape (samples,), but got {tuple(targets.shape)}."
        )
    targets = targets.to(torch.int64, copy=True)
    if len(targets) and targets.min() < 0:
        raise UserValueError(f"Expected `{key}` to hold class labels of at least 0, but got {int(targets.min())}.")
    return targets


def _check_against_training(split: str, rows: _Rows, train: _Rows) -> None:
    (inputs, targets), (train_inputs, train_targets) = rows, train
    if inputs.shape[1] != train_inputs.shape[1]:
        raise UserValueError(
            f"Expected `x_{split}` to have the {train_inputs.shape[1]} features of `x_train`,"
            f" but got {inputs.shape[1]}."
        )
    if targets.dtype != train_targets.dtype or targets.shape[1:] != train_targets.shape[1:]:
        raise UserValueError(
            f"Expected `y_{split}` to hold targets like those of `y_train`, {_described(train_targets)},"
            f" but got {_described(targets)}."
        )
    if not targets.is_floating_point() and targets.max() > train_targets.max():
        raise UserValueError(
            f"Expected `y_{split}` to hold labels up to {int(train_targets.max())}, the largest in `y_train`,"
            f" but got {int(targets.max())}."
        )


def _described(targets: Tensor) -> str:
    if not targets.is_floating_point():
        return "class labels"
    return f"floating-point values of shape {('samples', *targets.shape[1:])}".replace("'", "")
