"""Checks of what a callback finds under its name in a checkpoint, which may come from any file."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError

#: What an entry has to be, in words, and a function that tells.
Kind = tuple[str, Callable[[Any], bool]]


def is_number(value: object) -> bool:
    """Tell whether a value is a number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Tell whether a value is an integer of at least 0, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


FLAG: Kind = ("a bool", lambda value: isinstance(value, bool))
COUNT: Kind = ("an integer of at least 0", is_count)
NUMBER: Kind = ("a number", is_number)
NUMBERS: Kind = ("a list of numbers", lambda value: isinstance(value, list) and all(map(is_number, value)))
TENSORS: Kind = (
    "a list of tensors",
    lambda value: isinstance(value, list) and all(isinstance(entry, Tensor) for entry in value),
)
TENSORS_BY_NAME: Kind = (
    "a list of tensors by name",
    lambda value: (
        isinstance(value, list)
        and all(isinstance(entry, Mapping) and all(isinstance(t, Tensor) for t in entry.values()) for entry in value)
    ),
)
MAPPING: Kind = ("a mapping", lambda value: isinstance(value, Mapping))
MAPPINGS: Kind = (
    "a list of mappings, not empty",
    lambda value: isinstance(value, list) and value != [] and all(isinstance(entry, Mapping) for entry in value),
)
TEXT: Kind = ("a string", lambda value: isinstance(value, str))


def or_none(kind: Kind) -> Kind:
    """Return the kind that also takes ``None``."""
    words, tells = kind
    return f"{words} or None", lambda value: value is None or tells(value)


def check_entries(state: Any, kinds: Mapping[str, Kind], holder: str) -> None:
    """Check that a restored state holds what it is to hold; entries that nobody asks for are left alone.

    Args:
        state: what the checkpoint holds.
        kinds: what each entry has to be, by its name.
        holder: whose state it is, in words.

    Raises:
        MisconfigurationException: if it is not a mapping, lacks an entry, or holds one of another type.
    """
    if not isinstance(state, Mapping):
        raise UserMisconfigurationError(
            f"Expected the state of {holder} in the checkpoint to be a mapping, but got `{type(state).__name__}`."
        )
    for name, (words, tells) in kinds.items():
        if name not in state:
            raise UserMisconfigurationError(
                f"Expected the state of {holder} in the checkpoint to hold `{name}`, but got {sorted(map(str, state))}."
            )
        if not tells(state[name]):
            raise UserMisconfigurationError(
                f"Expected `{name}` in the state of {holder} in the checkpoint to be {words}, but got {state[name]!r}."
            )
