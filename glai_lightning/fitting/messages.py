"""Messages to the user in the middle of a fit, which no progress bar erases."""

import logging
import shutil
import sys
import textwrap
import warnings

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm  # type: ignore[import-untyped]

_LOGGER = logging.getLogger("glai_lightning")


class _AboveTheBar(logging.Handler):
    """Prints above the progress bars of tqdm and of rich, where the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().hasHandlers():
            # By name, because rich puts another stream in its place while it draws.
            tqdm.write(textwrap.fill(self.format(record), shutil.get_terminal_size().columns), file=sys.stderr)


_LOGGER.addHandler(_AboveTheBar())
_LOGGER.setLevel(logging.INFO)


@rank_zero_only
def say(message: object) -> None:
    """Tell the user something, once and not once a process, whole and above the progress bar.

    Args:
        message: what is logged as information by the logger ``glai_lightning``.
    """
    _LOGGER.info("%s", message)


def hide_warnings(*patterns: str) -> None:
    """Hide warnings about what is done on purpose, until ``unhide_warnings`` is given the same patterns.

    Args:
        patterns: regular expressions that their messages begin with.
    """
    for pattern in patterns:
        warnings.filterwarnings("ignore", message=pattern)


def unhide_warnings(*patterns: str) -> None:
    """Show again what ``hide_warnings`` hid."""
    for entry in list(warnings.filters):
        if entry[0] == "ignore" and getattr(entry[1], "pattern", None) in patterns:
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
