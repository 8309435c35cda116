"""Which samples, or which classes, are trained on, validated on and tested on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_number, listed

SPLITS = ("train", "val", "test")

_FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise ``ValueError`` unless the parts to validate and to test on leave something to train on."""
    expect_number("val_fraction", val_fraction, low=0, high=1, above=True, below=True)
    expect_number("test_fraction", test_fraction)
    if not 0 <= test_fraction < 1 - val_fraction:
        raise UserValueError(
            f"Expected `test_fraction` to be in [0, 1 - `val_fraction`), but got {test_fraction} with a "
            f"`val_fraction` of {val_fraction}."
        )


def split_samples(
    num_samples: int, *, val_fraction: float, test_fraction: float, seed: int, at_least: int = 1
) -> dict[str, Tensor]:
    """Draw which samples are validated, tested and trained on: the numbers of each split, in the order drawn.

    A split whose fraction is 0 is left out; one with fewer than ``at_least`` samples (1 or 2) raises ``ValueError``.

    Example:
        >>> {name: len(rows) for name, rows in split_samples(10, val_fraction=0.2, test_fraction=0, seed=0).items()}
        {'val': 2, 'train': 8}
    """
    num_val, num_test = (round(num_samples * part) for part in (val_fraction, test_fraction))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_samples))
    rows = {"val": order[:num_val], "test": order[num_val : num_val + num_test], "train": order[num_val + num_test :]}
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction == 0:
            del rows[split]
    for split, chosen in rows.items():
        if len(chosen) < at_least:
            wanted = {1: "one sample", 2: "two samples"}[at_least]
            raise UserValueError(
                f"Expected at least {wanted} in each split, but got {len(chosen)} of {num_samples} for {split!r}."
            )
    return rows


def check_classes(classes: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``classes`` has three fractions or three lists."""
    if not isinstance(classes, Mapping) or set(classes) != set(SPLITS):
        got = list(classes) if isinstance(classes, Mapping) else type(classes).__name__
        raise UserValueError(
            f"Expected `classes` to be a mapping with the keys 'train', 'val' and 'test', but got {got}."
        )
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in classes.values()]
    lists = [isinstance(value, Sequence | set | range) and not isinstance(value, str) for value in classes.values()]
    if all(numbers):
        if not (min(classes.values()) > 0 and abs(sum(classes.values()) - 1) <= 1e-6):
            raise UserValueError(
                f"Expected the fractions in `classes` to be above 0 and to add up to 1, but got {classes}."
            )
    elif not all(lists):
        raise UserTypeError(
            f"Expected `classes` to hold three fractions or three lists of classes, but got {dict(classes)}."
        )


def split_classes(
    labels: Tensor, classes: Mapping[str, Any] | None = None, *, groups: np.ndarray | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Share out samples by their classes.

    Args:
        labels: class of each sample (N,), int64.
        classes: for each of 'train', 'val' and 'test' a fraction of the classes (in an order drawn with ``seed``), or
            the list of them; by default 60, 20 and 20 %.
        groups: where given, whole groups of classes are shared out, and ``classes`` counts or names groups: the group
            of each class in ascending order of their labels, or of each sample.
        seed: of the choice by fractions, and of that of rows where validation and test share classes.

    Returns:
        For each split the rows of its samples, ascending, int64. Validation and test may be given the same classes: of
        each shared one, half of the samples are for validation and the other half for testing.

    Raises:
        ValueError: If validation or test share a class with training (the message names it), a class is not in the
            data, or ``groups`` does not fit the labels.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 2, 2, 2])
        >>> split_classes(labels, {"train": [0, 1], "val": [2], "test": [2]})["train"]
        tensor([0, 1])
    """
    unit_of_row, units = _units(labels, groups)
    if classes is None or not isinstance(classes["train"], Sequence | set | range):
        fractions: Any = _FRACTIONS if classes is None else classes
        chosen = _shared_out(len(units), fractions, seed)
    else:
        chosen = {split: _positions(split, classes[split], units) for split in SPLITS}
    what = "classes" if groups is None else "groups"
    for split in ("val", "test"):
        shared = sorted(chosen["train"] & chosen[split])
        if shared:
            raise UserValueError(
                f"Expected the {what} of 'train' and '{split}' to be disjoint, "
                f"but both have {listed(units[position] for position in shared)}."
            )
    rows = {split: torch.from_numpy(np.flatnonzero(np.isin(unit_of_row, list(chosen[split])))) for split in SPLITS}
    both = np.isin(unit_of_row, list(chosen["val"] & chosen["test"]))
    return _halved(rows, labels, torch.from_numpy(both), seed) if both.any() else rows


def check_disjoint(labels: Mapping[str, Iterable[int]]) -> None:
    """Raise ``ValueError``, naming the classes, if those of validation or test are among those of training."""
    for split in ("val", "test"):
        shared = sorted(set(labels["train"]) & set(labels[split]))
        if shared:
            raise UserValueError(
                f"Expected the classes of 'train' and '{split}' to be disjoint, but both have {listed(shared)}."
            )


def _units(labels: Tensor, groups: np.ndarray | None) -> tuple[np.ndarray, list[Any]]:
    """Return, for each row, the position of its class or group, and the classes or groups."""
    names, class_of_row = torch.unique(labels, return_inverse=True)
    if groups is None:
        return class_of_row.numpy(), names.tolist()
    if groups.shape not in ((len(names),), (len(labels),)):
        raise UserValueError(
            f"Expected `groups` to name the group of each of {len(names)} classes or {len(labels)} samples, but got "
            f"the shape {groups.shape}."
        )
    units, group = np.unique(groups, return_inverse=True)
    if len(group) == len(names):
        return group[class_of_row.numpy()], units.tolist()
    for position, name in enumerate(names.tolist()):
        of_class = np.unique(group[class_of_row.numpy() == position])
        if len(of_class) > 1:
            raise UserValueError(
                f"Expected all samples of a class in one group, but class {name} is in {listed(units[of_class])}."
            )
    return group, units.tolist()


def _shared_out(number: int, fractions: Mapping[str, float], seed: int) -> dict[str, set[int]]:
    order = np.random.default_rng(seed).permutation(number)
    train = round(number * fractions["train"])
    val = round(number * (fractions["train"] + fractions["val"]))
    return {"train": set(order[:train]), "val": set(order[train:val]), "test": set(order[val:])}


def _positions(split: str, wanted: Sequence[Any], units: list[Any]) -> set[int]:
    unknown = [unit for unit in wanted if unit not in units]
    if unknown:
        raise UserValueError(
            f"Expected `classes` to name classes or groups of the data for '{split}', but {listed(map(repr, unknown))} "
            f"is not among {listed(map(repr, units))}."
        )
    return {units.index(unit) for unit in wanted}


def _halved(rows: dict[str, Tensor], labels: Tensor, shared: Tensor, seed: int) -> dict[str, Tensor]:
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    for_val = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels[shared]):
        of_class = generator.permutation(torch.nonzero(labels == label).flatten().numpy())
        for_val[torch.from_numpy(of_class[: (len(of_class) + 1) // 2])] = True
    in_val, in_test = ~shared | for_val, ~shared | ~for_val
    return rows | {"val": rows["val"][in_val[rows["val"]]], "test": rows["test"][in_test[rows["test"]]]}
