"""Labelled arrays, checked, split into training, validation and test rows, and standardised."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glai_lightning.checks import UserValueError
from glai_lightning.datamodules.arrays import require_keys
from glai_lightning.datamodules.checks import Array, as_tensor, check_finite
from glai_lightning.datamodules.standardisation import Standardisation

REQUIRED_KEYS = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL_KEYS = ("x_val", "y_val")

_Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Splits:
    """Data that is ready to train on.

    Args:
        train: inputs (N, D), float32, standardised; and targets: class labels (N,), int64, or values to
            regress (N,) or (N, C), float32.
        val: the same for validation.
        test: the same for testing.
        standardisation: what was done to the inputs, to do the same to new ones.
        num_classes: one more than the largest label in training; ``None`` for regression.
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    standardisation: Standardisation
    num_classes: int | None


def make_splits(arrays: Mapping[str, Array], *, val_fraction: float, seed: int) -> Splits:
    """Check and split labelled arrays, and standardise them by the statistics of the training rows.

    Args:
        arrays: ``x_train`` (N, ...), ``y_train``, ``x_test`` and ``y_test``; optionally ``x_val`` and
            ``y_val``, and then ``x_train`` is not split. Integer (or bool) targets are class labels, of shape
            (N,); floating-point ones are values to regress, of shape (N,) or (N, C).
        val_fraction: part of ``x_train`` to validate on, in (0, 1).
        seed: of the choice of these rows, at least 0.

    Returns:
        The splits. The arrays given are not changed.

    Raises:
        TypeError: If a value is no tensor or array, or does not hold real numbers.
        ValueError: If keys are missing, shapes do not fit each other, numbers are not finite, labels are out of
            range, or a split would be empty.

    Example:
        >>> arrays = {"x_train": torch.rand(10, 2, 3), "y_train": torch.arange(10) % 3}
        >>> arrays |= {"x_test": torch.rand(4, 2, 3), "y_test": torch.tensor([0, 1, 2, 0])}
        >>> splits = make_splits(arrays, val_fraction=0.2, seed=0)
        >>> splits.train[0].shape, splits.val[0].shape, splits.num_classes
        (torch.Size([8, 6]), torch.Size([2, 6]), 3)
    """
    require_split_keys(arrays)
    rows = {split: _checked_rows(arrays, split) for split in ("train", "val", "test") if f"x_{split}" in arrays}
    for split in rows:
        _check_against_training(split, rows[split], rows["train"])
    targets = rows["train"][1]
    num_classes = None if targets.is_floating_point() else int(targets.max()) + 1

    if "val" not in rows:
        rows["train"], rows["val"] = _split_rows(rows["train"], val_fraction, seed)
    standardise = Standardisation.fit(rows["train"][0])
    train, val, test = ((standardise(rows[split][0]), rows[split][1]) for split in ("train", "val", "test"))
    return Splits(train, val, test, standardise, num_classes)


def require_split_keys(arrays: Mapping[str, Array]) -> None:
    """Raise ``ValueError`` unless the keys that :func:`make_splits` needs are there."""
    require_keys(arrays, REQUIRED_KEYS, "`arrays`")
    if any(key in arrays for key in OPTIONAL_KEYS):
        require_keys(arrays, (*REQUIRED_KEYS, *OPTIONAL_KEYS), "`arrays`")


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise ``ValueError`` unless the parts to validate and to test on leave something to train on."""
    if not 0 < val_fraction < 1:
        raise UserValueError(f"Expected `val_fraction` to be in (0, 1), but got {val_fraction}.")
    if not 0 <= test_fraction < 1 - val_fraction:
        raise UserValueError(
            f"Expected `test_fraction` to be in [0, 1 - `val_fraction`), but got {test_fraction} with a "
            f"`val_fraction` of {val_fraction}."
        )


def split_samples(
    num_samples: int, *, val_fraction: float, test_fraction: float, seed: int, at_least: int = 1
) -> dict[str, Tensor]:
    """Draw which samples are validated, tested and trained on.

    Args:
        num_samples: samples to share out.
        val_fraction: part to validate on, rounded to whole samples; 0 for no such split.
        test_fraction: part to test on, likewise.
        seed: of the draw, at least 0.
        at_least: samples that each split is to have, 1 or 2.

    Returns:
        For each split the numbers of its samples, ascending, int64.

    Raises:
        ValueError: If a split has too few.

    Example:
        >>> {name: len(rows) for name, rows in split_samples(10, val_fraction=0.2, test_fraction=0, seed=0).items()}
        {'val': 2, 'train': 8}
    """
    num_val, num_test = (round(num_samples * part) for part in (val_fraction, test_fraction))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_samples))
    rows = {
        "val": order[:num_val],
        "test": order[num_val : num_val + num_test],
        "train": order[num_val + num_test :],
    }
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction == 0:
            del rows[split]
    for split, chosen in rows.items():
        if len(chosen) < at_least:
            wanted = {1: "one sample", 2: "two samples"}[at_least]
            raise UserValueError(
                f"Expected at least {wanted} in each split, but got {len(chosen)} of {num_samples} for {split!r}."
            )
    return {split: chosen.sort().values for split, chosen in rows.items()}


def _checked_rows(arrays: Mapping[str, Array], split: str) -> _Rows:
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
    if inputs.dtype in (torch.uint16, torch.uint32, torch.uint64):
        # torch can hold and convert these, but not select rows of them.
        inputs = inputs.double()
    return inputs.flatten(1)


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


def _split_rows(rows: _Rows, val_fraction: float, seed: int) -> tuple[_Rows, _Rows]:
    num_rows = len(rows[0])
    num_val = round(num_rows * val_fraction)
    if not 0 < num_val < num_rows:
        raise UserValueError(
            f"Expected `val_fraction` to leave rows to train and to validate on, but got {val_fraction},"
            f" which leaves {num_rows - num_val} and {num_val} of {num_rows}."
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_rows))
    inputs, targets = rows
    train, val = order[num_val:], order[:num_val]
    return (inputs[train], targets[train]), (inputs[val], targets[val])
