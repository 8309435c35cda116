"""What data modules ask of the arrays and numbers that they are given."""

import numpy as np
import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError

Array = Tensor | np.ndarray


def as_tensor(key: str, array: Array) -> Tensor:
    """Return an array of real numbers as a tensor on the CPU that shares its memory where it can.

    Raises:
        TypeError: If it is no tensor or array, or does not hold real numbers.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "biuf":
            raise UserTypeError(f"Expected `{key}` to hold real numbers, but got dtype {array.dtype}.")
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        # torch takes native byte order only, and warns of arrays that it may not write to.
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))
    if not isinstance(array, Tensor):
        raise UserTypeError(
            f"Expected `{key}` to be a torch.Tensor or a numpy.ndarray, but got {type(array).__name__}."
        )
    if array.is_complex():
        raise UserTypeError(f"Expected `{key}` to hold real numbers, but got dtype {array.dtype}.")
    return array.detach().cpu()


def check_finite(key: str, values: Tensor) -> None:
    """Raise ``ValueError`` with their number, if there are values that are not finite."""
    if not values.is_floating_point() or values.isfinite().all():
        return
    nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
    raise UserValueError(
        f"Expected `{key}` to hold finite numbers, but got {nans} NaN and {infinities} infinite among {values.numel()}."
    )


def check_integer(name: str, value: int, *, at_least: int) -> None:
    """Raise ``TypeError`` unless an argument is an int, and ``ValueError`` if it is too small."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserTypeError(f"Expected `{name}` to be an int, but got {value!r}.")
    if value < at_least:
        raise UserValueError(f"Expected `{name}` to be at least {at_least}, but got {value}.")
