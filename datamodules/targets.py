"""Targets as people have them: classes by name or number, and values to predict, as a loss takes them."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, listed
from glai_lightning.datamodules.arrays import Shards, as_tensor, check_finite

Task = Literal["classification", "regression"]


class Targets:
    """The targets of every split, read alike.

    Strings, integers and bools are classes. So are floats that number classes: whole numbers from 0 or 1 on without a
    gap, in ``train``. Other floats are values. Classes that are named, or numbered from 1 on, are numbered anew from 0.

    Args:
        arrays: targets of 'train' and other splits.
        task: what they are for, where that is known.
        key: name of the targets of a split, for messages.

    Attributes:
        of_split: class labels (N,), int64, or values (N,) or (N, C), float32, of each split.
        num_classes: one more than the largest label in training; ``None`` for values.
        classes: names of the classes, where they had names or other numbers.

    Raises:
        TypeError: If targets are no tensor or array, or hold neither real numbers nor strings.
        ValueError: If targets have the wrong shape, do not fit those of training or the task, or are not finite.
    """

    def __init__(self, arrays: Mapping[str, Any], task: Task | None, key: str | None = None) -> None:
        self._keys = {split: f"y_{split}" if key is None else key for split in arrays}
        read = {split: _read(self._keys[split], array) for split, array in arrays.items()}
        train = read["train"]
        if task == "classification" or (task is None and _are_classes(train)):
            self.classes, self.of_split = _number_classes(read, self._keys)
            self.num_classes: int | None = int(self.of_split["train"].max()) + 1
            if task is None and isinstance(train, Tensor) and train.is_floating_point():
                warnings.warn(
                    f"The whole numbers in `{self._keys['train']}` are taken for {self.num_classes} classes. To "
                    "predict them as values, give `task='regression'`.",
                    stacklevel=2,
                )
        else:
            self.classes, self.num_classes = None, None
            self.of_split = {split: _values(self._keys[split], targets) for split, targets in read.items()}
        for split, targets in self.of_split.items():
            if targets.shape[1:] != self.of_split["train"].shape[1:]:
                raise UserValueError(
                    f"Expected `y_{split}` to hold targets like those of `y_train`, of shape "
                    f"{tuple(self.of_split['train'].shape[1:])} for a sample, but got {tuple(targets.shape[1:])}."
                )

    def warn_of_rare_classes(self, train: Tensor, val: Tensor) -> None:
        """Warn, with their names, of classes with at most one training row, and of those without any to validate on.

        Args:
            train: labels of the training rows.
            val: labels of the validation rows.
        """
        if self.num_classes is None:
            return
        in_train, in_val = (labels.bincount(minlength=self.num_classes) for labels in (train, val))
        self._warn_of(in_train == 0, "no training row: the head has an output for each that it cannot learn")
        self._warn_of(in_train == 1, "a single training row")
        self._warn_of((in_train > 1) & (in_val == 0), "no validation row: the validation score says nothing of them")

    def _warn_of(self, which: Tensor, what: str) -> None:
        labels = which.nonzero().flatten().tolist()
        if labels:
            names = labels if self.classes is None else [repr(self.classes[label]) for label in labels]
            warnings.warn(f"Of {self.num_classes} classes, {len(labels)} have {what}: {listed(names)}.", stacklevel=2)


def _read(key: str, array: Any) -> Tensor | np.ndarray:
    """Return strings as an array, and numbers as a tensor."""
    values = np.concatenate(array) if isinstance(array, Shards) else array
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "UTO" and _are_strings(values):
        if "" in values:
            raise UserValueError(f"Expected `{key}` to hold a class in every row, but got an empty string.")
        return values.astype(str)
    targets = as_tensor(key, values)
    if targets.ndim not in (1, 2):
        raise UserValueError(
            f"Expected `{key}` to have the shape (samples,) or (samples, outputs), but got {tuple(targets.shape)}."
        )
    check_finite(key, targets)
    return targets


def _are_strings(values: np.ndarray) -> bool:
    return values.dtype.kind != "O" or all(isinstance(value, str) for value in values)


def _are_classes(train: Tensor | np.ndarray) -> bool:
    if isinstance(train, np.ndarray) or not train.is_floating_point():
        return True
    if train.ndim != 1 or not len(train) or not (train == train.round()).all():
        return False
    distinct = torch.unique(train)
    counted = distinct[0] + torch.arange(len(distinct), dtype=distinct.dtype)
    return len(distinct) > 1 and float(distinct[0]) in (0.0, 1.0) and torch.equal(distinct, counted)


def _number_classes(
    read: Mapping[str, Tensor | np.ndarray], keys: Mapping[str, str]
) -> tuple[list[str] | None, dict[str, Tensor]]:
    train = read["train"]
    named = isinstance(train, np.ndarray)
    for split, targets in read.items():
        if isinstance(targets, np.ndarray) != named:
            kinds = ("strings", "numbers") if named else ("numbers", "strings")
            raise UserValueError(f"Expected `y_{split}` to hold {kinds[0]}, as `y_train` does, but got {kinds[1]}.")
    if named:
        return _number_names(read)  # type: ignore[arg-type]
    labels = {split: _labels(keys[split], targets) for split, targets in read.items()}  # type: ignore[arg-type]
    present, largest = torch.unique(labels["train"]), int(labels["train"].max())
    for split, numbers in labels.items():
        if len(numbers) and numbers.max() > largest:
            raise UserValueError(
                f"Expected `y_{split}` to hold labels up to {largest}, the largest in `y_train`,"
                f" but got {int(numbers.max())}."
            )
    from_one = len(present) > 1 and torch.equal(present, torch.arange(1, largest + 1))
    if not from_one or any((numbers == 0).any() for numbers in labels.values()):
        return None, labels
    return [str(label) for label in present.tolist()], {split: numbers - 1 for split, numbers in labels.items()}


def _number_names(names: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, Tensor]]:
    classes = sorted(set(names["train"].tolist()))
    number = {name: label for label, name in enumerate(classes)}
    for split in names:
        unknown = sorted(set(names[split].tolist()) - set(classes))
        if unknown:
            raise UserValueError(
                f"Expected `y_{split}` to hold classes of `y_train`, but got {listed(map(repr, unknown))}."
            )
    return classes, {split: torch.tensor([number[name] for name in of.tolist()]) for split, of in names.items()}


def _labels(key: str, targets: Tensor) -> Tensor:
    if targets.ndim != 1:
        raise UserValueError(
            f"Expected `{key}`, class labels, to have the shape (samples,), but got {tuple(targets.shape)}."
        )
    if targets.is_floating_point() and not (targets == targets.round()).all():
        raise UserValueError(f"Expected `{key}` to hold class labels, whole numbers, but got fractions.")
    # A copy: labels of the user's array must not change with it.
    labels = targets.to(torch.int64, copy=True)
    if len(labels) and labels.min() < 0:
        raise UserValueError(f"Expected `{key}` to hold class labels of at least 0, but got {int(labels.min())}.")
    return labels


def _values(key: str, targets: Tensor | np.ndarray) -> Tensor:
    if isinstance(targets, np.ndarray):
        raise UserTypeError(f"Expected `{key}` to hold numbers for a regression, but got strings.")
    return targets.to(torch.float32, copy=True)
