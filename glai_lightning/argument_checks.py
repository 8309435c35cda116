"""Checks of the types of arguments, in one grammar."""


def expect_integer(name: str, value: object) -> None:
    """Check that an argument is an integer, and not a bool.

    Raises:
        TypeError: otherwise.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be an integer, but got {value!r}.")


def expect_number(name: str, value: object) -> None:
    """Check that an argument is a number, and not a bool.

    Raises:
        TypeError: otherwise.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be a number, but got {value!r}.")


def expect_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that an argument is one of several strings.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"Expected `{name}` to be {', '.join(others)} or {last}, but got {value!r}.")
