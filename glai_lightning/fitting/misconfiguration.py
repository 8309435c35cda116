"""The error for a Trainer, a module or callbacks that do not go together."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from glai_lightning.checks import UserError


class UserMisconfigurationError(UserError, MisconfigurationException):
    """A Trainer, a module or callbacks that do not go together, or an argument that a callback cannot use."""


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Context in which a refused argument raises ``UserMisconfigurationError``, as in Lightning's own callbacks.

    Example:
        >>> from glai_lightning.checks import expect_integer
        >>> with as_misconfiguration():
        ...     expect_integer("patience", 1, least=1)
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if not isinstance(error, UserError):
            raise
        raise UserMisconfigurationError(str(error)) from error
