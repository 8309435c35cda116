"""The file of statistics: read without executing anything, and checked before anything is made of it."""

import pickle
import zipfile
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_file

FORMAT = "glai_lightning.PathStatistics"
VERSION = 1
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "fingerprint": (str, type(None)),
    "feature_dtype": str,
    "targets": str,
    "classes": (list, type(None)),
    "high": Tensor,
    "low": Tensor,
    "squares": Tensor,
}


def read_statistics(path: str | PathLike[str]) -> Mapping[str, Any]:
    """Read a file of statistics.

    Raises:
        TypeError: if ``path`` is not a path.
        ValueError: if there is no such file, or it holds something else, is cut short or of another version.
    """
    file = expect_file("path", path)
    if not zipfile.is_zipfile(file):
        raise UserValueError(f"Expected '{file}' to hold statistics, but it does not, or is cut short.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, OSError, TypeError) as error:
        raise UserValueError(f"Expected '{file}' to hold statistics, but it cannot be read: {error}") from error
    return check_state(state, f"'{file}'")


def check_state(state: object, name: str) -> Mapping[str, Any]:
    """Check that a mapping is the state of statistics.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: if an entry is missing or not what it has to be, or a count is negative.
    """
    if not isinstance(state, Mapping):
        raise UserTypeError(f"Expected {name} to hold statistics, but got a `{type(state).__name__}`.")
    if state.get("format") != FORMAT:
        raise UserValueError(f"Expected {name} to hold statistics, but it holds something else.")
    if state.get("version") != VERSION:
        raise UserValueError(f"Expected {name} to be of version {VERSION}, but got version {state.get('version')!r}.")
    for entry, kind in _ENTRIES.items():
        if not isinstance(state.get(entry), kind):
            raise UserValueError(f"Expected `{entry}` in {name}, but got a `{type(state.get(entry)).__name__}`.")
    high, low, squares, classes = (state[entry] for entry in ("high", "low", "squares", "classes"))
    sums = (high, low, squares)
    rows, targets = high.shape[0] if high.ndim == 2 else 0, squares.shape[-1] if squares.ndim == 2 else -1
    # Views and sparse tensors of a small file could be of any size.
    plain = all(part.layout == torch.strided and part.is_contiguous() and not part.is_meta for part in sums)
    fits = plain and rows > 1 and high.shape[1] == rows + targets and squares.shape[0] == 2
    fits &= low.shape in ((), high.shape) and all(part.dtype == torch.float64 for part in sums)
    if (
        not fits
        or state["targets"] not in ("labels", "numbers")
        or (state["targets"] == "labels") != (classes is not None and len(classes) == targets)
    ):
        raise UserValueError(f"Expected the sums in {name} to be of one size, in float64, but got others.")
    if not all(bool(part.isfinite().all()) for part in sums):
        raise UserValueError(f"Expected the sums in {name} to be finite, but got NaN or infinity.")
    counts = high[-1, rows - 1 :] if classes is not None else high[-1, rows - 1 : rows]
    if bool((counts < 0).any()):
        raise UserValueError(f"Expected counts of samples of at least 0 in {name}, but got {float(counts.min()):g}.")
    if bool((counts != counts.round()).any()) or (classes is not None and counts[0] != counts[1:].sum()):
        raise UserValueError(f"Expected whole counts of samples that add up in {name}, but got others.")
    if bool((high.diagonal() < 0).any()):
        raise UserValueError(f"Expected sums of squares of at least 0 in {name}, but got others.")
    return state
