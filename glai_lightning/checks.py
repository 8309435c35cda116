"""Errors for the user, and checks of arguments, in one grammar: "Expected `paths` to be ..., but got 'all'."."""

import math
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path


class UserError(Exception):
    """Mixin of every error whose message is a sentence for the user, who needs no traceback to act on it."""


class UserValueError(UserError, ValueError):
    """A value that is out of range, or data that is not what it has to be."""


class UserTypeError(UserError, TypeError):
    """An argument or data of the wrong type."""


class MissingLibraryError(UserError, ModuleNotFoundError):
    """A library that comes with an extra, and is not installed."""


def expect_integer(name: str, value: object, *, least: int | None = None) -> None:
    """Check that an argument is an integer, not a bool, and large enough.

    Args:
        name: name of the argument, for the message.
        value: the argument.
        least: the smallest value allowed; ``None`` for no bound.

    Raises:
        UserTypeError: if it is not an integer.
        UserValueError: if it is below ``least``.

    Example:
        >>> expect_integer("patience", 2, least=1)
    """
    bound = "" if least is None else f" of at least {least}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserTypeError(f"Expected `{name}` to be an integer{bound}, but got {value!r}.")
    if least is not None and value < least:
        raise UserValueError(f"Expected `{name}` to be an integer{bound}, but got {value}.")


def expect_sizes(**sizes: object) -> None:
    """Check that arguments are integers of at least 1.

    Args:
        **sizes: the arguments by their names.

    Raises:
        UserTypeError: if one is not an integer.
        UserValueError: if one is below 1.

    Example:
        >>> expect_sizes(in_features=4, out_features=3)
    """
    for name, size in sizes.items():
        expect_integer(name, size, least=1)


def listed(values: Iterable[object], most: int = 10) -> str:
    """Write values in one line, the first few of them where there are many.

    Example:
        >>> listed(range(4), most=2)
        '0, 1 and 2 more'
    """
    values = list(values)
    rest = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + rest


def expect_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> None:
    """Check that an argument is a finite number, not a bool, in an interval.

    Args:
        name: name of the argument, for the message.
        value: the argument.
        low: lower end of the interval.
        high: upper end of the interval.
        above: whether the lower end is excluded.
        below: whether the upper end is excluded.

    Raises:
        UserTypeError: if it is not a number.
        UserValueError: if it lies outside of the interval, or is not finite.

    Example:
        >>> expect_number("dropout", 0.5, low=0.0, high=1.0, below=True)
    """
    interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    bound = "" if (low, high) == (-math.inf, math.inf) else f" in {interval}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserTypeError(f"Expected `{name}` to be a number{bound}, but got {value!r}.")
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    if not math.isfinite(value) or not inside:
        raise UserValueError(f"Expected `{name}` to be a finite number{bound}, but got {value!r}.")


def expect_flag(name: str, value: object) -> None:
    """Check that an argument is True or False.

    Raises:
        UserTypeError: otherwise.

    Example:
        >>> expect_flag("batch_norm", True)
    """
    if not isinstance(value, bool):
        raise UserTypeError(f"Expected `{name}` to be True or False, but got {value!r}.")


def expect_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that an argument is one of several strings.

    Raises:
        UserValueError: otherwise.

    Example:
        >>> expect_choice("mode", "max", ("min", "max"))
    """
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise UserValueError(f"Expected `{name}` to be {', '.join(others)} or {last}, but got {value!r}.")


def expect_file(name: str, value: object) -> Path:
    """Check that an argument is the path of a file that is there, and return it.

    Args:
        name: name of the argument, for the message.
        value: the argument.

    Raises:
        UserTypeError: if it is not a path.
        UserValueError: if there is no such file.

    Example:
        >>> expect_file("weights", "nowhere.pt")
        Traceback (most recent call last):
        ...
        glai_lightning.checks.UserValueError: Expected `weights` to be an existing file, but got 'nowhere.pt'.
    """
    if not isinstance(value, str | PathLike):
        raise UserTypeError(f"Expected `{name}` to be a path, but got {value!r}.")
    path = Path(value)
    if "\0" in str(path) or not path.is_file():
        raise UserValueError(f"Expected `{name}` to be an existing file, but got '{path}'.")
    return path


def expect_writable(name: str, value: str | PathLike[str]) -> Path:
    """Check that a file can be written, before the work whose result it is to hold, and return its path.

    Args:
        name: name of the argument, for the message.
        value: the argument. What is there already stays as it is.

    Raises:
        UserValueError: if it is a folder, if its folder is not there, or if it cannot be written.

    Example:
        >>> expect_writable("--to", "nowhere/a.csv")
        Traceback (most recent call last):
        ...
        glai_lightning.checks.UserValueError: Expected `--to` to lie in an existing folder, but got 'nowhere/a.csv'.
    """
    path = Path(value)
    if "\0" in str(path) or not path.parent.is_dir():
        raise UserValueError(f"Expected `{name}` to lie in an existing folder, but got '{path}'.")
    if path.is_dir():
        raise UserValueError(f"Expected `{name}` to be a file, but got the folder '{path}'.")
    try:
        # What is there is not opened: that would end a pipe.
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError
        if not path.exists():
            path.touch()
            path.unlink()
    except OSError as error:
        raise UserValueError(f"Expected `{name}` to be a file that can be written, but got '{path}'.") from error
    return path
