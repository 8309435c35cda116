"""Libraries that only some parts need, and the names of models in them."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from glai_lightning.checks import MissingLibraryError, UserValueError


def import_optional(name: str, *, needed_for: str, extra: str) -> Any:
    """Import a module of a library that comes with an extra.

    Args:
        name: the module, as in an import statement.
        needed_for: what cannot be used without it.
        extra: the extra of this package that installs it.

    Raises:
        MissingLibraryError: if it cannot be imported; the message says how to install it.

    Example:
        >>> import_optional("math", needed_for="`Example`", extra="all").pi > 3
        True
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.split(".")[0]
        raise MissingLibraryError(
            f"Expected `{library}` to be installed for {needed_for}, but it cannot be imported: "
            f"pip install 'glai-lightning[{extra}]'. ({error})"
        ) from error


def check_known(name: str, known: Iterable[str], *, library: str) -> None:
    """Check that a library has a model of a name.

    Raises:
        ValueError: if it has not; the message lists the names that are near.
    """
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f" Near it are {', '.join(map(repr, near))}." if near else ""
        raise UserValueError(f"Expected `name` to be a model of {library}, but got {name!r}.{hint}")
