"""Checks of a callback's arguments, in one grammar."""

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


def check_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Check that a value is a number in [low, high], or in (low, high] if it is to be ``above``.

    Raises:
        MisconfigurationException: otherwise.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value if above else low <= value) or not value <= high:
        bracket = "(" if above else "["
        raise UserMisconfigurationError(
            f"Expected `{name}` to be a number in {bracket}{low:g}, {high:g}], but got {value!r}."
        )


def check_least(name: str, value: int, least: int) -> None:
    """Check that a value is an integer, and large enough.

    Raises:
        MisconfigurationException: otherwise.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserMisconfigurationError(f"Expected `{name}` to be an integer of at least {least}, but got {value!r}.")
